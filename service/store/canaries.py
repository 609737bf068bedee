"""The labelled canaries that users gave for a task: questions with known answers, for the gate alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson
from redis.asyncio import Redis

from service.store import keys
from service.store.functions import reply


class CanaryStore:
    """One set a task, put and read whole. All raise StoreUnavailable; what an item may hold is checked before."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(self, task: str, items: Sequence[Mapping[str, str]]) -> None:
        """Replaces the task's canaries, each `{"id", "question", "answer"}`."""
        await reply(self._redis.set(keys.canaries(task), orjson.dumps(list(items))))

    async def get(self, task: str) -> list[dict[str, str]]:
        """The task's canaries in the order given; none where none were put."""
        body = await reply(self._redis.get(keys.canaries(task)))
        return [] if body is None else orjson.loads(body)

    async def delete(self, task: str) -> bool:
        """Removes them; False if there were none."""
        return bool(await reply(self._redis.delete(keys.canaries(task))))
