"""Where a task's refinement stands between two rounds, kept under the fencing token of whoever refines it."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from service.store import keys
from service.store.functions import call, reply
from service.store.lease import REFINE


@dataclass(frozen=True, slots=True)
class Round:
    """A refinement's state. A decision takes one along (see `OffsetStore`), so that both are there or neither.

    Attributes:
        cursor: how far outcomes were read, in the refiner's own words; "0" is the beginning.
        gate: state of the gate on the running challenger, in the refiner's own bytes; empty without one.
    """

    cursor: str = "0"
    gate: bytes = b""

    def __post_init__(self) -> None:
        if not self.cursor:
            raise ValueError("the cursor of a round is empty; the beginning is '0'")
        size = len(self.cursor.encode()) + len(self.gate)
        if size > keys.ROUND_STATE:
            raise ValueError(f"a round's state has {size} bytes; at most {keys.ROUND_STATE} are kept")


class RoundStore:
    """Load and save. Both raise StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def load(self, task: str) -> Round:
        """The last saved state; `Round()` before the first."""
        cursor, gate = await reply(self._redis.hmget(keys.round_state(task), ["cursor", "gate"]))
        return Round() if cursor is None else Round(cursor.decode(), gate or b"")

    async def save(self, task: str, state: Round, *, token: int) -> None:
        """Saves the state by itself, where a round decided nothing.

        Raises:
            Conflict: the refine lease with this token was lost; nothing was changed.
        """
        names = [keys.round_state(task), keys.lease(task, REFINE)]
        await call(self._redis, "save_round", names, [token, state.cursor, state.gate])
