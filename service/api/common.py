"""What the native routes share: parameters, documented statuses, and a task's state as they show it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Request

from service.api.auth import Key, Require, Scope
from service.api.http import problems
from service.core.types import Head
from service.errors import UnknownTask
from service.tasks.catalogue import Task
from service.wiring import Runtime

Admin = Annotated[Key, Depends(Require(Scope.ADMIN))]
TaskPath = Annotated[str, Path(alias="task", max_length=64, description="id of a task")]
READ = problems(400, 401, 403, 404, 429, 503)
WRITE = problems(400, 401, 403, 404, 409, 413, 422, 429, 503)


def json_body(model: str) -> dict[str, Any]:
    """OpenAPI description of a body that a route parses itself."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def raw_body(media: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The same for a body that is no JSON document."""
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def runtime_of(request: Request) -> Runtime:
    return request.app.state.runtime


def find_task(runtime: Runtime, name: str) -> Task:
    """The task of that id. Raises UnknownTask."""
    task = runtime.live.snapshot.catalogue.tasks.get(name)
    if task is None:
        raise UnknownTask(f"there is no task {name!r}; known: {', '.join(runtime.live.snapshot.catalogue.tasks)}")
    return task


def state(runtime: Runtime, name: str) -> dict[str, Any]:
    """Which versions of a task are served here, and the head in Redis that says so.

    `version` is the champion as served, `published` the head's; they differ while the latter is refused. `challenger`
    is the head's, null for none, with its `share` of the requests off the control arm.
    """
    snapshot = runtime.live.snapshot
    head, served = snapshot.heads.get(name, Head()), snapshot.champions.get(name)
    return {
        "version": served.version if served else 0,
        "published": head.version,
        "challenger": head.challenger or None,
        "share": head.share,
        "epoch": head.epoch,
        "pinned": head.pinned,
        "frozen": head.frozen,
        "reason": head.reason,
        "refused": snapshot.refused.get(name),
    }
