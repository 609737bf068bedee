"""Routes of a task's offsets: what is served and why, artifacts in and out, and every step an operator may take."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from service.api.auth import Require, Scope
from service.api.common import READ, WRITE, Admin, TaskPath, find_task, json_body, raw_body, runtime_of, state
from service.api.http import body_of, problems, read_body
from service.api.schemas import FreezeRequest, PinRequest, ReasonRequest, RollbackRequest
from service.core.artifact import Artifact, decode, encode, zero_artifact
from service.core.types import ROLLOUT
from service.errors import Conflict, DetotError, InvalidArtifact, InvalidRequest, NotFound
from service.tasks.catalogue import Task
from service.wiring import Runtime

call = APIRouter(dependencies=[Depends(Require(Scope.CALL))], tags=["offsets"])
admin = APIRouter(tags=["offsets"])

VersionPath = Annotated[str, Path(alias="version", max_length=16, description="version number; 0 is the zero offset")]
As = Annotated[Literal["champion", "challenger"], Query(alias="as", description="what it is published as")]
Share = Annotated[
    float | None,
    Query(gt=0, lt=1, description=f"a challenger's share of the requests off the control arm; default {ROLLOUT[0]}"),
]


@call.get("/v1/tasks/{task}/offsets", responses=READ)
async def offsets(request: Request, name: TaskPath) -> dict[str, Any]:
    """Champion, challenger and its share, whether pinned or frozen, and every decision, newest first."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    return {"task": name, **state(runtime, name), "history": await runtime.store.offsets.history(name)}


@call.get(
    "/v1/tasks/{task}/offsets/{version}",
    response_class=Response,
    responses={**READ, 200: {"content": {"application/octet-stream": {}}}},
)
async def download(request: Request, name: TaskPath, version: VersionPath) -> Response:
    """The artifact of a version. Version 0 is made on the spot: the zero offset on the task's default anchor."""
    runtime = runtime_of(request)
    task = find_task(runtime, name)
    number = _version(version)
    data = encode(_zero(runtime, task)) if number == 0 else await runtime.store.offsets.get(name, number)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{number}.safetensors"'}
    return Response(data, headers=headers, media_type="application/octet-stream")


@call.get("/v1/tasks/{task}/offsets/{version}/explain", responses={**READ, **problems(422)})
async def explain(request: Request, name: TaskPath, version: VersionPath) -> dict[str, Any]:
    """A version's rows beside the anchor's, the tokens nearest to them, what changed, the evidence and the cost."""
    runtime = runtime_of(request)
    task = find_task(runtime, name)
    number = _version(version)
    artifact = _zero(runtime, task) if number == 0 else decode(await runtime.store.offsets.get(name, number))
    await asyncio.to_thread(runtime.live.verify, artifact)
    return await runtime.explainer.explain(artifact)


@admin.post(
    "/v1/tasks/{task}/offsets",
    status_code=201,
    responses=WRITE,
    openapi_extra=raw_body("application/octet-stream", {"type": "string", "format": "binary"}),
)
async def put_offset(
    request: Request, name: TaskPath, key: Admin, role: As = "champion", share: Share = None
) -> dict[str, Any]:
    """Publish an offset artifact as the task's champion, or as its challenger, after every check has passed."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    if share is not None and role == "champion":
        raise InvalidRequest(f"share={share} goes with as=challenger; a champion has no share", param="share")
    artifact = decode(await read_body(request))
    if artifact.task != name:
        raise InvalidArtifact(f"the artifact is for task {artifact.task!r}, not {name!r}")
    await asyncio.to_thread(runtime.live.verify, artifact)
    store = runtime.store.offsets
    head = await store.head(name)
    version = await store.next_version(name)
    blob = encode(replace(artifact, version=version, parent=head.version))
    if role == "champion":
        await store.publish(name, version, blob, expect=head, actor=key.name, reason="published by hand")
    else:
        share = share or ROLLOUT[0]
        await store.propose(name, version, blob, share=share, expect=head, actor=key.name, reason="proposed by hand")
    return {"parent": head.version, **await _now(runtime, name)}


@admin.post("/v1/tasks/{task}/offsets/promote", responses=WRITE, openapi_extra=json_body("ReasonRequest"))
async def promote(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Make the challenger the champion."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, ReasonRequest)
    head = await runtime.store.offsets.head(name)
    if not head.challenger:
        raise Conflict(f"task {name!r} has no challenger")
    await _check_target(runtime, name, head.challenger)
    await runtime.store.offsets.promote(name, expect=head, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


@admin.post("/v1/tasks/{task}/offsets/withdraw", responses=WRITE, openapi_extra=json_body("ReasonRequest"))
async def withdraw(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Take the challenger out of service; the champion serves its requests again."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, ReasonRequest)
    await runtime.store.offsets.withdraw(name, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


@admin.post("/v1/tasks/{task}/offsets/rollback", responses=WRITE, openapi_extra=json_body("RollbackRequest"))
async def rollback(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Point back at an earlier version; without `to`, undo the last one. A running challenger is withdrawn."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, RollbackRequest)
    await _check_target(runtime, name, await _parent(runtime, name) if body.to is None else body.to)
    await runtime.store.offsets.rollback(name, body.to, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


@admin.post("/v1/tasks/{task}/offsets/pin", responses=WRITE, openapi_extra=json_body("PinRequest"))
async def pin(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Hold a version as champion: nothing automatic moves it. A running challenger is withdrawn."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, PinRequest)
    if body.version:
        await _check_target(runtime, name, body.version)
    await runtime.store.offsets.pin(name, body.version, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


@admin.post("/v1/tasks/{task}/offsets/unpin", responses=WRITE, openapi_extra=json_body("ReasonRequest"))
async def unpin(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Let refinement move the champion again."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, ReasonRequest)
    await runtime.store.offsets.unpin(name, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


@admin.post("/v1/tasks/{task}/offsets/freeze", responses=WRITE, openapi_extra=json_body("FreezeRequest"))
async def freeze(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Stop (or with `frozen: false` resume) refinement of a task. Serving goes on with the present versions."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    body = await body_of(request, FreezeRequest)
    change = runtime.store.offsets.freeze if body.frozen else runtime.store.offsets.unfreeze
    await change(name, actor=key.name, reason=body.reason)
    return await _now(runtime, name)


async def _now(runtime: Runtime, name: str) -> dict[str, Any]:
    """The task's state, just read from Redis."""
    await runtime.live.refresh()
    return {"task": name, **state(runtime, name)}


async def _parent(runtime: Runtime, name: str) -> int:
    """The version that a rollback without a target goes to, 0 where it cannot be read."""
    head = await runtime.store.offsets.head(name)
    with suppress(DetotError):  # a champion that cannot be read is what one wants to leave
        return decode(await runtime.store.offsets.get(name, head.version)).parent if head.version else 0
    return 0


async def _check_target(runtime: Runtime, name: str, to: int) -> None:
    """A version that would be refused must not become the champion. Raises InvalidArtifact with the reason."""
    if to:
        await asyncio.to_thread(runtime.live.verify, decode(await runtime.store.offsets.get(name, to)))


def _version(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"version {text!r} is not a whole number from 0 up", param="version")
    return int(text)


def _zero(runtime: Runtime, task: Task) -> Artifact:
    anchor = task.anchors["default"]
    if not anchor:
        raise NotFound(f"task {task.id!r} has no anchor, so it takes no offset")
    ids = runtime.anchor_ids(anchor)
    return zero_artifact(task.id, runtime.engine.model, anchor, ids, runtime.table.rows(ids))
