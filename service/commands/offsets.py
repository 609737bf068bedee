"""Subcommands on the offsets of a running service: what is served, artifacts in and out, and an operator's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from service.commands.common import KeyOption, TaskName, Url, client, figures, out
from service.errors import InvalidRequest

offsets_app = typer.Typer(help="Published offsets of a running service.", no_args_is_help=True)
canaries_app = typer.Typer(help="Labelled canaries of a task: questions with known answers, for the gate alone.")

As = Annotated[str, typer.Option("--as", help="champion or challenger")]
Share = Annotated[float | None, typer.Option(help="a challenger's share of the requests off the control arm")]
Reason = Annotated[str, typer.Option(help="for the record")]
VersionArgument = Annotated[int, typer.Argument(min=0, help="version; 0 is the zero offset")]


@offsets_app.command("list")
def offsets_list(task: TaskName, url: Url = None, key: KeyOption = None) -> None:
    """Champion, challenger, and every decision about them, newest first."""
    out.print_json(data=client(url, key).json("GET", f"/v1/tasks/{task}/offsets"))


@offsets_app.command("get")
def offsets_get(
    task: TaskName,
    file: Annotated[Path, typer.Argument(help="where to write the artifact")],
    version: Annotated[int, typer.Option(help="version; 0 is the zero offset")] = 0,
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Download the artifact of a version."""
    file.write_bytes(client(url, key).data(f"/v1/tasks/{task}/offsets/{version}"))


@offsets_app.command("new")
def offsets_new(
    task: TaskName,
    file: Annotated[Path, typer.Argument(help="where to write the artifact")],
    noise: Annotated[
        float, typer.Option(min=0, max=4, help="Gaussian noise, in units of the anchor embeddings' RMS")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Make an artifact for the served model: the zero offset, or noise to see an offset act."""
    from dataclasses import replace

    from service.core.artifact import decode, encode

    zero = decode(client(url, key).data(f"/v1/tasks/{task}/offsets/0"))
    scale = noise * float(np.sqrt(np.mean(np.square(zero.anchor))))
    offset = np.random.default_rng(seed).normal(0.0, 1.0, zero.offset.shape).astype(np.float32) * np.float32(scale)
    settings = {"noise": noise, "seed": seed}
    file.write_bytes(encode(replace(zero, offset=offset, refiner="by hand", settings=settings)))


@offsets_app.command("put")
def offsets_put(
    task: TaskName,
    file: Annotated[Path, typer.Argument(help="artifact (safetensors)")],
    role: As = "champion",
    share: Share = None,
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Publish an artifact as the task's champion or challenger; it is checked first, and refused with the reason."""
    figures(_publish(task, _read(file), role, share, url, key))


@offsets_app.command("rollback")
def offsets_rollback(
    task: TaskName,
    to: Annotated[int | None, typer.Option(help="version to go back to; default: undo the last publish")] = None,
    reason: Annotated[str, typer.Option()] = "",
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Point back at an earlier version."""
    figures(client(url, key).json("POST", f"/v1/tasks/{task}/offsets/rollback", json={"to": to, "reason": reason}))


@offsets_app.command("freeze")
def offsets_freeze(
    task: TaskName, reason: Annotated[str, typer.Option()] = "", url: Url = None, key: KeyOption = None
) -> None:
    """Stop refinement of a task."""
    _freeze(task, True, reason, url, key)


@offsets_app.command("unfreeze")
def offsets_unfreeze(
    task: TaskName, reason: Annotated[str, typer.Option()] = "", url: Url = None, key: KeyOption = None
) -> None:
    """Let refinement of a task go on."""
    _freeze(task, False, reason, url, key)


def _freeze(task: str, frozen: bool, reason: str, url: str | None, key: str | None) -> None:
    body = {"frozen": frozen, "reason": reason}
    figures(client(url, key).json("POST", f"/v1/tasks/{task}/offsets/freeze", json=body))


@offsets_app.command("promote")
def offsets_promote(task: TaskName, reason: Reason = "", url: Url = None, key: KeyOption = None) -> None:
    """Make the challenger the champion."""
    _step(task, "promote", {"reason": reason}, url, key)


@offsets_app.command("withdraw")
def offsets_withdraw(task: TaskName, reason: Reason = "", url: Url = None, key: KeyOption = None) -> None:
    """Take the challenger out of service."""
    _step(task, "withdraw", {"reason": reason}, url, key)


@offsets_app.command("pin")
def offsets_pin(
    task: TaskName,
    version: Annotated[int | None, typer.Option(min=0, help="version to hold; default: the champion")] = None,
    reason: Reason = "",
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Hold a version as champion: nothing automatic moves it."""
    _step(task, "pin", {"version": version, "reason": reason}, url, key)


@offsets_app.command("unpin")
def offsets_unpin(task: TaskName, reason: Reason = "", url: Url = None, key: KeyOption = None) -> None:
    """Let refinement move the champion again."""
    _step(task, "unpin", {"reason": reason}, url, key)


@offsets_app.command("show")
def offsets_show(
    task: TaskName,
    version: VersionArgument,
    json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Explain a version: its rows, the tokens nearest to them, what changed, the evidence and the cost."""
    found = client(url, key).json("GET", f"/v1/tasks/{task}/offsets/{version}/explain")
    if json:
        out.print_json(data=found)
        return
    table = Table("token", "norm", "/ anchor", "cosine", "change", "nearest to anchor + offset", "nearest to offset")
    for row in found["rows"]:
        figures_of = [_number(row[name]) for name in ("norm", "ratio", "cosine", "change")]
        table.add_row(repr(row["token"]), *figures_of, _tokens(row["soft"]), _tokens(row["offset"]))
    out.print(table)
    for name in ("anchor", "refiner", "created", "settings", "change", "evidence", "cost"):
        out.print(f"{name}: {found[name]}", markup=False, highlight=False, soft_wrap=True)


@offsets_app.command("export")
def offsets_export(
    task: TaskName,
    version: VersionArgument,
    folder: Annotated[Path, typer.Argument(help="made if need be")],
    format: Annotated[str, typer.Option(help="peft: a PROMPT_TUNING adapter")] = "peft",
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Write a version's soft prompt for other tools."""
    from service.core.artifact import decode
    from service.core.peft import CONFIG, WEIGHTS, to_peft

    if format != "peft":
        raise InvalidRequest(f"format {format!r}; there is 'peft', and `detot offsets get` for the artifact itself")
    config, weights = to_peft(decode(client(url, key).data(f"/v1/tasks/{task}/offsets/{version}")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
    except OSError as e:
        raise InvalidRequest(f"{e.filename or folder}: {e.strerror}") from e
    figures({"task": task, "version": version, "folder": str(folder)})


@offsets_app.command("import")
def offsets_import(
    task: TaskName,
    folder: Annotated[Path, typer.Argument(help="PROMPT_TUNING adapter of the peft library")],
    role: As = "champion",
    share: Share = None,
    anchor_of: Annotated[int, typer.Option(min=0, help="version whose anchor it stands on; 0: the task's own")] = 0,
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Publish an adapter's prompt embeddings: the offset is what they differ from the anchor's by."""
    from service.core.artifact import decode, encode
    from service.core.peft import CONFIG, WEIGHTS, from_peft

    base = decode(client(url, key).data(f"/v1/tasks/{task}/offsets/{anchor_of}"))
    made = from_peft(_read(folder / CONFIG), _read(folder / WEIGHTS), base)
    figures(_publish(task, encode(made), role, share, url, key))


# --- canaries -------------------------------------------------------------------------------------------------------


@canaries_app.command("put")
def canaries_put(
    task: TaskName,
    file: Annotated[Path, typer.Argument(help="JSON lines with question and answer")],
    url: Url = None,
    key: KeyOption = None,
) -> None:
    """Replace a task's labelled canaries; a mistake names line, field and value."""
    headers = {"Content-Type": "text/plain"}
    figures(client(url, key).json("PUT", f"/v1/tasks/{task}/canaries", content=_read(file), headers=headers))


@canaries_app.command("show")
def canaries_show(task: TaskName, url: Url = None, key: KeyOption = None) -> None:
    """A task's labelled canaries."""
    out.print_json(data=client(url, key).json("GET", f"/v1/tasks/{task}/canaries"))


@canaries_app.command("remove")
def canaries_remove(task: TaskName, url: Url = None, key: KeyOption = None) -> None:
    """Remove a task's labelled canaries."""
    client(url, key).json("DELETE", f"/v1/tasks/{task}/canaries")


def _publish(task: str, blob: bytes, role: str, share: float | None, url: str | None, key: str | None) -> Any:
    headers = {"Content-Type": "application/octet-stream"}
    params = {"as": role} | ({} if share is None else {"share": share})
    return client(url, key).json("POST", f"/v1/tasks/{task}/offsets", content=blob, headers=headers, params=params)


def _step(task: str, step: str, body: dict[str, Any], url: str | None, key: str | None) -> None:
    figures(client(url, key).json("POST", f"/v1/tasks/{task}/offsets/{step}", json=body))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise InvalidRequest(f"{file}: {e.strerror}") from e


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _tokens(found: list[dict[str, Any]]) -> str:
    return "  ".join(f"{near['token']!r} {near['cosine']:.2f}" for near in found[:3])
