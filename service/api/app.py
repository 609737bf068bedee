"""The application: routes, error handlers, OpenAPI description, and the server loop of an API process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import __version__
from service.api import canaries, native, offsets, openai
from service.api.auth import Keyring
from service.api.http import OpenAIError, Problem, install_handlers, json_response, problems
from service.api.schemas import (
    ChatRequest,
    ClassifyRequest,
    FeedbackRequest,
    FreezeRequest,
    PinRequest,
    ReasonRequest,
    RollbackRequest,
)
from service.errors import ConfigError, DetotError
from service.metrics import REGISTRY
from service.settings import Settings
from service.wiring import Runtime, open_runtime

log = logging.getLogger(__name__)

_SCHEMAS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    FeedbackRequest,
    ClassifyRequest,
    RollbackRequest,
    FreezeRequest,
    PinRequest,
    ReasonRequest,
    OpenAIError,
    Problem,
)


def open_keyring(settings: Settings) -> Keyring:
    """The keys that requests are checked against.

    Raises:
        ConfigError: it would listen beyond loopback without keys, or the keys file is malformed.
    """
    if settings.keys_file is None and not settings.loopback:
        raise ConfigError(
            f"DETOT_HOST={settings.host!r} is reachable from other machines, and there are no keys: "
            "make one with `detot keys add NAME` and set DETOT_KEYS_FILE, or listen on 127.0.0.1"
        )
    return Keyring(settings.keys_file, settings.limits.rate)


def create_app(settings: Settings, keyring: Keyring, runtime: Runtime) -> FastAPI:
    """The ASGI application on an open runtime."""
    app = FastAPI(title="DETOT", version=__version__, summary="Inference-time prompting service")
    app.state.settings, app.state.keyring, app.state.runtime = settings, keyring, runtime
    install_handlers(app)
    for router in (openai.router, native.feedback_router, native.call, native.admin):
        app.include_router(router)
    for router in (offsets.call, offsets.admin, canaries.admin):
        app.include_router(router)
    _add_operations(app)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _add_operations(app: FastAPI) -> None:
    @app.get("/health/live", tags=["operations"])
    async def live() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/health/ready", tags=["operations"], responses=problems(503))
    async def ready(request: Request) -> dict[str, Any]:
        """Requests can be answered. Redis being away does not change that; it is reported."""
        runtime: Runtime = request.app.state.runtime
        await runtime.engine.health()
        try:
            await runtime.store.ping()
            store = "ok"
        except DetotError as e:
            store = e.message
        return {"status": "ready", "model": runtime.engine.model.id, "store": store} | {
            "snapshot_age_s": round(runtime.live.age, 3)
        }

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        encode, media = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), headers={"Content-Type": media})

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        runtime: Runtime = request.app.state.runtime
        return json_response(
            {"service": "detot", "version": __version__, "model": runtime.engine.model.id, "docs": "/docs"}
        )


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description. Bodies are parsed by the routes themselves, so their schemas are added here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, schemas = models_json_schema(
            [(m, "validation") for m in _SCHEMAS], ref_template="#/components/schemas/{model}"
        )
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas["$defs"])
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None) if "problem+json" not in str(
                    operation["responses"].get("422")
                ) else None
        app.openapi_schema = document
    return app.openapi_schema


def serve_api(settings: Settings) -> None:
    """Run one API process until SIGTERM or SIGINT: stop accepting, finish what runs, write outcomes, exit.

    Raises:
        ConfigError, InvalidCatalogue, ModelError: what to mend; nothing was served.
    """
    keyring = open_keyring(settings)
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))  # before the model is loaded: a taken port shows at once
        except OSError as e:
            raise ConfigError(f"cannot listen on {settings.host} port {settings.port}: {e.strerror or e}") from e
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, keyring, listener))


async def _serve(settings: Settings, keyring: Keyring, listener: socket.socket) -> None:
    async with open_runtime(settings) as runtime:
        config = uvicorn.Config(
            create_app(settings, keyring, runtime),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=int(settings.limits.drain),
            server_header=False,
            date_header=False,
        )
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at again
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done; we go on to close
            signal.signal(number, lambda *_: None)
        log.info("model %s is loaded; tasks: %s", runtime.engine.model.id, ", ".join(runtime.catalogue.tasks))
        await uvicorn.Server(config).serve([listener])
