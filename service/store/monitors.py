"""The worker's side of the outcome streams: a consumer group per task, checkpoints, and what the worker publishes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from service.core.types import Outcome
from service.store import keys
from service.store.codec import decode_outcome
from service.store.functions import call, redis_errors, reply
from service.store.lease import MONITOR

Entry = tuple[str, dict[bytes, bytes]]


class MonitorStore:
    """Reads outcome streams at least once and saves the reader's state exactly once. All raise StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def open(self, task: str) -> None:
        """Makes the consumer group, from the oldest entry on; harmless when it is there."""
        with redis_errors():
            try:
                await self._redis.xgroup_create(keys.outcomes(task), keys.GROUP, id="0", mkstream=True)
            except ResponseError as e:
                if not str(e).startswith("BUSYGROUP"):
                    raise

    async def read(self, task: str, consumer: str, count: int) -> list[Entry]:
        """New entries in order, at most `count`; they stay pending until a checkpoint acknowledges them."""
        found = await reply(self._redis.xreadgroup(keys.GROUP, consumer, {keys.outcomes(task): ">"}, count=count))
        streams = found.values() if isinstance(found, Mapping) else [entries for _, entries in found or []]
        return [_entry(raw) for entries in streams for raw in _flat(entries)]

    async def reclaim(self, task: str, consumer: str) -> tuple[Entry | None, int] | None:
        """Takes over the oldest entry that was delivered and not acknowledged, and says how often it was delivered.

        One at a time, so that an entry which kills its reader uses up only its own deliveries. Returns None when
        nothing is pending; the entry is None if it has left the stream meanwhile.
        """
        stream = keys.outcomes(task)
        pending = await reply(self._redis.xpending_range(stream, keys.GROUP, "-", "+", 1))
        if not pending:
            return None
        claimed = await reply(self._redis.xautoclaim(stream, keys.GROUP, consumer, 0, start_id="0", count=1))
        entries = [raw for raw in claimed[1] if raw[0] is not None]
        return _entry(entries[0]) if entries else None, int(pending[0]["times_delivered"])

    async def checkpoint(
        self,
        task: str,
        state: Mapping[str, Any],
        *,
        token: int,
        ttl: float,
        done: Sequence[str],
        dead: Mapping[str, str] | None = None,
    ) -> None:
        """Saves the state, acknowledges entries and moves dead ones aside, in one step; extends the lease to `ttl` s.

        Args:
            token: fencing token of the task's monitor lease.
            done: all entries that `state` accounts for, dead ones included.
            dead: entry -> reason why it cannot be used.

        Raises:
            Conflict: the lease was lost; nothing was changed.
        """
        names = [keys.outcomes(task), keys.monitor(task), keys.lease(task, MONITOR), keys.dead(task)]
        letters = [part for pair in (dead or {}).items() for part in pair]
        body = orjson.dumps(state)
        fixed = [token, round(ttl * 1000), keys.GROUP, body, keys.DEAD_LETTERS, len(letters) // 2]
        await call(self._redis, "checkpoint", names, [*fixed, *letters, *done])

    async def load(self, task: str) -> dict[str, Any] | None:
        """The last checkpoint's state, None before the first."""
        body = await reply(self._redis.get(keys.monitor(task)))
        return None if body is None else orjson.loads(body)

    async def read_monitor(self, task: str) -> dict[str, Any] | None:
        """What the worker last published for a task, and `lag`: the entries it has not accounted for by now.

        None before the worker's first checkpoint. See `refine.monitor.publish` for the fields.
        """
        published = await self.load(task)
        if published is None:
            return None
        published.pop("state", None)
        return {**published, "lag": await self.backlog(task)}

    async def backlog(self, task: str) -> int:
        """Entries that no checkpoint accounts for yet: not read, or read and not acknowledged."""
        stream = keys.outcomes(task)
        with redis_errors():
            try:
                groups: Any = await self._redis.xinfo_groups(stream)
            except ResponseError as e:
                if "no such key" in str(e):
                    return 0
                raise
        group = next((g for g in groups if g["name"] == keys.GROUP.encode()), None)
        if group is None:
            return int(await reply(self._redis.xlen(stream)))
        unread = group["lag"]
        if unread is None:  # Redis cannot tell after some deletions: count
            unread = len(await reply(self._redis.xrange(stream, b"(" + group["last-delivered-id"])))
        return int(unread) + int(group["pending"])

    async def outcomes(self, task: str, entries: Iterable[str]) -> dict[str, Outcome]:
        """Outcomes by entry, in one round trip; missing and unreadable ones are left out."""
        names = list(entries)
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for entry in names:
                    pipe.xrange(keys.outcomes(task), entry, entry)
                rows = await pipe.execute(raise_on_error=False)
        found = {}
        for entry, row in zip(names, rows, strict=True):
            try:
                found[entry] = decode_outcome(row[0][1][b"outcome"])
            except (IndexError, KeyError, TypeError, ValueError):  # trimmed, or no outcome, or no entry at all
                continue
        return found

    async def dead(self, task: str, count: int = 100) -> list[dict[str, str]]:
        """Dead letters, newest first: `entry`, `reason` and the entry's own fields."""
        letters = await reply(self._redis.xrevrange(keys.dead(task), count=count))
        return [{k.decode(): v.decode(errors="replace") for k, v in fields.items()} for _, fields in letters]


def _flat(entries: Any) -> list[Any]:
    """redis-py wraps the entries of a stream in one more list under RESP3."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _entry(raw: Any) -> Entry:
    return raw[0].decode(), raw[1]
