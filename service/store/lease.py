"""Leases with fencing tokens: who may act on a task, and how a step is refused from one who no longer may.

Tokens grow by one with each acquisition and are never reused, so a holder that slept through its lease is recognised
by the store when it comes back (M. Kleppmann, "How to do distributed locking", 2016).
"""

from __future__ import annotations

import math

from redis.asyncio import Redis

from service.store import keys
from service.store.functions import call

REFINE = "refine"  # proposes and publishes versions
MONITOR = "monitor"  # reads the outcomes of a task


class Leases:
    """Acquire, renew, release. All raise StoreUnavailable; times in seconds."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def acquire(self, task: str, name: str, ttl: float) -> int | None:
        """The fencing token (1, 2, ...), or None while somebody else holds the lease."""
        both = [keys.lease(task, name), keys.fence(task, name)]
        return int(await call(self._redis, "acquire", both, [_ms(ttl)])) or None

    async def renew(self, task: str, name: str, token: int, ttl: float) -> bool:
        """Extends the lease; False if it was lost."""
        return bool(await call(self._redis, "renew", [keys.lease(task, name)], [token, _ms(ttl)]))

    async def release(self, task: str, name: str, token: int) -> bool:
        """Ends the lease; False if it was lost before."""
        return bool(await call(self._redis, "renew", [keys.lease(task, name)], [token, 0]))


def _ms(seconds: float) -> int:
    if not 0 < seconds < math.inf:
        raise ValueError(f"a lease of {seconds} s; it must be positive and finite")
    return max(1, round(seconds * 1000))
