"""The service's own routes: feedback, classification, tasks. Errors are problem+json."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from service import metrics
from service.api.auth import Require, Scope
from service.api.common import Admin, TaskPath, find_task, json_body, runtime_of, state
from service.api.http import body_of, problems, read_body
from service.api.schemas import ClassifyRequest, FeedbackRequest
from service.core.types import Feedback, Head
from service.errors import Conflict, InvalidRequest, NotFound, UnknownTask
from service.serve.routing import task_of
from service.tasks.catalogue import parse_task, to_dict
from service.tasks.signals import signals
from service.wiring import Runtime

call = APIRouter(dependencies=[Depends(Require(Scope.CALL))], tags=["tasks"])
feedback_router = APIRouter(dependencies=[Depends(Require(Scope.FEEDBACK))], tags=["feedback"])
admin = APIRouter(tags=["administration"])
MAX_RUNTIME_TASKS = 200  # bounds the `task` label of the metrics and the classifier's build time


@feedback_router.post(
    "/v1/feedback", responses=problems(400, 401, 403, 404, 413, 429, 503), openapi_extra=json_body("FeedbackRequest")
)
async def feedback(request: Request) -> dict[str, Any]:
    """Say whether an answer was right. Sending the same again changes nothing; another verdict replaces the first."""
    runtime = runtime_of(request)
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


@call.post("/v1/classify", responses=problems(400, 401, 403, 413, 429), openapi_extra=json_body("ClassifyRequest"))
async def classify(request: Request) -> dict[str, Any]:
    """The task of a text, with every task's probability, and the plan that its metadata give it."""
    snapshot = runtime_of(request).live.snapshot
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
    snapshot = runtime_of(request).live.snapshot
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
    runtime = runtime_of(request)
    task = find_task(runtime, name)
    return {**to_dict(task), "offset": state(runtime, name), "monitor": await runtime.monitor(name)}


@admin.post(
    "/v1/tasks",
    status_code=201,
    responses=problems(400, 401, 403, 409, 413, 422, 429, 503),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def register_task(request: Request, key: Admin) -> dict[str, Any]:
    """Add or replace a run-time task; every replica serves it within a second. Tasks from the file stay as they are."""
    runtime = runtime_of(request)
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
    runtime = runtime_of(request)
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
    runtime = runtime_of(request)
    find_task(runtime, name)
    return {"task": name, "outcomes": [asdict(o) for o in await runtime.store.outcomes.read(name, limit)]}
