"""Published offsets: immutable artifacts, a pointer per task moved by compare-and-set, the record of each move."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from redis.asyncio import Redis

from service.core.types import Head
from service.errors import NotFound, StoreUnavailable
from service.store import keys
from service.store.functions import call, redis_errors, reply
from service.store.lease import REFINE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """One move of a task's pointer.

    Attributes:
        action: "publish", "rollback", "freeze" or "unfreeze".
        version: the champion after the move; `parent`: before it.
        epoch: the head's epoch after the move.
        time: Unix time in seconds, by Redis's clock.
        actor, reason: who moved it and why.
    """

    action: str
    version: int
    parent: int
    epoch: int
    time: float
    actor: str
    reason: str


class OffsetStore:
    """Versions of each task. Version 0 is the zero offset: always there, without an artifact.

    Everything raises StoreUnavailable. `expect` makes a move conditional on the head not having moved since it was
    read; a move that lost the race raises Conflict and changes nothing.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def heads(self, tasks: Iterable[str]) -> dict[str, Head]:
        """The pointers of the given tasks in one round trip; `Head()` where nothing was published yet."""
        names = list(tasks)
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for task in names:
                    pipe.hmget(keys.head(task), ["version", "epoch", "frozen", "reason"])
                rows = await pipe.execute()
        return {task: _head(row) for task, row in zip(names, rows, strict=True)}

    async def head(self, task: str) -> Head:
        """The pointer of one task."""
        return (await self.heads([task]))[task]

    async def get(self, task: str, version: int) -> bytes:
        """Artifact bytes of a version. Raises NotFound, also for version 0."""
        blob = await reply(self._redis.hget(keys.offsets(task), str(version)))
        if blob is None:
            raise NotFound(f"task {task!r} has no offset version {version}")
        return blob

    async def versions(self, task: str) -> list[int]:
        """All versions with an artifact, ascending."""
        return sorted(int(v) for v in await reply(self._redis.hkeys(keys.offsets(task))))

    async def next_version(self, task: str) -> int:
        """The only version that `publish` takes now; versions are never reused, also after a rollback."""
        return int(await reply(self._redis.hget(keys.head(task), "last")) or 0) + 1

    async def publish(
        self,
        task: str,
        version: int,
        artifact: bytes,
        *,
        expect: Head,
        actor: str,
        reason: str = "",
        token: int | None = None,
    ) -> Head:
        """Stores an artifact and makes it the champion, in one step.

        Args:
            version: as encoded in the artifact; must be `next_version`.
            expect: the head from which the artifact was made.
            token: fencing token of the refine lease; with it, a lost lease or a frozen task refuses the step.

        Raises:
            Conflict: the head moved, the version is taken, the lease was lost, or the task is frozen.
        """
        args = [*_expected(expect), "" if token is None else token, version, artifact]
        return await self._decide("publish", task, [keys.offsets(task), keys.lease(task, REFINE)], actor, reason, args)

    async def rollback(
        self, task: str, to: int | None = None, *, actor: str, reason: str = "", expect: Head | None = None
    ) -> Head:
        """Points back to version `to`, by default to the champion's parent (undo).

        Raises:
            NotFound: no such version.
            Conflict: the head moved, or it points there already (nothing to roll back).
        """
        args = [*_expected(expect), "" if to is None else to]
        return await self._decide("rollback", task, [keys.offsets(task)], actor, reason, args)

    async def freeze(self, task: str, *, actor: str, reason: str) -> Head:
        """Stops refinement of the task; frozen already is no change."""
        return await self._decide("freeze", task, [], actor, reason, ["1"])

    async def unfreeze(self, task: str, *, actor: str, reason: str = "") -> Head:
        """Lets refinement go on; not frozen is no change."""
        return await self._decide("freeze", task, [], actor, reason, ["0"])

    async def history(self, task: str, count: int = 100) -> list[Decision]:
        """Decision records, newest first."""
        entries = await reply(self._redis.xrevrange(keys.decisions(task), count=count))
        return [_decision(entry, fields) for entry, fields in entries]

    async def notices(self) -> AsyncIterator[dict[str, Any]]:
        """Endless changes as they are announced; reconnects by itself.

        Yields `{"kind": "offset", "task", "action", "version", "epoch"}`, `{"kind": "tasks", "task"}`, and
        `{"kind": "resync"}` after each (re)connection, because notices sent meanwhile are lost. Poll as well.
        """
        while True:
            try:
                with redis_errors():
                    async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                        await pubsub.subscribe(keys.NOTICES)
                        yield {"kind": "resync"}
                        while True:
                            message = await pubsub.get_message(timeout=5.0)
                            if message is not None:
                                yield orjson.loads(message["data"])
            except (StoreUnavailable, orjson.JSONDecodeError) as e:
                log.debug("notices interrupted: %s", e)
                await asyncio.sleep(0.5)

    async def _decide(
        self, function: str, task: str, more: Sequence[str], actor: str, reason: str, args: Sequence[Any]
    ) -> Head:
        names = [keys.head(task), keys.decisions(task), *more]
        return _head(
            await call(
                self._redis,
                function,
                names,
                [
                    keys.NOTICES,
                    task,
                    keys.DECISIONS,
                    actor,
                    reason,
                    *args,
                ],
            )
        )


def _expected(head: Head | None) -> tuple[Any, Any]:
    return ("", "") if head is None else (head.version, head.epoch)


def _head(row: Sequence[Any]) -> Head:
    version, epoch, frozen, reason = row
    return Head(int(version or 0), int(epoch or 0), frozen == b"1", (reason or b"").decode())


def _decision(entry: bytes, fields: dict[bytes, bytes]) -> Decision:
    f = {name.decode(): value.decode() for name, value in fields.items()}
    return Decision(
        action=f["action"],
        version=int(f["version"]),
        parent=int(f["parent"]),
        epoch=int(f["epoch"]),
        time=int(entry.split(b"-")[0]) / 1000,
        actor=f["actor"],
        reason=f["reason"],
    )
