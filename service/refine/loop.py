"""The worker: reads each task's outcomes once and keeps its monitor.

Whoever holds a task's monitor lease reads its stream; entries, state and acknowledgement meet in one atomic
checkpoint under the lease's fencing token. A worker killed at any line leaves entries pending that its state does not
account for, and the next one takes them over. So each entry counts exactly once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from service.core.types import Outcome
from service.errors import Conflict, DetotError, StoreUnavailable
from service.refine.monitor import Monitor, hear, judge, observe, publish, resume, same_text
from service.store import lease
from service.store.client import Store
from service.store.codec import decode_feedback, decode_outcome
from service.store.monitors import Entry

log = logging.getLogger(__name__)

Thresholds = Mapping[str, float | None]
Tasks = Mapping[str, Thresholds]
Watch = Callable[[str, dict[str, Any]], None]

CONSUMER = "worker"  # one name: only the lease's holder reads
_TRIM_EVERY = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker reads.

    Attributes:
        poll: seconds between looks at streams without news.
        batch: entries per checkpoint.
        retention: seconds that outcomes are kept.
        lease_ttl: seconds until another worker may take over from one that was killed.
        max_deliveries: an entry delivered this often without a checkpoint becomes a dead letter.
        same: whether a user's answer is the outcome's.
        watch: called with a task and what was published for it, and `lag`, the entries not accounted for yet.
    """

    poll: float = 0.2
    batch: int = 256
    retention: float = 7 * 86_400.0
    lease_ttl: float = 10.0
    max_deliveries: int = 3
    same: Callable[[str, Outcome], bool] = same_text
    watch: Watch = lambda task, published: None


async def run_worker(
    store: Store,
    tasks: Callable[[], Tasks | Awaitable[Tasks]],
    *,
    burst: bool = False,
    stop: asyncio.Event | None = None,
    options: WorkerOptions | None = None,
) -> int:
    """Reads the outcomes of all tasks until stopped; the number of entries accounted for.

    Args:
        tasks: the current tasks with their thresholds (see `monitor.breaches`), asked in every turn.
        burst: drain everything there is, then return.
        stop: set it to finish after the current step.

    Raises:
        StoreUnavailable: in burst mode only; otherwise the worker waits until Redis is back.
    """
    options, stop = options or WorkerOptions(), stop or asyncio.Event()
    readers: dict[str, TaskReader] = {}
    total = 0
    try:
        while not stop.is_set():
            handled = 0
            try:
                handled = await _turn(store, await _current(tasks), readers, options)
                total += handled
                if burst and not handled and not any([await r.behind() for r in readers.values()]):
                    break
            except StoreUnavailable as e:
                if burst:
                    raise
                log.warning("the worker waits for Redis: %s", e)
            if not handled:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), options.poll)
    finally:
        with suppress(StoreUnavailable):
            for reader in readers.values():
                await reader.leave()
    return total


async def _current(tasks: Callable[[], Tasks | Awaitable[Tasks]]) -> Tasks:
    found = tasks()
    return await found if inspect.isawaitable(found) else found


async def _turn(store: Store, tasks: Tasks, readers: dict[str, TaskReader], options: WorkerOptions) -> int:
    """One step of every task; the entries handled."""
    for gone in readers.keys() - tasks.keys():
        await readers.pop(gone).leave()
    total = 0
    for task, thresholds in tasks.items():
        if task not in readers:
            readers[task] = TaskReader(store, task, options)
        total += await readers[task].step(thresholds)
    return total


class TaskReader:
    """Reads one task's stream while it holds the task's monitor lease."""

    def __init__(self, store: Store, task: str, options: WorkerOptions) -> None:
        self._store, self._task, self._options = store, task, options
        self._token: int | None = None
        self._ready = self._recovering = False
        self._monitor = Monitor()
        self._breached: frozenset[str] = frozenset()
        self._tried: str | None = None
        self._renewed, self._trimmed = 0.0, -math.inf

    async def step(self, thresholds: Thresholds) -> int:
        """Handles the next entries, at most a batch; their number, 0 also while another worker holds the lease.

        Raises:
            StoreUnavailable: and forgets what it knows, to load it again at the next step.
        """
        try:
            if not self._ready and not await self._enter():
                return 0
            handled = await self._recover(thresholds) if self._recovering else await self._read(thresholds)
            if not handled and not await self._upkeep(thresholds):
                self._ready = False
        except Conflict:
            log.warning("task %s: another worker took over", self._task)
            self._ready, self._token = False, None
            return 0
        except DetotError:
            self._ready = False
            raise
        return handled

    async def behind(self) -> bool:
        """Whether another worker has the stream and has not read all of it."""
        return not self._ready and await self._store.monitors.backlog(self._task) > 0

    async def leave(self) -> None:
        """Gives the lease back, so that another worker can go on at once."""
        self._ready = False
        if self._token is not None:
            await self._store.lease.release(self._task, lease.MONITOR, self._token)
            self._token = None

    async def _enter(self) -> bool:
        leases, ttl = self._store.lease, self._options.lease_ttl
        if self._token is None or not await leases.renew(self._task, lease.MONITOR, self._token, ttl):
            self._token = await leases.acquire(self._task, lease.MONITOR, ttl)
            if self._token is None:
                return False
        await self._store.monitors.open(self._task)
        self._monitor = resume(await self._store.monitors.load(self._task))
        self._ready = self._recovering = True
        self._renewed = time.monotonic()
        return True

    async def _recover(self, thresholds: Thresholds) -> int:
        """What an earlier reader took and did not account for, one entry at a time."""
        found = await self._store.monitors.reclaim(self._task, CONSUMER)
        if found is None:
            self._recovering = False
            return await self._read(thresholds)
        entry, deliveries = found
        if entry is None:
            return 1
        survived, self._tried = self._tried == entry[0], entry[0]
        if deliveries >= self._options.max_deliveries and not survived:  # it may be what kills its readers
            reason = f"delivered {deliveries} times without a checkpoint"
            await self._checkpoint(self._monitor, [entry], {entry[0]: reason}, thresholds)
        else:
            await self._handle([entry], thresholds)
        return 1

    async def _read(self, thresholds: Thresholds) -> int:
        entries = await self._store.monitors.read(self._task, CONSUMER, self._options.batch)
        if entries:
            await self._handle(entries, thresholds)
        return len(entries)

    async def _handle(self, entries: list[Entry], thresholds: Thresholds) -> None:
        wanted = {fields[b"of"].decode(errors="replace") for _, fields in entries if b"of" in fields}
        outcomes = await self._store.monitors.outcomes(self._task, wanted)
        monitor, dead = self._monitor, {}
        for name, fields in entries:
            try:
                monitor = self._account(monitor, fields, outcomes)
            except Exception as e:  # pure code on one entry: it would fail again
                dead[name] = f"{type(e).__name__}: {e}"[:500]
        await self._checkpoint(monitor, entries, dead, thresholds)

    def _account(self, monitor: Monitor, fields: dict[bytes, bytes], outcomes: Mapping[str, Outcome]) -> Monitor:
        if b"outcome" in fields:
            return observe(monitor, decode_outcome(fields[b"outcome"]))
        if b"feedback" in fields:
            said = decode_feedback(fields[b"feedback"], task=self._task, request_id=fields[b"id"].decode())
            outcome = outcomes.get(fields[b"of"].decode())
            correct = judge(said, outcome, self._options.same)
            if correct is None:
                return monitor
            return hear(monitor, said.request_id, outcome.arm if outcome else "unknown", correct)
        raise ValueError(f"an entry with neither outcome nor feedback: {sorted(fields)}")

    async def _checkpoint(
        self, monitor: Monitor, entries: list[Entry], dead: Mapping[str, str], thresholds: Thresholds
    ) -> None:
        assert self._token is not None
        if dead:
            log.warning("task %s: %d dead letters: %s", self._task, len(dead), next(iter(dead.values())))
        names = [name for name, _ in entries]
        monitor = replace(monitor, cursor=max(monitor.cursor, names[-1], key=_position), dead=monitor.dead + len(dead))
        published = publish(self._task, monitor, thresholds)
        await self._store.monitors.checkpoint(
            self._task, published, token=self._token, ttl=self._options.lease_ttl, done=names, dead=dead
        )
        self._monitor, self._renewed = monitor, time.monotonic()
        await self._tell(published)

    async def _upkeep(self, thresholds: Thresholds) -> bool:
        """Between entries: keeps the lease, trims, reports. False if the lease was lost."""
        now = time.monotonic()
        if now - self._renewed > self._options.lease_ttl / 3:
            assert self._token is not None
            if not await self._store.lease.renew(self._task, lease.MONITOR, self._token, self._options.lease_ttl):
                return False
            self._renewed = now
            await self._tell(publish(self._task, self._monitor, thresholds))
        if now - self._trimmed > _TRIM_EVERY:
            await self._store.outcomes.trim(self._task, self._options.retention)
            self._trimmed = now
        return True

    async def _tell(self, published: dict[str, Any]) -> None:
        missed = frozenset(b["name"] for b in published["breaches"])
        for breach in published["breaches"]:
            if breach["name"] not in self._breached:
                log.warning("task %s: %s", self._task, breach)
        self._breached = missed
        lag = await self._store.monitors.backlog(self._task)
        self._options.watch(self._task, {**published, "lag": lag})


def _position(entry: str) -> tuple[int, int]:
    ms, _, seq = entry.partition("-")
    return int(ms), int(seq)
