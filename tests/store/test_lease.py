from __future__ import annotations

import asyncio

import pytest

from service.store.client import Store
from service.store.lease import MONITOR, REFINE


async def test_one_holder_at_a_time_and_growing_tokens(store: Store) -> None:
    first = await store.lease.acquire("math", REFINE, 10)
    assert first == 1
    assert await store.lease.acquire("math", REFINE, 10) is None
    assert await store.lease.acquire("math", MONITOR, 10) == 1, "leases of different names are apart"
    assert await store.lease.acquire("other", REFINE, 10) == 1
    assert await store.lease.release("math", REFINE, first)
    assert await store.lease.acquire("math", REFINE, 10) == 2


async def test_a_lapsed_lease_cannot_be_renewed_or_released(store: Store) -> None:
    old = await store.lease.acquire("math", REFINE, 0.05)
    assert old is not None
    await asyncio.sleep(0.1)
    assert not await store.lease.renew("math", REFINE, old, 10)
    new = await store.lease.acquire("math", REFINE, 10)
    assert new is not None
    assert new > old
    assert not await store.lease.release("math", REFINE, old)
    assert await store.lease.renew("math", REFINE, new, 10), "the late release must not hit the new holder"


async def test_race_has_one_winner(store: Store) -> None:
    tokens = await asyncio.gather(*(store.lease.acquire("math", REFINE, 10) for _ in range(20)))
    assert [t for t in tokens if t is not None] == [1]


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("inf"), float("nan")])
async def test_times_that_make_no_lease(store: Store, ttl: float) -> None:
    with pytest.raises(ValueError, match="lease of"):
        await store.lease.acquire("math", REFINE, ttl)
