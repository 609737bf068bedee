"""The live snapshot on a real Valkey: what is published is verified before it is served, whoever wrote it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from service.core.artifact import encode, zero_artifact
from service.core.prompt import anchor_ids
from service.core.types import Head
from service.engine.scripted import ScriptedEngine
from service.metrics import REFUSED
from service.serve.live import Live
from service.tasks.catalogue import load_catalogue

TASK = "yes_no"


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
async def live(store, engine):
    tokenise = partial(anchor_ids, engine.chat)
    made = Live(store, load_catalogue(), engine.model, engine.rows, tokenise, poll=30.0)
    await made.start()
    yield made
    await made.aclose()


def artifact(engine, version=1, **changes):
    anchor = "Decide, then say yes or no."
    ids = anchor_ids(engine.chat, anchor)
    made = zero_artifact(TASK, engine.model, anchor, ids, engine.rows(ids))
    offset = np.full_like(made.offset, 0.001)
    return replace(made, version=version, **{"offset": offset, **changes})


async def publish(store, blob, version=1):
    head = await store.offsets.head(TASK)
    return await store.offsets.publish(TASK, version, blob, expect=head, actor="test")


async def test_a_published_version_is_served_by_its_notice_alone(store, engine, live):
    await publish(store, encode(artifact(engine)))
    for _ in range(100):
        if TASK in live.snapshot.champions:
            break
        await asyncio.sleep(0.02)
    champion = live.snapshot.champions[TASK]  # the next poll is half a minute away
    assert champion.version == 1
    assert champion.soft is not None
    assert np.allclose(champion.soft, artifact(engine).anchor + 0.001)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda e: b"garbage", ""),
        (lambda e: encode(artifact(e))[:-4], ""),
        (lambda e: _flipped(encode(artifact(e))), "checksum"),
        (lambda e: encode(artifact(e, model_revision="other")), "other"),
        (lambda e: encode(artifact(e, task="choice")), "choice"),
        (lambda e: encode(artifact(e, version=7)), "version 7"),
        (lambda e: encode(artifact(e, anchor_text="Another text altogether, no?")), "anchor"),
        (lambda e: encode(artifact(e, offset=np.full_like(artifact(e).offset, 9.0))), "norm"),
    ],
    ids=["garbage", "cut", "flipped", "model", "task", "version", "anchor", "norm"],
)
async def test_what_fails_a_check_is_refused_with_the_reason_and_never_served(store, engine, live, spoil, reason):
    await publish(store, spoil(engine))
    await live.refresh()
    assert TASK not in live.snapshot.champions
    assert reason in live.snapshot.refused[TASK]


async def test_a_refused_version_leaves_the_one_before_in_place(store, engine, live):
    await publish(store, encode(artifact(engine)))
    await live.refresh()
    await publish(store, b"garbage", version=2)
    await live.refresh()
    assert live.snapshot.champions[TASK].version == 1
    assert live.snapshot.heads[TASK] == Head(version=2, epoch=2)
    await store.offsets.rollback(TASK, actor="test")
    await live.refresh()
    assert TASK not in live.snapshot.refused


async def test_rollback_to_zero_serves_the_plain_prompt_again(store, engine, live):
    await publish(store, encode(artifact(engine)))
    await live.refresh()
    await store.offsets.rollback(TASK, actor="test")
    await live.refresh()
    assert TASK not in live.snapshot.champions


async def propose(store, blob, version):
    head = await store.offsets.head(TASK)
    return await store.offsets.propose(TASK, version, blob, share=0.25, expect=head, actor="test")


async def test_a_challenger_is_served_beside_the_champion_and_becomes_it_without_another_check(store, engine, live):
    await publish(store, encode(artifact(engine)))
    head = await propose(store, encode(artifact(engine, 2)), 2)
    await live.refresh()
    assert (live.snapshot.champions[TASK].version, live.snapshot.challengers[TASK].version) == (1, 2)
    verified = live.snapshot.challengers[TASK]
    await store.offsets.promote(TASK, expect=head, actor="test")
    await live.refresh()
    assert live.snapshot.champions[TASK] is verified
    assert TASK not in live.snapshot.challengers


@pytest.mark.parametrize("blob", [b"garbage", "model"], ids=["garbage", "model"])
async def test_a_challenger_that_fails_a_check_is_not_served_and_harms_nothing(store, engine, live, blob):
    await publish(store, encode(artifact(engine)))
    await propose(store, encode(artifact(engine, 2, model_revision="other")) if blob == "model" else blob, 2)
    before = REFUSED._value.get()
    await live.refresh()
    await live.refresh()
    assert REFUSED._value.get() == before + 1, "counted once"
    assert live.snapshot.champions[TASK].version == 1
    assert TASK not in live.snapshot.challengers
    assert live.snapshot.refused[TASK].startswith("challenger 2: ")
    await store.offsets.withdraw(TASK, actor="test")
    await live.refresh()
    assert TASK not in live.snapshot.refused


async def test_run_time_tasks_appear_in_every_replica_and_broken_ones_are_skipped(store, live):
    definition = {
        "id": "greeting",
        "description": "Greetings",
        "answer": {"type": "label", "labels": ["polite", "rude"]},
        "anchors": {"default": "Is this greeting polite or rude?"},
        "examples": ["Good morning, dear colleague", "Oi you", "Dear Sir or Madam"],
    }
    await store.tasks.register("greeting", definition)
    await store.tasks.register("broken", {"id": "broken", "answer": {"type": "nonsense"}})
    await live.refresh()
    assert "greeting" in live.snapshot.catalogue.tasks
    assert "broken" not in live.snapshot.catalogue.tasks
    await store.tasks.delete("greeting")
    await live.refresh()
    assert "greeting" not in live.snapshot.catalogue.tasks


def _flipped(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])
