"""A challenger's way to champion or out, step by atomic step, on a real Valkey."""

from __future__ import annotations

import asyncio

import pytest

from service.core.types import Head
from service.errors import Conflict, InvalidRequest, NotFound
from service.store import keys
from service.store.client import Store
from service.store.lease import REFINE
from service.store.rounds import Round


async def _propose(store: Store, share: float = 0.05, task: str = "math", **why) -> Head:
    head, version = await store.offsets.head(task), await store.offsets.next_version(task)
    why = {"actor": "test", **why}
    return await store.offsets.propose(task, version, b"artifact", share=share, expect=head, **why)


async def _publish(store: Store) -> Head:
    head, version = await store.offsets.head("math"), await store.offsets.next_version("math")
    return await store.offsets.publish("math", version, b"artifact", expect=head, actor="test")


async def _actions(store: Store) -> list[tuple[str, int, int, float]]:
    return [(d.action, d.version, d.challenger, d.share) for d in await store.offsets.history("math")]


async def test_from_challenger_to_champion(store: Store) -> None:
    head = await _propose(store, reason="e-value 12", evidence={"e_value": 12.0, "samples": 480})
    assert head == Head(version=0, epoch=1, challenger=1, share=0.05)
    assert await store.offsets.head("math") == head
    assert await store.offsets.get("math", 1) == b"artifact"
    head = await store.offsets.advance("math", 0.25, expect=head, actor="refiner", evidence={"e_value": 40.5})
    assert (head.version, head.challenger, head.share) == (0, 1, 0.25)
    head = await store.offsets.promote("math", expect=head, actor="refiner", reason="more right answers")
    assert head == Head(version=1, epoch=3)
    assert await _actions(store) == [("promote", 1, 1, 0.0), ("advance", 0, 1, 0.25), ("propose", 0, 1, 0.05)]
    promoted, advanced, proposed = await store.offsets.history("math")
    assert (promoted.parent, promoted.reason, promoted.evidence) == (0, "more right answers", {})
    assert advanced.evidence == {"e_value": 40.5}
    assert proposed.evidence == {"e_value": 12.0, "samples": 480}
    assert (await store.offsets.rollback("math", actor="a")).version == 0, "undo goes to the parent"


async def test_withdraw_keeps_the_champion_and_the_reason(store: Store) -> None:
    await _publish(store)
    head = await _propose(store)
    head = await store.offsets.withdraw("math", expect=head, actor="guard", reason="one answer")
    assert head == Head(version=1, epoch=3)
    last = (await store.offsets.history("math"))[0]
    assert (last.action, last.version, last.parent, last.challenger, last.reason) == ("withdraw", 1, 1, 2, "one answer")
    assert await store.offsets.next_version("math") == 3, "versions are never reused"
    assert (await _propose(store)).challenger == 3


@pytest.mark.parametrize("step", ["publish", "rollback", "pin"])
async def test_another_champion_ends_the_trial(store: Store, step: str) -> None:
    await _publish(store)
    await _propose(store)
    moves = {
        "publish": lambda: _publish(store),
        "rollback": lambda: store.offsets.rollback("math", actor="a"),
        "pin": lambda: store.offsets.pin("math", 0, actor="a"),
    }
    head = await moves[step]()
    assert (head.challenger, head.share) == (0, 0.0)
    last = (await store.offsets.history("math"))[0]
    assert (last.action, last.challenger) == (step, 2)


async def test_steps_without_a_challenger_or_with_two(store: Store) -> None:
    with pytest.raises(Conflict, match="no challenger"):
        await store.offsets.advance("math", 0.5, expect=Head(), actor="a")
    with pytest.raises(Conflict, match="no challenger"):
        await store.offsets.promote("math", expect=Head(), actor="a")
    with pytest.raises(Conflict, match="no challenger"):
        await store.offsets.withdraw("math", actor="a")
    head = await _propose(store, 0.25)
    with pytest.raises(Conflict, match="version 1 is the challenger"):
        await _propose(store)
    with pytest.raises(Conflict, match=r"share of 0\.25 already"):
        await store.offsets.advance("math", 0.05, expect=head, actor="a")
    assert await store.offsets.head("math") == head


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
async def test_a_share_is_between_0_and_1(store: Store, share: float) -> None:
    with pytest.raises(InvalidRequest, match=f"share of {share}; it must be above 0 and below 1"):
        await _propose(store, share)
    assert await store.offsets.versions("math") == []


async def test_every_step_is_a_compare_and_set(store: Store) -> None:
    old = await _propose(store)
    new = await store.offsets.advance("math", 0.25, expect=old, actor="a")
    for step in (
        lambda: store.offsets.advance("math", 0.5, expect=old, actor="late"),
        lambda: store.offsets.promote("math", expect=old, actor="late"),
        lambda: store.offsets.withdraw("math", expect=old, actor="late"),
        lambda: store.offsets.pin("math", expect=old, actor="late"),
    ):
        with pytest.raises(Conflict, match="at epoch 2, expected version 0 at epoch 1"):
            await step()
    assert await store.offsets.head("math") == new


async def test_of_promotion_and_withdrawal_one_wins(store: Store) -> None:
    head = await _propose(store)
    both = await asyncio.gather(
        store.offsets.promote("math", expect=head, actor="gate"),
        store.offsets.withdraw("math", expect=head, actor="guard"),
        return_exceptions=True,
    )
    assert sorted(type(r).__name__ for r in both) == ["Conflict", "Head"]
    assert len(await store.offsets.history("math")) == 2


async def test_a_pin_holds_against_everything_automatic(store: Store) -> None:
    await _publish(store)
    await _publish(store)
    token = await store.lease.acquire("math", REFINE, 60)
    head = await store.offsets.pin("math", 1, actor="ann", reason="release week")
    assert head == Head(version=1, epoch=3, pinned=True)
    assert await store.offsets.pin("math", actor="ann") == head, "no change, no epoch"
    with pytest.raises(NotFound, match="version 9"):
        await store.offsets.pin("math", 9, actor="ann")
    with pytest.raises(Conflict, match="pinned to version 1"):
        await _propose(store, token=token)
    with pytest.raises(Conflict, match="pinned to version 1"):
        await store.offsets.publish("math", 3, b"x", expect=head, actor="refiner", token=token)
    with pytest.raises(Conflict, match="pinned to version 1"):
        await store.offsets.rollback("math", actor="guard", token=token)
    head = await _propose(store)  # by hand
    with pytest.raises(Conflict, match="pinned"):
        await store.offsets.promote("math", expect=head, actor="refiner", token=token)
    assert (await store.offsets.withdraw("math", actor="guard", token=token)).version == 1
    assert (await store.offsets.rollback("math", actor="ann")) == Head(version=0, epoch=6, pinned=True)
    assert not (await store.offsets.unpin("math", actor="ann")).pinned
    assert (await _propose(store, token=token)).challenger == 4
    actions = [d.action for d in await store.offsets.history("math")]
    assert actions[:4] == ["propose", "unpin", "rollback", "withdraw"]


async def test_frozen_stops_refinement_but_not_the_way_back(store: Store) -> None:
    await _publish(store)
    token = await store.lease.acquire("math", REFINE, 60)
    await _propose(store, token=token)
    head = await store.offsets.freeze("math", actor="guard", reason="collapse")
    assert (head.challenger, head.share, head.frozen) == (2, 0.05, True)
    for step in (
        lambda: store.offsets.advance("math", 0.25, expect=head, actor="refiner", token=token),
        lambda: store.offsets.promote("math", expect=head, actor="refiner", token=token),
    ):
        with pytest.raises(Conflict, match="frozen: collapse"):
            await step()
    head = await store.offsets.withdraw("math", actor="guard", token=token)
    assert (head.version, head.challenger, head.frozen) == (1, 0, True)
    with pytest.raises(Conflict, match="frozen: collapse"):
        await _propose(store, token=token)
    assert (await store.offsets.rollback("math", actor="guard", token=token)).version == 0


async def test_a_decision_takes_the_rounds_state_along_or_leaves_it(store: Store) -> None:
    assert await store.rounds.load("math") == Round("0", b"")
    token = await store.lease.acquire("math", REFINE, 60)
    assert token is not None
    await store.rounds.save("math", Round("7-0", b"\x00\xff"), token=token)
    assert await store.rounds.load("math") == Round("7-0", b"\x00\xff")
    head = await _propose(store, token=token, round=Round("9-1", b"gate"))
    assert await store.rounds.load("math") == Round("9-1", b"gate")
    head = await store.offsets.advance("math", 0.25, expect=head, actor="a", token=token)
    assert await store.rounds.load("math") == Round("9-1", b"gate"), "without a state it stays"
    with pytest.raises(Conflict):
        await store.offsets.promote("math", expect=Head(), actor="a", token=token, round=Round("11-0"))
    assert await store.rounds.load("math") == Round("9-1", b"gate"), "refused whole"
    await store.offsets.promote("math", expect=head, actor="a", token=token, round=Round("11-0"))
    assert await store.rounds.load("math") == Round("11-0", b"")
    assert await store.rounds.load("choice") == Round(), "tasks are apart"


async def test_the_rounds_state_is_fenced_and_bounded(store: Store) -> None:
    token = await store.lease.acquire("math", REFINE, 60)
    assert token is not None
    with pytest.raises(Conflict, match="lease with token 99 was lost"):
        await store.rounds.save("math", Round("1-0"), token=99)
    with pytest.raises(Conflict, match="lease with token 99 was lost"):
        await _propose(store, token=99, round=Round("1-0"))
    with pytest.raises(ValueError, match="token"):
        await _propose(store, round=Round("1-0"))
    with pytest.raises(ValueError, match=f"at most {keys.ROUND_STATE}"):
        Round("1-0", b"x" * keys.ROUND_STATE)
    with pytest.raises(ValueError, match="beginning"):
        Round("")
    with pytest.raises(ValueError, match=f"at most {keys.EVIDENCE}"):
        await _propose(store, evidence={"long": "x" * keys.EVIDENCE})
    assert (await store.rounds.load("math"), await store.offsets.head("math")) == (Round(), Head())


async def test_notices_tell_the_challenger(store: Store) -> None:
    notices = store.offsets.notices()
    assert await anext(notices) == {"kind": "resync"}
    await asyncio.sleep(0.05)
    await _propose(store, 0.25)
    said = await asyncio.wait_for(anext(notices), 5)
    assert (said["action"], said["version"], said["challenger"], said["share"]) == ("propose", 0, 1, 0.25)
    await notices.aclose()  # type: ignore[attr-defined]
