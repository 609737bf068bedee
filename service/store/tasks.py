"""Tasks registered at run time: one hash, seen by every API replica and the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from service.store import keys
from service.store.functions import redis_errors, reply


class TaskStore:
    """Stores task definitions as JSON objects; their meaning is the catalogue's. All raise StoreUnavailable.

    Each change raises the revision and sends the notice `{"kind": "tasks", "task": ...}`.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def register(self, task: str, definition: Mapping[str, Any]) -> int:
        """Adds or replaces a task; the new revision."""
        body = orjson.dumps(definition)
        return (await self._change(task, lambda pipe: pipe.hset(keys.TASKS, task, body)))[1]

    async def delete(self, task: str) -> bool:
        """Removes a task; False if it was not there. Its outcomes and offsets stay."""
        return bool((await self._change(task, lambda pipe: pipe.hdel(keys.TASKS, task)))[0])

    async def list(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The revision (0 before the first change) and all definitions by id."""
        found = await reply(self._redis.hgetall(keys.TASKS))
        revision = int(found.pop(keys.REVISION.encode(), 0))
        return revision, {task.decode(): orjson.loads(body) for task, body in sorted(found.items())}

    async def revision(self) -> int:
        """Cheap to poll."""
        return int(await reply(self._redis.hget(keys.TASKS, keys.REVISION)) or 0)

    async def _change(self, task: str, command: Callable[[Pipeline], Any]) -> tuple[int, int]:
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                command(pipe)
                pipe.hincrby(keys.TASKS, keys.REVISION, 1)
                pipe.publish(keys.NOTICES, orjson.dumps({"kind": "tasks", "task": task}))
                changed, revision, _ = await pipe.execute()
        return int(changed), int(revision)
