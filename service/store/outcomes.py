"""Outcomes: written in batches off the request path, deduplicated by id, read newest first.

At-least-once delivery plus dedup inside the append function gives each outcome exactly one stream entry.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import ClusterDownError, OutOfMemoryError, ReadOnlyError, ResponseError, TryAgainError

from service.core.types import Feedback, Outcome
from service.errors import StoreUnavailable
from service.store import keys
from service.store.codec import decode_outcome, encode_feedback, encode_outcome
from service.store.functions import call, function_name, is_missing, load, redis_errors, reply

log = logging.getLogger(__name__)

_PASSING = (ClusterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
_PASSING_CODES = ("BUSY", "MISCONF", "NOREPLICAS", "UNKILLABLE")


class OutcomeStore:
    """Outcomes and feedback of all tasks. All methods raise StoreUnavailable.

    Args:
        request: client of the request path (short timeouts).
        background: client for bulk reads and writes.
        per_task: stream entries kept per task, about (a stream is trimmed in blocks).
    """

    def __init__(self, request: Redis, background: Redis, *, per_task: int = 10_000) -> None:
        self._request, self._background = request, background
        self._kept = max(per_task, keys.DEDUP_MIN)
        self._per_task = per_task

    async def append(self, batches: Mapping[str, Sequence[tuple[str, bytes]]]) -> dict[str, int | Exception]:
        """Appends `(id, encoded outcome)` pairs by task, each task in one atomic step, all in one round trip.

        Returns:
            By task the number of new entries (ids seen before are skipped), or the error that refused its batch.
        """
        with redis_errors():
            results = await self._append(batches)
            if any(is_missing(r) for r in results):
                await load(self._background)
                results = await self._append(batches)
        return dict(zip(batches, results, strict=True))

    async def _append(self, batches: Mapping[str, Sequence[tuple[str, bytes]]]) -> list[int | Exception]:
        async with self._background.pipeline(transaction=False) as pipe:
            for task, batch in batches.items():
                flat = (part for pair in batch for part in pair)
                pipe.fcall(function_name("append"), 3, *_keys(task), self._per_task, self._kept, *flat)
            return await pipe.execute(raise_on_error=False)

    async def read(self, task: str, count: int = 20) -> list[Outcome]:
        """The newest outcomes, newest first; feedback and unreadable entries are skipped."""
        found: list[Outcome] = []
        before = "+"
        while len(found) < count:
            page = self._background.xrevrange(keys.outcomes(task), before, "-", count=max(count, 100))
            entries = await reply(page)
            if not entries:
                break
            found += _decoded(fields for _, fields in entries)
            before = "(" + entries[-1][0].decode()
        return found[:count]

    async def get(self, task: str, request_id: str) -> Outcome | None:
        """The recorded outcome of one request, None if there is none."""
        entries = await call(self._request, "find", _keys(task)[:2], [request_id])
        found = _decoded(dict(zip(raw[::2], raw[1::2], strict=True)) for _, raw in entries)
        return next((outcome for outcome in found if outcome.id == request_id), None)

    async def locate(self, request_id: str, tasks: Iterable[str]) -> str | None:
        """The task, among the given ones, that recorded this request."""
        names = list(tasks)
        with redis_errors():
            async with self._request.pipeline(transaction=False) as pipe:
                for task in names:
                    pipe.zscore(keys.seen(task), request_id)
                scores = await pipe.execute()
        return next((task for task, score in zip(names, scores, strict=True) if score is not None), None)

    async def feedback(self, feedback: Feedback) -> bool:
        """Records feedback; the last word wins. True if the same feedback was there already.

        Raises:
            NotFound: no outcome of that request is recorded for that task.
        """
        args = [self._per_task, feedback.request_id, encode_feedback(feedback)]
        return bool(await call(self._request, "feedback", _keys(feedback.task), args))

    async def trim(self, task: str, retention: float) -> int:
        """Removes what is older than `retention` seconds, feedback included; the number of stream entries."""
        seconds, micros = await reply(self._background.time())
        oldest = max(0, int((seconds + micros / 1e6 - retention) * 1000))
        return int(await call(self._background, "trim", _keys(task), [oldest]))


def _keys(task: str) -> list[str]:
    return [keys.outcomes(task), keys.seen(task), keys.feedback(task)]


def _decoded(entries: Iterable[Mapping[bytes, bytes]]) -> list[Outcome]:
    found = []
    for fields in entries:
        if b"outcome" in fields:
            with suppress(ValueError):
                found.append(decode_outcome(fields[b"outcome"]))
    return found


class OutcomeWriter:
    """A bounded buffer between requests and Redis. `put` never waits and never raises.

    While Redis is away the buffer fills and then the newest outcomes are dropped, so that a short outage loses
    nothing. Use as an async context manager; leaving it flushes for up to `drain` seconds.

    Attributes:
        written: outcomes that Redis has (retries of the same one count once).
        dropped: outcomes lost: buffer full, refused by Redis, or not serialisable.
        errors: failed attempts to write.
        pending: outcomes buffered or being written.
    """

    def __init__(
        self,
        store: OutcomeStore,
        *,
        buffer: int = 10_000,
        buffer_bytes: int = 256 * 2**20,
        batch: int = 64,
        interval: float = 0.05,
        max_backoff: float = 2.0,
        prompt_chars: int = 16_384,
        token_ids: int = 32_768,
        drain: float = 2.0,
    ) -> None:
        self._store, self._limit, self._limit_bytes = store, buffer, buffer_bytes
        self._batch, self._interval, self._max_backoff, self._drain = batch, interval, max_backoff, drain
        self._cut = {"prompt_chars": prompt_chars, "token_ids": token_ids}
        self._buffer: deque[Outcome] = deque()
        self._bytes = self._writing = 0
        self._arrived, self._full, self._empty = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self.written = self.dropped = self.errors = 0

    @property
    def pending(self) -> int:
        return len(self._buffer) + self._writing

    def put(self, outcome: Outcome) -> bool:
        """Hands over an outcome; False (and counted as dropped) if the buffer is full. Event-loop thread only."""
        size = _weight(outcome)
        if self.pending >= self._limit or self._bytes + size > self._limit_bytes:
            self.dropped += 1
            return False
        self._bytes += size
        self._buffer.append(outcome)
        if len(self._buffer) == 1:
            self._arrived.set()
            self._empty.clear()
        elif len(self._buffer) == self._batch:
            self._full.set()
        return True

    async def flush(self, timeout: float) -> bool:
        """Writes without waiting for a batch to gather; True once nothing is pending, False after `timeout` s."""
        self._full.set()
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def __aenter__(self) -> OutcomeWriter:
        self._task = asyncio.create_task(self._run(), name="outcome-writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        if not await self.flush(self._drain):
            log.warning("%d outcomes were not written before shutdown", self.pending)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._interval)
            self._full.clear()
            while self._buffer:
                await self._write([self._buffer.popleft() for _ in range(min(self._batch, len(self._buffer)))])
            self._empty.set()

    async def _write(self, outcomes: list[Outcome]) -> None:
        self._writing = len(outcomes)
        batches = self._encode(outcomes)
        backoff = 0.05
        while batches:
            batches = await self._attempt(batches)
            self._writing = sum(map(len, batches.values()))
            if batches:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, self._max_backoff)
        self._bytes -= sum(map(_weight, outcomes))

    def _encode(self, outcomes: list[Outcome]) -> dict[str, list[tuple[str, bytes]]]:
        batches: dict[str, list[tuple[str, bytes]]] = {}
        for outcome in outcomes:
            try:
                body = encode_outcome(outcome, **self._cut)
            except Exception as e:  # one odd outcome must not stop the others
                self.dropped += 1
                log.warning("outcome %s cannot be serialised: %s", outcome.id, e)
            else:
                batches.setdefault(outcome.task, []).append((outcome.id, body))
        return batches

    async def _attempt(self, batches: dict[str, list[tuple[str, bytes]]]) -> dict[str, list[tuple[str, bytes]]]:
        """One round trip; what has to be tried again."""
        try:
            results = await self._store.append(batches)
        except StoreUnavailable as e:
            self._failed(e)
            return batches
        again = {}
        for task, result in results.items():
            if not isinstance(result, Exception):
                self.written += len(batches[task])
                continue
            self._failed(result)
            if _passing(result):
                again[task] = batches[task]
            else:
                self.dropped += len(batches[task])
        return again

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if self.errors == 1 or self.errors % 100 == 0:
            log.warning("outcomes cannot be written (%d pending): %s", self.pending, error)


def _weight(outcome: Outcome) -> int:
    """Rough bytes of memory, from counts that are there anyway: ids are 36 bytes each in a tuple of ints."""
    return 2_000 + 36 * outcome.completion_tokens + 8 * outcome.prompt_tokens


def _passing(error: Exception) -> bool:
    """Whether trying again can help. A wrong key type, say, cannot be waited out."""
    if isinstance(error, ResponseError) and not isinstance(error, _PASSING):
        return str(error).startswith(_PASSING_CODES) or is_missing(error)
    return True
