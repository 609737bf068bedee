"""Subcommands that manage models, tasks and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.commands.common import KeyOption, TaskName, Url, client, figures, out, pull_model
from service.errors import InvalidRequest
from service.settings import DEFAULT_MODEL, load_settings

models_app = typer.Typer(help="Model weights: known models, fetching, where they lie.", no_args_is_help=True)
tasks_app = typer.Typer(help="Tasks of a running service, and checking a catalogue file.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys (kept hashed in a file).", no_args_is_help=True)

KeysFile = Annotated[Path | None, typer.Option("--file", help="keys file; default: DETOT_KEYS_FILE")]


# --- models ---------------------------------------------------------------------------------------------------------


@models_app.command("list")
def models_list() -> None:
    """Known models, their sources in order, and whether they are here."""
    from service.engine.weights import list_models

    settings = load_settings()
    table = Table("model", "parameters", "sources, in order", "here", box=None)
    for row in list_models(settings.cache_dir):
        parameters = f"{row.parameters / 1e6:,.0f}M" if row.parameters else ""
        here = f"{row.size / 1e9:.2f} GB" if row.size else "no"
        table.add_row(row.name, parameters, ", ".join(row.sources), here)
    out.print(table)


@models_app.command("pull")
def modelspull_model(
    model: Annotated[str, typer.Argument(help="known model or Hugging Face id")] = DEFAULT_MODEL,
    verify: Annotated[bool, typer.Option(help="check the checksums of files that are here already")] = False,
) -> None:
    """Fetch, verify and convert a model; nothing happens when it is here."""
    folder = pull_model(model, load_settings(), verify=verify)
    figures({"model": model, "path": str(folder), "bytes": sum(f.stat().st_size for f in folder.iterdir())})


@models_app.command("path")
def models_path(model: Annotated[str, typer.Argument()] = DEFAULT_MODEL) -> None:
    """Print the folder of a model that is here."""
    from service.engine.weights import cached

    folder = cached(model, load_settings().cache_dir)
    if folder is None:
        raise InvalidRequest(f"model {model!r} is not here; fetch it with `detot models pull {model}`")
    print(folder)


# --- tasks ----------------------------------------------------------------------------------------------------------


@tasks_app.command("list")
def tasks_list(url: Url = None, key: KeyOption = None) -> None:
    """Tasks of a running service."""
    table = Table("task", "answer", "version", "state", "description", box=None)
    for t in client(url, key).json("GET", "/v1/tasks")["tasks"]:
        state = "frozen" if t["frozen"] else "open"
        table.add_row(t["id"], t["answer_type"], str(t["version"]), state, t["description"])
    out.print(table)


@tasks_app.command("show")
def tasks_show(task: TaskName, url: Url = None, key: KeyOption = None) -> None:
    """Definition, offset and monitor of one task."""
    out.print_json(data=client(url, key).json("GET", f"/v1/tasks/{task}"))


@tasks_app.command("check")
def tasks_check(file: Annotated[Path, typer.Argument(help="task catalogue (YAML)")]) -> None:
    """Check a catalogue file; a mistake names file, task and field."""
    from service.tasks.catalogue import load_catalogue

    figures({"file": str(file), "tasks": list(load_catalogue(file).tasks)})


@tasks_app.command("add")
def tasks_add(
    file: Annotated[Path, typer.Argument(help="one task, as YAML or JSON")], url: Url = None, key: KeyOption = None
) -> None:
    """Register a task with a running service."""
    import yaml

    try:
        document = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise InvalidRequest(f"{file}: {e}") from e
    out.print_json(data=client(url, key).json("POST", "/v1/tasks", json=document))


@tasks_app.command("remove")
def tasks_remove(task: TaskName, url: Url = None, key: KeyOption = None) -> None:
    """Remove a run-time task."""
    client(url, key).json("DELETE", f"/v1/tasks/{task}")


# --- keys -----------------------------------------------------------------------------------------------------------


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="who or what uses the key")],
    scope: Annotated[list[str] | None, typer.Option(help="call, feedback or admin; may be repeated")] = None,
    rate: Annotated[str | None, typer.Option(help="rate limit, such as 600/minute")] = None,
    file: KeysFile = None,
) -> None:
    """Issue a key. It is printed once; the file keeps its hash."""
    from service.api.auth import Scope, add_key

    try:
        scopes = [Scope(s) for s in scope or ["call", "feedback"]]
    except ValueError as e:
        raise InvalidRequest(f"{e}; scopes are {', '.join(Scope)}") from None
    print(add_key(_keys_file(file), name, scopes, rate))


@keys_app.command("list")
def keys_list(file: KeysFile = None) -> None:
    """Issued keys, without the keys themselves."""
    from service.api.auth import load_keys

    table = Table("name", "scopes", "rate", "created", box=None)
    for key in load_keys(_keys_file(file)).values():
        table.add_row(key.name, ", ".join(key.scopes), key.rate or "", key.created)
    out.print(table)


@keys_app.command("remove")
def keys_remove(name: Annotated[str, typer.Argument()], file: KeysFile = None) -> None:
    """Take a key back."""
    from service.api.auth import remove_key

    remove_key(_keys_file(file), name)


def _keys_file(file: Path | None) -> Path:
    settings = load_settings()
    return file or settings.keys_file or settings.data_dir / "keys.json"
