from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service.core.types import Arm, Feedback
from service.errors import StoreUnavailable
from service.refine.loop import TaskReader, WorkerOptions, run_worker
from service.store import keys, lease
from service.store.client import Store, open_store
from service.store.codec import encode_outcome
from service.store.embedded import EmbeddedValkey
from tests.valkey import make_outcome, until

TASKS: dict[str, dict[str, float | None]] = {"math": {"consensus": 0.9}, "choice": {}}


async def _append(store: Store, numbers: Sequence[int], task: str = "math", **changes: Any) -> None:
    batch = [(o.id, encode_outcome(o)) for o in (make_outcome(n, task, **changes) for n in numbers)]
    assert (await store.outcomes.append({task: batch}))[task] == len(batch)


async def _burst(store: Store, tasks: dict[str, dict[str, float | None]] = TASKS, **options: Any) -> int:
    return await run_worker(store, lambda: tasks, burst=True, options=WorkerOptions(poll=0.02, **options))


async def _monitor(store: Store, task: str = "math") -> dict[str, Any]:
    published = await store.monitors.read_monitor(task)
    assert published is not None
    return published


async def test_burst_drains_everything_and_returns(store: Store) -> None:
    await _append(store, range(600))
    await _append(store, range(5), "choice", arm=Arm.CONTROL)
    assert await _burst(store, batch=256) == 605
    math, choice = await _monitor(store), await _monitor(store, "choice")
    assert (math["outcomes"], math["lag"], math["dead"]) == (600, 0, 0)
    assert math["arms"]["all"]["consensus"] == pytest.approx(2 / 3)
    assert [b["name"] for b in math["breaches"]] == ["consensus"]
    assert (choice["outcomes"], list(choice["arms"])) == (5, ["all", "control"])
    assert "state" not in math
    assert await _burst(store) == 0


async def test_nothing_to_do(store: Store) -> None:
    assert await _burst(store) == 0
    assert await store.monitors.read_monitor("math") is None
    assert await run_worker(store, dict, burst=True) == 0


async def test_lag_counts_what_no_checkpoint_accounts_for(store: Store) -> None:
    await _append(store, range(7))
    assert await store.monitors.backlog("math") == 7
    await store.monitors.open("math")
    assert await store.monitors.backlog("math") == 7
    assert len(await store.monitors.read("math", "worker", 3)) == 3
    assert await store.monitors.backlog("math") == 7, "read, but not accounted for"
    await _burst(store)
    await _append(store, [7, 8])
    assert (await _monitor(store))["lag"] == 2


async def test_monitors_go_on_after_a_restart(store: Store) -> None:
    for start in (0, 10, 20):
        await _append(store, range(start, start + 10))
        await _burst(store)
    assert (await _monitor(store))["outcomes"] == 30


async def test_feedback_counts_once_by_arm_and_the_last_word_wins(store: Store) -> None:
    await _append(store, [1, 2])
    await _append(store, [3], arm=Arm.CONTROL)
    say = store.outcomes.feedback
    await say(Feedback("r-math-1", "math", answer="42"))
    await say(Feedback("r-math-2", "math", correct=True))
    await say(Feedback("r-math-3", "math", score=0.1))
    await _burst(store)
    arms = (await _monitor(store))["arms"]
    assert [arms[a]["accuracy"] for a in ("champion", "control", "all")] == [1.0, 0.0, pytest.approx(2 / 3)]
    await say(Feedback("r-math-2", "math", correct=False))
    await say(Feedback("r-math-2", "math", correct=False))
    await _burst(store)
    published = await _monitor(store)
    assert (published["feedback"], published["arms"]["champion"]["accuracy"]) == (3, 0.5)


async def test_malformed_entries_become_dead_letters_at_once(store: Store, raw: Redis) -> None:
    stream = keys.outcomes("math")
    await _append(store, [1])
    broken: list[dict[Any, Any]] = [{"outcome": "{"}, {"outcome": b"\xff"}, {"what": "ever"}]
    for fields in [*broken, {"feedback": "[]", "id": "r", "of": "no entry"}]:
        await raw.xadd(stream, fields)
    newer = encode_outcome(make_outcome(2)).replace(b'"v":1', b'"v":99')
    await raw.xadd(stream, {"id": "r-math-2", "outcome": newer})
    await _append(store, [3])
    assert await _burst(store) == 7
    published = await _monitor(store)
    assert (published["outcomes"], published["dead"], published["lag"]) == (2, 5, 0)
    letters = await store.monitors.dead("math")
    assert len(letters) == 5
    assert "format 99" in letters[0]["reason"]
    assert letters[0]["id"] == "r-math-2", "a dead letter keeps its fields"
    assert "neither outcome nor feedback" in letters[2]["reason"]


async def test_an_entry_delivered_too_often_becomes_a_dead_letter(store: Store, raw: Redis) -> None:
    """As if a worker died over the first entry again and again; the second one it never got to."""
    await _append(store, [1, 2])
    await store.monitors.open("math")
    (first, _), _ = await store.monitors.read("math", "worker", 2)
    for _ in range(2):
        await store.monitors.reclaim("math", "worker")
    await _burst(store, max_deliveries=3)
    (letter,) = await store.monitors.dead("math")
    assert (letter["entry"], letter["id"]) == (first, "r-math-1")
    assert "3 times" in letter["reason"]
    published = await _monitor(store)
    assert (published["outcomes"], published["dead"], published["lag"]) == (1, 1, 0)


async def test_store_errors_are_no_fault_of_the_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await _append(store, [1])
    reader = TaskReader(store, "math", WorkerOptions())
    with monkeypatch.context() as broken:
        broken.setattr(store.monitors, "checkpoint", _raise)
        for _ in range(6):
            with pytest.raises(StoreUnavailable):
                await reader.step({})
    while await reader.step({}):
        pass
    assert (await _monitor(store))["outcomes"] == 1
    assert await store.monitors.dead("math") == []
    await reader.leave()


async def _raise(*_: object, **__: object) -> None:
    raise StoreUnavailable("gone")


STEPS = ("acquire", "open", "load", "read", "outcomes", "checkpoint", "backlog")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_dying_around_any_step_loses_and_repeats_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """The worker dies (nothing is cleaned up) at the second time it reaches a step; another one finishes."""
    await _append(store, range(25))
    await store.outcomes.feedback(Feedback("r-math-3", "math", correct=True))
    part: Any = store.lease if step == "acquire" else store.monitors
    original, calls = getattr(part, step), 0

    async def deadly(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        calls += 1
        mortal = calls >= (1 if step in ("acquire", "open", "load") else 2)
        if mortal and when == "before":
            raise RuntimeError("killed")
        result = await original(*args, **kw)
        if mortal:
            raise RuntimeError("killed")
        return result

    reader = TaskReader(store, "math", WorkerOptions(batch=10, lease_ttl=0.1))
    with monkeypatch.context() as doomed, pytest.raises(RuntimeError, match="killed"):
        doomed.setattr(part, step, deadly)
        while True:
            await reader.step({})
    await _burst(store, batch=10, lease_ttl=0.1)
    published = await _monitor(store)
    assert (published["outcomes"], published["feedback"], published["dead"], published["lag"]) == (25, 1, 0, 0)


_WORKER = """
import asyncio, sys
from service.refine.loop import WorkerOptions, run_worker
from service.store.client import open_store

async def main():
    async with open_store(sys.argv[1]) as store:
        options = WorkerOptions(poll=0.01, batch=7, lease_ttl=0.2, max_deliveries=1000,
                                watch=lambda task, published: print(published["outcomes"], flush=True))
        await run_worker(store, lambda: {"math": {}, "choice": {}}, options=options)

asyncio.run(main())
"""


async def test_workers_killed_for_real_count_exactly(valkey: EmbeddedValkey) -> None:
    """Two worker processes at a time, kill -9 at random moments, outcomes pouring in: the counts are exact."""
    rng = random.Random(7)
    async with open_store(valkey.url) as store:
        written = 0
        for _ in range(3):
            workers = [_start_worker(valkey.url) for _ in range(2)]
            for task in TASKS:
                await _append(store, range(written, written + 400), task)
            written += 400
            await asyncio.to_thread(_read_lines, workers, rng.randint(1, 20))
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
                worker.communicate()
        await _burst(store, lease_ttl=0.2, max_deliveries=1000)
        for task in TASKS:
            published = await _monitor(store, task)
            assert (published["outcomes"], published["dead"], published["lag"]) == (written, 0, 0)


def _start_worker(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _WORKER, url], stdout=subprocess.PIPE)


def _read_lines(workers: list[subprocess.Popen[bytes]], lines: int) -> None:
    """Waits for some checkpoints of whichever worker holds a lease."""
    streams = [w.stdout for w in workers if w.stdout is not None]
    for _ in range(lines):
        ready, _, _ = select.select(streams, [], [], 30)
        ready[0].readline()


async def test_one_worker_reads_and_the_other_takes_over(store: Store) -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    stops = {name: asyncio.Event() for name in seen}

    def worker(name: str) -> asyncio.Task[int]:
        options = WorkerOptions(poll=0.01, batch=5, watch=lambda _, published: seen[name].append(published["outcomes"]))
        return asyncio.create_task(run_worker(store, lambda: {"math": {}}, stop=stops[name], options=options))

    first = worker("a")
    await _append(store, range(20))
    await until(lambda: 20 in seen["a"])
    second = worker("b")
    await _append(store, range(20, 40))
    await until(lambda: 40 in seen["a"])
    assert seen["b"] == []
    stops["a"].set()
    assert await first == 40
    await _append(store, range(40, 60))
    await until(lambda: 60 in seen["b"])
    stops["b"].set()
    assert await second == 20


async def test_a_worker_that_slept_through_its_lease_changes_nothing(store: Store) -> None:
    await _append(store, range(5))
    sleeper = TaskReader(store, "math", WorkerOptions(lease_ttl=0.05, batch=2))
    assert await sleeper.step({}) == 2
    await asyncio.sleep(0.1)
    heir = TaskReader(store, "math", WorkerOptions(lease_ttl=10))
    assert await heir.step({}) == 3
    await _append(store, [5, 6])
    assert await sleeper.step({}) == 0, "its checkpoint is refused"
    while await heir.step({}):
        pass
    assert await store.monitors.backlog("math") == 2, "what the sleeper took is pending"
    await heir.leave()
    await _burst(store)
    assert (await _monitor(store))["outcomes"] == 7


async def test_it_waits_for_redis_and_recovers(tmp_path: Path) -> None:
    counts: list[int] = []
    stop = asyncio.Event()
    options = WorkerOptions(poll=0.02, lease_ttl=0.5, watch=lambda _, published: counts.append(published["outcomes"]))
    with EmbeddedValkey(tmp_path) as server:
        async with open_store(server.url) as store:
            server.stop()
            worker = asyncio.create_task(run_worker(store, lambda: {"math": {}}, stop=stop, options=options))
            await asyncio.sleep(0.1)
            server.start()
            await _append(store, range(10))
            await until(lambda: 10 in counts)
            server.stop()
            await asyncio.sleep(0.1)
            server.start()
            await _append(store, range(10, 20))
            await until(lambda: 20 in counts)
            stop.set()
            assert await worker == 20
            server.stop()
            with pytest.raises(StoreUnavailable):
                await run_worker(store, lambda: {"math": {}}, burst=True)
            server.start()


async def test_it_recovers_when_redis_lost_everything(store: Store, raw: Redis) -> None:
    counts: list[int] = []
    stop = asyncio.Event()
    options = WorkerOptions(poll=0.02, watch=lambda _, published: counts.append(published["outcomes"]))
    worker = asyncio.create_task(run_worker(store, lambda: {"math": {}}, stop=stop, options=options))
    await _append(store, range(10))
    await until(lambda: 10 in counts)
    await raw.flushdb()
    await raw.function_flush("SYNC")
    await _append(store, range(3))
    await until(lambda: counts[-1] == 3)
    stop.set()
    await worker


async def test_new_and_gone_tasks(store: Store) -> None:
    counts: dict[str, int] = {}
    tasks: dict[str, dict[str, float]] = {"math": {}}
    stop = asyncio.Event()

    async def current() -> dict[str, dict[str, float]]:
        return dict(tasks)

    options = WorkerOptions(poll=0.02, watch=lambda task, published: counts.update({task: published["outcomes"]}))
    worker = asyncio.create_task(run_worker(store, current, stop=stop, options=options))
    await _append(store, [1])
    await until(lambda: counts == {"math": 1})
    del tasks["math"]
    tasks["quiz"] = {}
    await _append(store, [1, 2], "quiz")
    await until(lambda: counts == {"math": 1, "quiz": 2})
    assert await store.lease.acquire("math", lease.MONITOR, 1), "the lease of a gone task is given back"
    stop.set()
    await worker


async def test_retention(store: Store) -> None:
    await _append(store, range(5))
    await asyncio.sleep(0.15)
    await _append(store, [5])
    await _burst(store, retention=0.1)
    assert (await _monitor(store))["outcomes"] == 6, "read before it was trimmed"
    assert [o.id for o in await store.outcomes.read("math")] == ["r-math-5"]


async def test_entries_trimmed_while_pending_do_not_stop_the_worker(store: Store, raw: Redis) -> None:
    await _append(store, range(5))
    await store.monitors.open("math")
    await store.monitors.read("math", "worker", 3)
    await raw.xtrim(keys.outcomes("math"), maxlen=1, approximate=False)
    await _burst(store)
    published = await _monitor(store)
    assert (published["outcomes"], published["lag"]) == (1, 0)
