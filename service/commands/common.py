"""What the subcommands share: consoles, options, the figures line, a client of a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service.client import Client
from service.settings import Settings

URL = "http://127.0.0.1:8000"

out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Option(help="address of the running service", envvar="DETOT_URL")]
KeyOption = Annotated[str | None, typer.Option("--key", help="API key", envvar="DETOT_KEY")]
TaskName = Annotated[str, typer.Argument(help="task id")]


def client(url: str, key: str | None) -> Client:
    """A client of the service that the options name."""
    return Client(url, key)


def figures(values: dict[str, Any]) -> None:
    """The last line of a command: its figures as one line of JSON."""
    print(json.dumps(values, default=str), flush=True)


def pull_model(model: str, settings: Settings, *, verify: bool = False) -> Path:
    """The model's folder, fetched with a progress bar if need be."""
    from service.bench.progress import download_progress
    from service.engine.weights import resolve

    with download_progress(err) as report:
        return resolve(model, settings.cache_dir, offline=settings.offline, verify=verify, progress=report)
