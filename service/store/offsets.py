"""Published offsets: immutable artifacts, a pointer per task moved by compare-and-set, the record of each move."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict, Unpack

import orjson
from redis.asyncio import Redis

from service.core.types import Head
from service.errors import InvalidRequest, NotFound, StoreUnavailable
from service.store import keys
from service.store.functions import call, redis_errors, reply
from service.store.lease import REFINE
from service.store.rounds import Round

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """One change of a task's head.

    Attributes:
        action: "publish", "propose", "advance", "promote", "withdraw", "rollback", "pin", "unpin", "freeze" or
            "unfreeze".
        version: the champion after the step; `parent`: before it.
        epoch: the head's epoch after the step.
        challenger: the challenger that the step was about, put an end to or left alone; 0 for none.
        share: the challenger's share after the step, 0 where it ended.
        time: Unix time in seconds, by Redis's clock.
        actor, reason: who did it and why.
        evidence: what spoke for it, a JSON object.
    """

    action: str
    version: int
    parent: int
    epoch: int
    challenger: int
    share: float
    time: float
    actor: str
    reason: str
    evidence: Mapping[str, Any]


class Why(TypedDict, total=False):
    """What every step takes along.

    Attributes:
        actor, reason: who takes it and why, for the record.
        evidence: JSON object for the record, at most `keys.EVIDENCE` bytes.
        token: fencing token of the refine lease. It makes the step an automatic one: a lost lease refuses it, and so
            may a frozen or pinned task.
        round: the refinement's state, saved in the same step; needs a token.
    """

    actor: Required[str]
    reason: str
    evidence: Mapping[str, Any] | None
    token: int | None
    round: Round | None


class OffsetStore:
    """Versions of each task. Version 0 is the zero offset: always there, without an artifact.

    Every step is atomic, and leaves a decision record and a notice. Everything raises StoreUnavailable. `expect` makes
    a step conditional on the head not having moved since it was read; one that lost the race raises Conflict and
    changes nothing. For what else a step takes see `Why`.

    Frozen refuses automation whatever brings a new version nearer: publish, propose, advance, promote. Pinned refuses
    it rollback as well. Steps without a token are an operator's and never refused for either.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def heads(self, tasks: Iterable[str]) -> dict[str, Head]:
        """The pointers of the given tasks in one round trip; `Head()` where nothing was published yet."""
        names = list(tasks)
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for task in names:
                    pipe.hmget(keys.head(task), _HEAD)
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

    async def publish(self, task: str, version: int, artifact: bytes, *, expect: Head, **why: Unpack[Why]) -> Head:
        """Stores an artifact and makes it the champion at once; a running challenger is withdrawn.

        Args:
            version: as encoded in the artifact; must be `next_version`.
            expect: the head from which the artifact was made.

        Raises:
            Conflict: the head moved, the version is taken, or refused to automation: lease lost, frozen, pinned.
        """
        return await self._decide("publish", task, expect, why, version, artifact)

    async def propose(
        self, task: str, version: int, artifact: bytes, *, share: float, expect: Head, **why: Unpack[Why]
    ) -> Head:
        """Stores an artifact and makes it the challenger, at a share in (0, 1); the champion stays.

        Raises:
            InvalidRequest: the share is out of bounds.
            Conflict: as `publish`, or there is a challenger already.
        """
        return await self._decide("propose", task, expect, why, version, artifact, _share(share))

    async def advance(self, task: str, share: float, *, expect: Head, **why: Unpack[Why]) -> Head:
        """Raises the challenger's share, below 1: all of the traffic is `promote`.

        Raises:
            InvalidRequest: the share is out of bounds.
            Conflict: no challenger, no larger share, the head moved, or refused to automation as `publish`.
        """
        return await self._decide("advance", task, expect, why, _share(share))

    async def promote(self, task: str, *, expect: Head, **why: Unpack[Why]) -> Head:
        """Makes the challenger the champion. Raises Conflict as `advance`."""
        return await self._decide("promote", task, expect, why)

    async def withdraw(self, task: str, *, expect: Head | None = None, **why: Unpack[Why]) -> Head:
        """Takes the challenger out of service; a guard may do so on a frozen or pinned task as well.

        Raises:
            Conflict: no challenger, the head moved, or the lease was lost.
        """
        return await self._decide("withdraw", task, expect, why)

    async def rollback(
        self, task: str, to: int | None = None, *, expect: Head | None = None, **why: Unpack[Why]
    ) -> Head:
        """Points back to version `to`, by default to the champion's parent (undo); withdraws a running challenger.

        Raises:
            NotFound: no such version.
            Conflict: the head moved, or it points there already (nothing to roll back); with a token also: lease
                lost or task pinned.
        """
        return await self._decide("rollback", task, expect, why, "" if to is None else to)

    async def pin(
        self, task: str, version: int | None = None, *, expect: Head | None = None, **why: Unpack[Why]
    ) -> Head:
        """Makes a version (default: the champion) the champion and holds it there; withdraws a running challenger.

        Pinned to it already is no change.

        Raises:
            NotFound: no such version.
            Conflict: the head moved.
        """
        return await self._decide("pin", task, expect, why, "" if version is None else version)

    async def unpin(self, task: str, **why: Unpack[Why]) -> Head:
        """Lets automation move the champion again; not pinned is no change."""
        return await self._decide("flag", task, None, why, "pinned", "0", "unpin")

    async def freeze(self, task: str, **why: Unpack[Why]) -> Head:
        """Stops refinement of the task; frozen already is no change."""
        return await self._decide("flag", task, None, why, "frozen", "1", "freeze")

    async def unfreeze(self, task: str, **why: Unpack[Why]) -> Head:
        """Lets refinement go on; not frozen is no change."""
        return await self._decide("flag", task, None, why, "frozen", "0", "unfreeze")

    async def history(self, task: str, count: int = 100) -> list[Decision]:
        """Decision records, newest first."""
        entries = await reply(self._redis.xrevrange(keys.decisions(task), count=count))
        return [_decision(entry, fields) for entry, fields in entries]

    async def notices(self) -> AsyncIterator[dict[str, Any]]:
        """Endless changes as they are announced; reconnects by itself.

        Yields `{"kind": "offset", "task", "action", "version", "epoch", "challenger", "share"}`,
        `{"kind": "tasks", "task"}`, and `{"kind": "resync"}` after each (re)connection, because notices sent meanwhile
        are lost. Poll as well.
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

    async def _decide(self, function: str, task: str, expect: Head | None, why: Why, *args: Any) -> Head:
        names = [keys.head(task), keys.decisions(task), keys.offsets(task), keys.lease(task, REFINE)]
        expected = ("", "") if expect is None else (expect.version, expect.epoch)
        token, state = why.get("token"), why.get("round")
        if state is not None and token is None:
            raise ValueError("the state of a round is saved under a fencing token, and none was given")
        fixed = [keys.NOTICES, task, keys.DECISIONS, why["actor"], why.get("reason", ""), _evidence(why), *expected]
        round_args = ["" if token is None else token, state.cursor if state else "", state.gate if state else ""]
        return _head(await call(self._redis, function, [*names, keys.round_state(task)], [*fixed, *round_args, *args]))


_HEAD = ("version", "epoch", "frozen", "reason", "challenger", "share", "pinned")


def _head(row: Sequence[Any]) -> Head:
    version, epoch, frozen, reason, challenger, share, pinned = row
    return Head(
        version=int(version or 0),
        epoch=int(epoch or 0),
        frozen=frozen == b"1",
        reason=(reason or b"").decode(),
        challenger=int(challenger or 0),
        share=float(share or 0),
        pinned=pinned == b"1",
    )


def _share(share: float) -> str:
    if not 0 < share < 1:
        raise InvalidRequest(f"a challenger's share of {share}; it must be above 0 and below 1", param="share")
    return repr(float(share))


def _evidence(why: Why) -> bytes:
    body = orjson.dumps(why.get("evidence") or {}, option=orjson.OPT_SERIALIZE_NUMPY)
    if len(body) > keys.EVIDENCE:
        raise ValueError(f"the evidence of a decision has {len(body)} bytes; at most {keys.EVIDENCE} are kept")
    return body


def _decision(entry: bytes, fields: dict[bytes, bytes]) -> Decision:
    f = {name.decode(): value.decode() for name, value in fields.items()}
    return Decision(
        action=f["action"],
        version=int(f["version"]),
        parent=int(f["parent"]),
        epoch=int(f["epoch"]),
        challenger=int(f.get("challenger", 0)),  # records of an older service have no challenger, share and evidence
        share=float(f.get("share", 0)),
        time=int(entry.split(b"-")[0]) / 1000,
        actor=f["actor"],
        reason=f["reason"],
        evidence=orjson.loads(f.get("evidence") or b"{}"),
    )
