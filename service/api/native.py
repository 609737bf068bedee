"""The service's own routes: feedback, classification, tasks and their offsets. Errors are problem+json."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Path, Query, Request, Response

from service import metrics
from service.api.auth import Key, Require, Scope
from service.api.http import body_of, problems, read_body
from service.api.schemas import ClassifyRequest, FeedbackRequest, FreezeRequest, RollbackRequest
from service.core.artifact import Artifact, decode, encode, zero_artifact
from service.core.types import Feedback, Head
from service.errors import Conflict, DetotError, InvalidArtifact, InvalidRequest, NotFound, UnknownTask
from service.serve.routing import task_of
from service.tasks.catalogue import Task, parse_task, to_dict
from service.tasks.signals import signals
from service.wiring import Runtime

call = APIRouter(dependencies=[Depends(Require(Scope.CALL))], tags=["tasks"])
feedback_router = APIRouter(dependencies=[Depends(Require(Scope.FEEDBACK))], tags=["feedback"])
admin = APIRouter(tags=["administration"])
Admin = Annotated[Key, Depends(Require(Scope.ADMIN))]

TaskPath = Annotated[str, Path(alias="task", max_length=64, description="id of a task")]
VersionPath = Annotated[str, Path(alias="version", max_length=16, description="version number; 0 is the zero offset")]
_READ = problems(400, 401, 403, 404, 429, 503)
_WRITE = problems(400, 401, 403, 404, 409, 413, 422, 429, 503)
MAX_RUNTIME_TASKS = 200  # bounds the `task` label of the metrics and the classifier's build time


def _json_body(model: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@feedback_router.post(
    "/v1/feedback", responses=problems(400, 401, 403, 404, 413, 429, 503), openapi_extra=_json_body("FeedbackRequest")
)
async def feedback(request: Request) -> dict[str, Any]:
    """Say whether an answer was right. Sending the same again changes nothing; another verdict replaces the first."""
    runtime = _runtime(request)
    body = await body_of(request, FeedbackRequest)
    task = task_of(body.request_id)
    if task is None or task not in runtime.live.snapshot.catalogue.tasks:
        raise NotFound(f"request_id {body.request_id!r} is not the id of an answer given here", param="request_id")
    said = Feedback(body.request_id, task, body.correct, body.answer, body.score)
    duplicate = await _send_feedback(runtime, said)
    metrics.FEEDBACK.labels(task).inc()
    return {"request_id": body.request_id, "task": task, "duplicate": duplicate}


async def _send_feedback(runtime: Runtime, said: Feedback) -> bool:
    """Feedback may overtake its outcome, which is written in batches: look again for a moment before refusing."""
    for _ in range(5):
        try:
            return await runtime.store.outcomes.feedback(said)
        except NotFound:
            await asyncio.sleep(0.1)
    return await runtime.store.outcomes.feedback(said)


@call.post("/v1/classify", responses=problems(400, 401, 403, 413, 429), openapi_extra=_json_body("ClassifyRequest"))
async def classify(request: Request) -> dict[str, Any]:
    """The task of a text, with every task's probability, and the plan that its metadata give it."""
    snapshot = _runtime(request).live.snapshot
    body = await body_of(request, ClassifyRequest)
    seen = await asyncio.to_thread(signals, body.text)
    found = await asyncio.to_thread(snapshot.classifier.classify, body.text, seen)
    plan = snapshot.catalogue.tasks[found.task].plan(seen)
    return {
        "task": found.task,
        "probability": found.probability,
        "rejected": found.rejected,
        "scores": found.scores,
        "signals": asdict(seen),
        "plan": {"anchor": plan.anchor, **asdict(plan.sampling)},
    }


@call.get("/v1/tasks", responses=problems(401, 403, 429))
async def tasks(request: Request) -> dict[str, Any]:
    """All tasks with the version each is served with."""
    snapshot = _runtime(request).live.snapshot
    rows = [
        {
            "id": task.id,
            "description": task.description,
            "answer_type": task.answer.type,
            "version": snapshot.champions[task.id].version if task.id in snapshot.champions else 0,
            "frozen": snapshot.heads.get(task.id, Head()).frozen,
        }
        for task in snapshot.catalogue.tasks.values()
    ]
    return {"tasks": rows}


@call.get("/v1/tasks/{task}", responses=problems(400, 401, 403, 404, 429))
async def task_detail(request: Request, name: TaskPath) -> dict[str, Any]:
    """One task: its definition, its offset and what the worker's monitor says of it."""
    runtime = _runtime(request)
    task = _task(runtime, name)
    return {**to_dict(task), "offset": _state(runtime, name), "monitor": await runtime.monitor(name)}


@admin.post(
    "/v1/tasks",
    status_code=201,
    responses=problems(400, 401, 403, 409, 413, 422, 429, 503),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def register_task(request: Request, key: Admin) -> dict[str, Any]:
    """Add or replace a run-time task; every replica serves it within a second. Tasks from the file stay as they are."""
    runtime = _runtime(request)
    try:
        document = orjson.loads(await read_body(request))
    except orjson.JSONDecodeError as e:
        raise InvalidRequest(f"the body is not valid JSON: {e}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"a task is a JSON object, got {type(document).__name__}")
    task = parse_task(document, source="request body")
    if task.id in runtime.catalogue.tasks:
        raise Conflict(f"task {task.id!r} comes from the catalogue file and cannot be replaced here")
    known = runtime.live.snapshot.catalogue.tasks
    if task.id not in known and len(known) - len(runtime.catalogue.tasks) >= MAX_RUNTIME_TASKS:
        raise Conflict(f"there are {MAX_RUNTIME_TASKS} run-time tasks, and no more are allowed; delete one first")
    await runtime.store.tasks.register(task.id, document)
    await runtime.live.refresh()
    return to_dict(task)


@admin.delete("/v1/tasks/{task}", status_code=204, responses=problems(400, 401, 403, 404, 409, 429, 503))
async def delete_task(request: Request, name: TaskPath, key: Admin) -> Response:
    """Remove a run-time task. Its outcomes and offsets stay until they expire."""
    runtime = _runtime(request)
    if name in runtime.catalogue.tasks:
        raise Conflict(f"task {name!r} comes from the catalogue file and cannot be deleted here")
    if not await runtime.store.tasks.delete(name):
        raise UnknownTask(f"there is no run-time task {name!r}")
    await runtime.live.refresh()
    return Response(status_code=204)


@admin.get("/v1/tasks/{task}/outcomes", responses=problems(400, 401, 403, 404, 429, 503))
async def outcomes(
    request: Request, name: TaskPath, key: Admin, limit: Annotated[int, Query(ge=1, le=1_000)] = 20
) -> dict[str, Any]:
    """The newest recorded outcomes of a task, newest first."""
    runtime = _runtime(request)
    _task(runtime, name)
    return {"task": name, "outcomes": [asdict(o) for o in await runtime.store.outcomes.read(name, limit)]}


@call.get("/v1/tasks/{task}/offsets", responses=_READ)
async def offsets(request: Request, name: TaskPath) -> dict[str, Any]:
    """The champion, its state, and every decision about it, newest first."""
    runtime = _runtime(request)
    _task(runtime, name)
    return {"task": name, **_state(runtime, name), "history": await runtime.store.offsets.history(name)}


@call.get(
    "/v1/tasks/{task}/offsets/{version}",
    response_class=Response,
    responses={**problems(400, 401, 403, 404, 429, 503), 200: {"content": {"application/octet-stream": {}}}},
)
async def download(request: Request, name: TaskPath, version: VersionPath) -> Response:
    """The artifact of a version. Version 0 is made on the spot: the zero offset on the task's default anchor."""
    runtime = _runtime(request)
    task = _task(runtime, name)
    number = _version(version)
    data = encode(_zero(runtime, task)) if number == 0 else await runtime.store.offsets.get(name, number)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{number}.safetensors"'}
    return Response(data, headers=headers, media_type="application/octet-stream")


@admin.post(
    "/v1/tasks/{task}/offsets",
    status_code=201,
    responses=_WRITE,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_offset(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Publish an offset artifact as the task's new champion, after every check has passed."""
    runtime = _runtime(request)
    _task(runtime, name)
    artifact = decode(await read_body(request))
    if artifact.task != name:
        raise InvalidArtifact(f"the artifact is for task {artifact.task!r}, not {name!r}")
    await asyncio.to_thread(runtime.live.verify, artifact)
    head = (await runtime.store.offsets.heads([name]))[name]
    version = await runtime.store.offsets.next_version(name)
    artifact = replace(artifact, version=version, parent=head.version)
    await runtime.store.offsets.publish(
        name, version, encode(artifact), expect=head, actor=key.name, reason="published by hand"
    )
    await runtime.live.refresh()
    return {"task": name, "parent": head.version, **_state(runtime, name)}


@admin.post("/v1/tasks/{task}/offsets/rollback", responses=_WRITE, openapi_extra=_json_body("RollbackRequest"))
async def rollback(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Point back at an earlier version; without `to`, undo the last publish."""
    runtime = _runtime(request)
    _task(runtime, name)
    body = await body_of(request, RollbackRequest)
    await _check_target(runtime, name, body.to)
    await runtime.store.offsets.rollback(name, body.to, actor=key.name, reason=body.reason)
    await runtime.live.refresh()
    return {"task": name, **_state(runtime, name)}


async def _check_target(runtime: Runtime, name: str, to: int | None) -> None:
    """A version that would be refused must not become the champion. Raises InvalidArtifact with the reason."""
    offsets = runtime.store.offsets
    if to is None and (head := await offsets.head(name)).version:
        with suppress(DetotError):  # a champion that cannot be read is what one wants to leave
            to = decode(await offsets.get(name, head.version)).parent
    if to:
        await asyncio.to_thread(runtime.live.verify, decode(await offsets.get(name, to)))


@admin.post("/v1/tasks/{task}/offsets/freeze", responses=_WRITE, openapi_extra=_json_body("FreezeRequest"))
async def freeze(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Stop (or with `frozen: false` resume) refinement of a task. Serving goes on with the present version."""
    runtime = _runtime(request)
    _task(runtime, name)
    body = await body_of(request, FreezeRequest)
    change = runtime.store.offsets.freeze if body.frozen else runtime.store.offsets.unfreeze
    await change(name, actor=key.name, reason=body.reason)
    await runtime.live.refresh()
    return {"task": name, **_state(runtime, name)}


def _runtime(request: Request) -> Runtime:
    return request.app.state.runtime


def _task(runtime: Runtime, name: str) -> Task:
    task = runtime.live.snapshot.catalogue.tasks.get(name)
    if task is None:
        raise UnknownTask(f"there is no task {name!r}; known: {', '.join(runtime.live.snapshot.catalogue.tasks)}")
    return task


def _version(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"version {text!r} is not a whole number from 0 up", param="version")
    return int(text)


def _zero(runtime: Runtime, task: Task) -> Artifact:
    anchor = task.anchors["default"]
    if not anchor:
        raise NotFound(f"task {task.id!r} has no anchor, so it takes no offset")
    ids = runtime.anchor_ids(anchor)
    return zero_artifact(task.id, runtime.engine.model, anchor, ids, runtime.rows(ids))


def _state(runtime: Runtime, name: str) -> dict[str, Any]:
    snapshot = runtime.live.snapshot
    head, served = snapshot.heads.get(name, Head()), snapshot.champions.get(name)
    return {
        "version": served.version if served else 0,
        "published": head.version,
        "epoch": head.epoch,
        "frozen": head.frozen,
        "reason": head.reason,
        "refused": snapshot.refused.get(name),
    }
