"""What the subcommands share: consoles, options, the figures line, a client of a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service.client import Client
from service.settings import Settings, load_settings

out = Console()
err = Console(stderr=True)

Url = Annotated[
    str | None,
    typer.Option(help="address of the running service; default: as DETOT_HOST and DETOT_PORT say", envvar="DETOT_URL"),
]
KeyOption = Annotated[str | None, typer.Option("--key", help="API key", envvar="DETOT_KEY")]
TaskName = Annotated[str, typer.Argument(help="task id")]


def service_url(url: str | None) -> str:
    """The address given, or else the one where a service with these settings listens."""
    return url or load_settings().base_url


def client(url: str | None, key: str | None) -> Client:
    """A client of the service that the options name."""
    return Client(service_url(url), key)


def figures(values: dict[str, Any]) -> None:
    """The last line of a command: its figures as one line of JSON."""
    print(json.dumps(values, default=str), flush=True)


def pull_model(model: str, settings: Settings, *, verify: bool = False) -> Path:
    """The model's folder, fetched with a progress bar if need be."""
    from service.bench.progress import download_progress
    from service.engine.weights import resolve

    with download_progress(err) as report:
        return resolve(model, settings.cache_dir, offline=settings.offline, verify=verify, progress=report)
