"""What all routes share: errors in the right shape, parsing of bodies, leaving clients, the catalogue of statuses."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from service.errors import BodyTooLarge, ClientClosed, DetotError, InvalidRequest

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

OPENAI_PATHS = ("/v1/chat/", "/v1/models")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(BaseModel):
    """RFC 9457 problem details, the error shape of the native routes."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    param: str | None = None


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """OpenAI's error shape."""

    error: OpenAIErrorBody


def responses(model: type[BaseModel], media: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI descriptions of the error statuses a route may answer with."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {s: {"description": _title(s), "content": {media: {"schema": schema}}} for s in statuses}


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return responses(OpenAIError, "application/json", *statuses)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return responses(Problem, "application/problem+json", *statuses)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, media_type="application/json"
    )


async def body_of(request: Request, model: type[M]) -> M:
    """The request's body as `model`.

    Raises:
        InvalidRequest: naming the field, what is wrong with it, and the value.
        BodyTooLarge: from the body limit.
    """
    raw = await read_body(request)
    try:
        return model.model_validate_json(raw or b"{}")
    except ValidationError as e:
        raise _invalid(e, model) from None


async def read_body(request: Request) -> bytes:
    """The raw body, within the configured limit (a client that lies about its length is cut off as well)."""
    limit: int = request.app.state.settings.limits.body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(f"the body has {length} bytes; the limit is {limit}")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"the body has more than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _invalid(e: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    errors = [(_path(error["loc"], model), error) for error in e.errors(include_url=False, include_context=False)]
    if errors[0][1]["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {errors[0][1]['msg']}")
    # Of a union's branches the one that got furthest, and rather a broken bound than a wrong type, is what was meant.
    path, error = max(errors, key=lambda found: (len(found[0]), not found[1]["type"].endswith("_type")))
    where = ".".join(path)
    return InvalidRequest(f"{where or 'body'}: {error['msg']}, got {_short(error['input'])}", param=where or None)


def _path(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The part of pydantic's location that a client knows: fields and positions, without the branches of unions."""
    known = set(re.findall(r"'([a-z_]+)': \{", str(model.model_json_schema())))
    return [str(part) for part in loc if isinstance(part, int) or part in known]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _allowed(app: FastAPI, request: Request) -> list[str]:
    routes = [r for r in app.routes if isinstance(r, Route) and r.path_regex.match(request.url.path)]
    exact = [r for r in routes if "{" not in r.path.rsplit("/", 1)[-1]] or routes
    return sorted({method for r in exact for method in r.methods or ()})


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it as soon as the client leaves (the body must have been read).

    Raises:
        ClientClosed: the client left first.
    """
    me = asyncio.current_task()
    assert me is not None
    gone = False

    def left(watcher: asyncio.Future[Any]) -> None:
        nonlocal gone
        if not watcher.cancelled():
            gone = True
            me.cancel()

    watcher = asyncio.ensure_future(request.receive())
    watcher.add_done_callback(left)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or me.uncancel() > 0:
            raise
        raise ClientClosed("the client closed the connection") from None
    finally:
        watcher.remove_done_callback(left)
        watcher.cancel()


def error_payload(error: DetotError, path: str) -> tuple[dict[str, Any], str]:
    """Body and media type of an error on this path."""
    if path.startswith(OPENAI_PATHS):
        kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}, (
            "application/json"
        )
    problem = Problem(
        type=f"urn:detot:{error.code}",
        title=_title(error.status),
        status=error.status,
        detail=error.message,
        code=error.code,
        param=error.param,
    )
    return problem.model_dump(), "application/problem+json"


def render(error: DetotError, path: str) -> Response:
    body, media = error_payload(error, path)
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))} if error.retry_after else None
    if error.status == 401:
        headers = {**(headers or {}), "WWW-Authenticate": "Bearer"}
    return Response(orjson.dumps(body), error.status, headers, media_type=media)


def install_handlers(app: FastAPI) -> None:
    """One place where errors become responses."""

    async def known(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, DetotError)
        if exc.status >= 500:
            log.warning("%s %s: %s: %s", request.method, request.url.path, exc.code, exc.message)
        return render(exc, request.url.path)

    async def parameters(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return render(
            InvalidRequest(f"{name}: {first['msg']}, got {_short(first['input'])}", param=name), request.url.path
        )

    async def http(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        error = DetotError(str(exc.detail))
        error.status, error.code = exc.status_code, _title(exc.status_code).lower().replace(" ", "_")
        response = render(error, request.url.path)
        response.headers.update(exc.headers or {})
        if exc.status_code == 405:  # Starlette names the methods of the first route alone
            response.headers["Allow"] = ", ".join(_allowed(app, request))
        return response

    async def unknown(request: Request, exc: Exception) -> Response:
        log.exception("unexpected error in %s %s", request.method, request.url.path, exc_info=exc)
        return render(DetotError("an unexpected error; the log has the details"), request.url.path)

    app.add_exception_handler(DetotError, known)
    app.add_exception_handler(RequestValidationError, parameters)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)


def _title(status: int) -> str:
    from http import HTTPStatus

    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
