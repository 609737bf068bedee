"""The `detot` command: one function a subcommand. Errors are one line on stderr; wrong settings exit with 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from service import __version__
from service.commands import manage, measure, offsets
from service.commands.common import err, figures, out, pull_model
from service.errors import ConfigError, DetotError, InvalidCatalogue, InvalidRequest
from service.settings import Settings, load_settings

app = typer.Typer(
    name="detot",
    help="Inference-time prompting service: classified, voted, recorded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for sub, name in (
    (manage.models_app, "models"),
    (manage.tasks_app, "tasks"),
    (offsets.offsets_app, "offsets"),
    (offsets.canaries_app, "canaries"),
    (manage.keys_app, "keys"),
    (measure.bench_app, "bench"),
):
    app.add_typer(sub, name=name)
app.command("eval")(measure.evaluate)


def main() -> None:
    """Entry point: maps our errors to one line and an exit code (2 for settings and input, 1 for the rest)."""
    try:
        app()
    except DetotError as e:
        err.print(f"detot: {e.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        if sys.argv[1:2] in (["eval"], ["bench"]):  # their last line is JSON, come what may
            figures({"error": e.message, "code": e.code})
        sys.exit(2 if isinstance(e, (ConfigError, InvalidCatalogue, InvalidRequest)) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


# --- processes ------------------------------------------------------------------------------------------------------

Host = Annotated[str | None, typer.Option(help="address to listen on")]
Port = Annotated[int | None, typer.Option(help="port to listen on")]
EngineOption = Annotated[str | None, typer.Option(help="local, vllm, vllm-server or scripted")]
ModelOption = Annotated[str | None, typer.Option(help="known model, Hugging Face id or local folder")]
Upstream = Annotated[
    list[str] | None, typer.Option("--upstream", help="http://host:port of a vLLM server; may be given several times")
]


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    engine: EngineOption = None,
    model: ModelOption = None,
    upstream: Upstream = None,
    die_with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run everything: embedded Valkey (unless DETOT_REDIS__URL is set), API and worker."""
    from service.processes import bind_to_parent
    from service.supervise import supervise

    if die_with_parent:
        bind_to_parent(signal.SIGTERM, os.getppid())
    settings = load_settings(host=host, port=port, engine=engine, model=model, upstream=_urls(upstream))
    _logging(settings)
    if settings.engine != "scripted":
        pull_model(settings.model, settings)
    raise typer.Exit(supervise(settings))


@app.command()
def api(
    host: Host = None,
    port: Port = None,
    engine: EngineOption = None,
    model: ModelOption = None,
    upstream: Upstream = None,
) -> None:
    """Run one API process against the Redis in DETOT_REDIS__URL."""
    from service.api.app import serve_api

    settings = load_settings(host=host, port=port, engine=engine, model=model, upstream=_urls(upstream))
    _logging(settings)
    serve_api(settings)


@app.command()
def worker(
    burst: Annotated[bool, typer.Option(help="read what is there, then exit")] = False,
) -> None:
    """Run one worker process against the Redis in DETOT_REDIS__URL."""
    from service.work import serve_worker

    settings = load_settings()
    _logging(settings)
    read = serve_worker(settings, burst=burst)
    if burst:
        figures(read)


def _urls(upstream: list[str] | None) -> dict[str, str] | None:
    return {"urls": ",".join(upstream)} if upstream else None


def _logging(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for noisy in ("httpx", "httpcore", "uvicorn.error", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
