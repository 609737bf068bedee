from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from service.core.types import Head
from service.errors import Conflict, NotFound
from service.store.client import Store
from service.store.lease import REFINE


async def _publish(store: Store, blob: bytes = b"artifact", task: str = "math") -> Head:
    head = await store.offsets.head(task)
    return await store.offsets.publish(task, await store.offsets.next_version(task), blob, expect=head, actor="test")


async def test_nothing_published_is_the_zero_offset(store: Store) -> None:
    assert await store.offsets.heads(["math", "choice"]) == {"math": Head(), "choice": Head()}
    assert await store.offsets.heads([]) == {}
    assert await store.offsets.next_version("math") == 1
    assert await store.offsets.history("math") == []
    with pytest.raises(NotFound, match="version 0"):
        await store.offsets.get("math", 0)


async def test_publish_stores_points_and_records(store: Store) -> None:
    head = await store.offsets.publish("math", 1, b"\x00\xffone", expect=Head(), actor="ann", reason="by hand")
    assert head == Head(version=1, epoch=1)
    assert await store.offsets.head("math") == head
    assert await store.offsets.get("math", 1) == b"\x00\xffone"
    assert await store.offsets.versions("math") == [1]
    (record,) = await store.offsets.history("math")
    assert (record.action, record.version, record.parent, record.epoch) == ("publish", 1, 0, 1)
    assert (record.actor, record.reason) == ("ann", "by hand")
    assert record.time > 1.7e9


async def test_a_race_of_publishers_has_one_winner(store: Store) -> None:
    results = await asyncio.gather(
        *(store.offsets.publish("math", 1, b"%d" % i, expect=Head(), actor=f"p{i}") for i in range(8)),
        return_exceptions=True,
    )
    won = [i for i, r in enumerate(results) if isinstance(r, Head)]
    assert len(won) == 1
    assert all(isinstance(r, Conflict) for i, r in enumerate(results) if i != won[0])
    assert await store.offsets.get("math", 1) == b"%d" % won[0]
    assert len(await store.offsets.history("math")) == 1


async def test_a_moved_head_or_a_wrong_version_is_a_conflict(store: Store) -> None:
    head = await _publish(store)
    with pytest.raises(Conflict, match="version 1 at epoch 1, expected version 0 at epoch 0"):
        await store.offsets.publish("math", 2, b"x", expect=Head(), actor="late")
    with pytest.raises(Conflict, match="next version is 2, not 1"):
        await store.offsets.publish("math", 1, b"overwrite", expect=head, actor="test")
    with pytest.raises(Conflict, match="next version is 2, not 7"):
        await store.offsets.publish("math", 7, b"gap", expect=head, actor="test")
    assert await store.offsets.get("math", 1) == b"artifact"
    assert await store.offsets.head("math") == head


async def test_undo_follows_parents_down_to_zero(store: Store) -> None:
    await _publish(store)
    await _publish(store)
    assert (await store.offsets.rollback("math", actor="a")).version == 1
    assert (await store.offsets.rollback("math", actor="a")).version == 0
    with pytest.raises(Conflict, match="nothing to roll back"):
        await store.offsets.rollback("math", actor="a")
    assert await store.offsets.next_version("math") == 3, "versions are never reused"
    head = await _publish(store)
    assert (head.version, head.epoch) == (3, 5)
    assert (await store.offsets.rollback("math", actor="a")).version == 0, "the parent of 3 is the zero offset"
    actions = [(d.action, d.parent, d.version) for d in await store.offsets.history("math")]
    assert actions[:2] == [("rollback", 3, 0), ("publish", 0, 3)]


async def test_rollback_to_a_version(store: Store) -> None:
    for _ in range(3):
        await _publish(store)
    assert (await store.offsets.rollback("math", 1, actor="a", reason="worse")).version == 1
    assert (await store.offsets.rollback("math", 3, actor="a")).version == 3
    assert (await store.offsets.rollback("math", 0, actor="a")).version == 0
    with pytest.raises(NotFound, match="version 9"):
        await store.offsets.rollback("math", 9, actor="a")
    with pytest.raises(Conflict, match="nothing to roll back"):
        await store.offsets.rollback("math", 0, actor="a")
    with pytest.raises(Conflict, match="expected version 3"):
        await store.offsets.rollback("math", 1, actor="a", expect=Head(version=3, epoch=3))


async def test_freeze_counts_epochs_and_refuses_refiners(store: Store) -> None:
    frozen = await store.offsets.freeze("math", actor="guard", reason="one answer")
    assert frozen == Head(version=0, epoch=1, frozen=True, reason="one answer")
    assert await store.offsets.freeze("math", actor="guard", reason="again") == frozen, "no change, no epoch"
    token = await store.lease.acquire("math", REFINE, 10)
    with pytest.raises(Conflict, match="frozen: one answer"):
        await store.offsets.publish("math", 1, b"x", expect=frozen, actor="refiner", token=token)
    by_hand = await store.offsets.publish("math", 1, b"x", expect=frozen, actor="ann")
    assert by_hand == Head(version=1, epoch=2, frozen=True, reason="one answer")
    assert await store.offsets.unfreeze("math", actor="ann") == Head(version=1, epoch=3)
    actions = [d.action for d in await store.offsets.history("math")]
    assert actions == ["unfreeze", "publish", "freeze"]


async def test_a_fencing_token_must_be_the_current_one(store: Store) -> None:
    old = await store.lease.acquire("math", REFINE, 0.05)
    await asyncio.sleep(0.1)
    with pytest.raises(Conflict, match="lease with token 1 was lost"):
        await store.offsets.publish("math", 1, b"x", expect=Head(), actor="sleeper", token=old)
    new = await store.lease.acquire("math", REFINE, 10)
    with pytest.raises(Conflict, match="lease"):
        await store.offsets.publish("math", 1, b"x", expect=Head(), actor="sleeper", token=old)
    head = await store.offsets.publish("math", 1, b"x", expect=Head(), actor="holder", token=new)
    assert head.version == 1


async def test_tasks_are_apart(store: Store) -> None:
    await _publish(store, b"m", "math")
    await _publish(store, b"c", "choice")
    assert await store.offsets.get("choice", 1) == b"c"
    await store.offsets.rollback("choice", actor="a")
    assert (await store.offsets.head("math")).version == 1


async def test_notices_announce_changes(store: Store) -> None:
    async with aclosing(store.offsets.notices()) as notices:  # type: ignore[type-var]
        assert await anext(notices) == {"kind": "resync"}
        await asyncio.sleep(0.05)
        await _publish(store)
        await store.tasks.register("quiz", {})
        published = await asyncio.wait_for(anext(notices), 5)
        moved = {"kind": "offset", "task": "math", "action": "publish", "version": 1, "epoch": 1}
        assert published == moved | {"challenger": 0, "share": 0}
        assert await asyncio.wait_for(anext(notices), 5) == {"kind": "tasks", "task": "quiz"}


async def test_functions_are_loaded_again_after_they_vanish(store: Store, raw: Redis) -> None:
    await _publish(store)
    await raw.function_flush("SYNC")
    assert (await _publish(store)).version == 2
