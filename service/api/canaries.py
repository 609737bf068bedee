"""Routes of the labelled canaries that users give for a task, and the check of what they give."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.common import READ, WRITE, Admin, TaskPath, find_task, raw_body, runtime_of
from service.api.http import read_body
from service.errors import InvalidRequest, NotFound
from service.tasks.canaries import read_canaries
from service.tasks.catalogue import Task

admin = APIRouter(tags=["canaries"])

MAX_ITEMS = 10_000


@admin.put(
    "/v1/tasks/{task}/canaries",
    responses=WRITE,
    openapi_extra=raw_body(
        "text/plain",
        {"type": "string", "example": '{"question": "Is 7 larger than 3?", "answer": "yes"}\n'},
    ),
)
async def put_canaries(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """Replace the task's labelled canaries: JSON lines with `question` and `answer`; an `id` is made from the question.

    The gate asks them of champion and challenger; nothing ever learns from them.
    """
    runtime = runtime_of(request)
    task = find_task(runtime, name)
    items = await asyncio.to_thread(read_body_lines, await read_body(request), task)
    await runtime.store.canaries.put(name, items)
    return {"task": name, "count": len(items)}


@admin.get("/v1/tasks/{task}/canaries", responses=READ)
async def get_canaries(request: Request, name: TaskPath, key: Admin) -> dict[str, Any]:
    """The task's labelled canaries, in the order given."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    items = await runtime.store.canaries.get(name)
    return {"task": name, "count": len(items), "canaries": items}


@admin.delete("/v1/tasks/{task}/canaries", status_code=204, responses=READ)
async def delete_canaries(request: Request, name: TaskPath, key: Admin) -> Response:
    """Remove the task's labelled canaries."""
    runtime = runtime_of(request)
    find_task(runtime, name)
    if not await runtime.store.canaries.delete(name):
        raise NotFound(f"task {name!r} has no labelled canaries")
    return Response(status_code=204)


def read_body_lines(body: bytes, task: Task) -> list[dict[str, str]]:
    """The canaries of a request body, each `{"id", "question", "answer"}`.

    Raises:
        InvalidRequest: names line, field, value and bound.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"body, line {body.count(10, 0, e.start) + 1}: not UTF-8 text") from None
    found = read_canaries(text, {task.id: task.answer}, "body", task.id)
    if not 1 <= len(found) <= MAX_ITEMS:
        raise InvalidRequest(f"{len(found)} canaries; from 1 to {MAX_ITEMS} can be kept (DELETE removes them)")
    return [{"id": item.id, "question": item.question, "answer": item.answer} for item in found]
