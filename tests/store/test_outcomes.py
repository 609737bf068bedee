from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.core.types import Feedback
from service.errors import NotFound
from service.store import keys
from service.store.client import Store, open_store
from service.store.codec import encode_outcome
from service.store.embedded import EmbeddedValkey
from service.store.outcomes import OutcomeWriter
from tests.valkey import make_outcome, until


async def _append(store: Store, *numbers: int, task: str = "math") -> int | Exception:
    batch = [(o.id, encode_outcome(o)) for o in (make_outcome(n, task) for n in numbers)]
    return (await store.outcomes.append({task: batch}))[task]


async def test_append_counts_each_id_once(store: Store, raw: Redis) -> None:
    assert await _append(store, 1, 2, 3) == 3
    assert await _append(store, 2, 3, 4) == 1
    assert await _append(store, 4, 4) == 0
    assert await raw.xlen(keys.outcomes("math")) == 4


async def test_read_is_newest_first_and_skips_what_is_no_outcome(store: Store, raw: Redis) -> None:
    await _append(store, *range(150))
    await store.outcomes.feedback(Feedback("r-math-3", "math", correct=True))
    await raw.xadd(keys.outcomes("math"), {"outcome": "{broken"})
    assert [o.id for o in await store.outcomes.read("math", 3)] == ["r-math-149", "r-math-148", "r-math-147"]
    assert len(await store.outcomes.read("math", 1_000)) == 150
    assert await store.outcomes.read("nothing") == []


async def test_get_and_locate(store: Store) -> None:
    await _append(store, *range(300))
    await _append(store, 1, task="choice")
    found = await store.outcomes.get("math", "r-math-217")
    assert found is not None
    assert found.id == "r-math-217"
    assert await store.outcomes.get("math", "r-math-300") is None
    assert await store.outcomes.locate("r-choice-1", ["math", "choice", "never"]) == "choice"
    assert await store.outcomes.locate("r-choice-1", ["math"]) is None


async def test_stream_and_dedup_index_stay_bounded(empty_url: str, store: Store, raw: Redis) -> None:
    async with open_store(empty_url, per_task=100) as small:
        for start in range(0, 3_000, 100):
            await _append(small, *range(start, start + 100))
    assert await raw.xlen(keys.outcomes("math")) <= 300
    assert await raw.zcard(keys.seen("math")) == keys.DEDUP_MIN
    assert (await store.outcomes.read("math", 1))[0].id == "r-math-2999"


async def test_feedback_is_idempotent_and_the_last_word_wins(store: Store, raw: Redis) -> None:
    await _append(store, 1)
    assert not await store.outcomes.feedback(Feedback("r-math-1", "math", correct=True))
    assert await store.outcomes.feedback(Feedback("r-math-1", "math", correct=True))
    assert not await store.outcomes.feedback(Feedback("r-math-1", "math", correct=False, answer="7"))
    assert not await store.outcomes.feedback(Feedback("r-math-1", "math", correct=True))
    assert await raw.hlen(keys.feedback("math")) == 1
    assert await raw.xlen(keys.outcomes("math")) == 4


@pytest.mark.parametrize("request_id", ["r-math-2", "", "x" * 1_000, "ü\n\x00"])
async def test_feedback_on_an_unknown_request_is_not_found(store: Store, raw: Redis, request_id: str) -> None:
    await _append(store, 1)
    with pytest.raises(NotFound, match="no outcome"):
        await store.outcomes.feedback(Feedback(request_id, "math", score=1.0))
    assert await raw.exists(keys.feedback("math")) == 0


async def test_trim_removes_outcomes_with_all_that_belongs_to_them(store: Store, raw: Redis) -> None:
    await _append(store, 1, 2)
    await store.outcomes.feedback(Feedback("r-math-1", "math", correct=True))
    await asyncio.sleep(0.15)
    await _append(store, 3)
    assert await store.outcomes.trim("math", 3_600) == 0
    assert await store.outcomes.trim("math", 0.1) == 3  # two outcomes and one feedback
    assert [o.id for o in await store.outcomes.read("math")] == ["r-math-3"]
    assert await raw.zrange(keys.seen("math"), 0, -1) == [b"r-math-3"]
    assert await raw.hlen(keys.feedback("math")) == 0
    with pytest.raises(NotFound):
        await store.outcomes.feedback(Feedback("r-math-1", "math", correct=True))


async def test_writer_writes_all_tasks_in_batches(store: Store, raw: Redis) -> None:
    async with OutcomeWriter(store.outcomes) as writer:
        for n in range(500):
            assert writer.put(make_outcome(n, "math" if n % 2 else "choice"))
        assert writer.pending == 500
        assert await writer.flush(10)
        assert (writer.written, writer.dropped, writer.errors, writer.pending) == (500, 0, 0, 0)
    assert await raw.xlen(keys.outcomes("math")) == await raw.xlen(keys.outcomes("choice")) == 250


async def test_leaving_the_writer_flushes(store: Store, raw: Redis) -> None:
    async with OutcomeWriter(store.outcomes, interval=60) as writer:
        writer.put(make_outcome(1))
    assert await raw.xlen(keys.outcomes("math")) == 1
    assert await OutcomeWriter(store.outcomes).flush(0.1), "nothing pending is flushed"


async def test_writer_writes_without_being_asked(store: Store) -> None:
    async with OutcomeWriter(store.outcomes) as writer:
        for n in range(3):
            writer.put(make_outcome(n))
            await until(lambda wanted=n + 1: writer.written == wanted)


async def test_an_outcome_that_cannot_be_serialised_is_dropped_alone(store: Store) -> None:
    async with OutcomeWriter(store.outcomes) as writer:
        writer.put(make_outcome(1, plan={"odd": object()}))
        writer.put(make_outcome(2))
        assert await writer.flush(5)
        assert (writer.written, writer.dropped) == (1, 1)


async def test_a_task_that_redis_refuses_does_not_hold_up_others(store: Store, raw: Redis) -> None:
    await raw.set(keys.outcomes("broken"), "a string, not a stream")
    async with OutcomeWriter(store.outcomes) as writer:
        writer.put(make_outcome(1, "broken"))
        writer.put(make_outcome(1, "math"))
        assert await writer.flush(5)
        assert (writer.written, writer.dropped, writer.errors) == (1, 1, 1)


async def test_a_full_buffer_drops_and_counts(store: Store) -> None:
    writer = OutcomeWriter(store.outcomes, buffer=3)  # not running: nothing drains
    assert [writer.put(make_outcome(n)) for n in range(5)] == [True, True, True, False, False]
    assert (writer.pending, writer.dropped) == (3, 2)
    huge = OutcomeWriter(store.outcomes, buffer_bytes=1_000_000)
    assert [huge.put(make_outcome(n, completion_tokens=20_000)) for n in range(2)] == [True, False]


async def test_outage_keeps_what_fits_drops_the_newest_and_recovers(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    try:
        async with (
            open_store(server.url) as store,
            OutcomeWriter(store.outcomes, buffer=50, max_backoff=0.1, batch=10) as writer,
        ):
            writer.put(make_outcome(0))
            assert await writer.flush(5)
            server.stop()
            accepted = [n for n in range(1, 81) if writer.put(make_outcome(n))]
            assert accepted == list(range(1, 51))
            assert writer.dropped == 30
            await until(lambda: writer.errors > 0)
            assert not await writer.flush(0.2)
            server.start()
            assert await writer.flush(10)
            assert (writer.written, writer.pending) == (51, 0)
            assert [o.id for o in await store.outcomes.read("math", 100)] == [f"r-math-{n}" for n in range(50, -1, -1)]
    finally:
        server.stop()


async def test_out_of_memory_is_waited_out(valkey: EmbeddedValkey) -> None:
    async with (
        Redis.from_url(valkey.url) as client,
        open_store(valkey.url) as store,
        OutcomeWriter(store.outcomes, max_backoff=0.05) as writer,
    ):
        await client.config_set("maxmemory", 1)
        writer.put(make_outcome(1))
        await until(lambda: writer.errors >= 2)
        assert (writer.dropped, writer.pending) == (0, 1)
        await client.config_set("maxmemory", 0)
        assert await writer.flush(5)
        assert writer.written == 1


async def test_kill_under_load_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """kill -9 of the server, twice, while outcomes pour in: each one lands exactly once."""
    async with EmbeddedValkey(tmp_path) as server, open_store(server.url, per_task=100_000) as store:
        async with OutcomeWriter(store.outcomes, buffer=100_000, max_backoff=0.1, drain=30) as writer:
            for n in range(3_000):
                assert writer.put(make_outcome(n))
                if n % 10 == 0:
                    await asyncio.sleep(0.001)
                if n in (1_000, 2_000) and server.pid:
                    os.kill(server.pid, signal.SIGKILL)
                    await asyncio.sleep(0.05)
            assert await writer.flush(30)
            assert (writer.written, writer.dropped) == (3_000, 0)
            assert writer.errors > 0
        ids = [o.id for o in await store.outcomes.read("math", 10_000)]
        assert len(ids) == len(set(ids)) == 3_000
        assert server.restarts == 2
