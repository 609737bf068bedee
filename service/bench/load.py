"""A light load generator for one loopback port.

As a process of its own: `python -m service.bench.load '<Load as JSON>'` prints a LoadResult as JSON. Requests are built
before the clock starts; each connection carries one request at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import cast

import httptools
import uvloop

from service.bench.traffic import chat_requests
from service.errors import InvalidRequest

HOST = "127.0.0.1"  # load goes to this machine only
MAX_SECONDS, MAX_CONNECTIONS, MAX_REQUESTS, MAX_RATE = 60.0, 512, 200_000, 50_000.0
GRACE = 5.0  # seconds that requests in flight get to finish
_SHORTEST_BODY = 16  # bytes; a shorter answer counts as an error


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    Attributes:
        port: where to, on 127.0.0.1.
        connections: kept open all the time, at most 512.
        seconds: length of the run, at most 60.
        rate: arrivals per second at constant distance (open loop); None: each connection sends its next request as
            soon as it has its answer (closed loop).
        seed: of the questions; different seeds give different ones.
        count: most requests of the run, at most 200,000.
    """

    port: int
    connections: int = 32
    seconds: float = 5.0
    rate: float | None = None
    seed: int = 0
    count: int = 50_000

    def check(self) -> None:
        """Raises InvalidRequest naming the value and its bound."""
        bounds: dict[str, tuple[float, float, float]] = {
            "port": (self.port, 1, 65_535),
            "connections": (self.connections, 1, MAX_CONNECTIONS),
            "seconds": (self.seconds, 0.01, MAX_SECONDS),
            "count": (self.count, 1, MAX_REQUESTS),
            "rate": (1.0 if self.rate is None else self.rate, 0.1, MAX_RATE),
        }
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise InvalidRequest(f"{name} is {value}; it must lie in [{low}, {high}]")


@dataclass(slots=True)
class LoadResult:
    """What came back.

    Attributes:
        sent, ok: requests sent, and answered with status 200 and a body.
        errors: by kind: `status <n>`, `short body`, `connection`, `unanswered`.
        elapsed_s: from the first request to the last answer.
        latencies_ms: of the good answers, in order of arrival; in an open loop from the *scheduled* time of sending,
            so that a stalled server cannot hide its stall by stopping the clock (no coordinated omission).
        lag_ms: open loop: how late each request was sent; part of its latency.
        body_bytes: mean length of the good answers' bodies.
        cpu_us: CPU time of the generator per request, in microseconds.
    """

    sent: int = 0
    ok: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    body_bytes: float = 0.0
    cpu_us: float = 0.0

    def count(self, error: str, times: int = 1) -> None:
        self.errors[error] = self.errors.get(error, 0) + times

    @property
    def per_second(self) -> float:
        return self.ok / self.elapsed_s if self.elapsed_s else 0.0


async def run_load(load: Load) -> LoadResult:
    """Send the load and measure.

    Raises:
        InvalidRequest: a value out of bounds, or nothing listens there.
    """
    load.check()
    count = load.count if load.rate is None else min(load.count, int(load.rate * load.seconds))
    run = _Run(load, chat_requests(f"{HOST}:{load.port}", load.seed, count))
    try:
        await run.connect()
        gc.collect()
        gc.disable()  # a collection would show as latency of the server
        return await run.measure()
    finally:
        gc.enable()
        run.close()


class _Run:
    """One run: its connections, what is still to be sent, and what was measured."""

    def __init__(self, load: Load, requests: list[bytes]) -> None:
        self.load, self.requests, self.result = load, requests, LoadResult()
        self.connections: list[_Connection] = []
        self.idle: deque[_Connection] = deque()
        self.waiting: deque[float] = deque()  # scheduled times of arrivals that found no idle connection
        self.loop = asyncio.get_running_loop()
        self.open = self.due = self.in_flight = self.body_bytes = 0
        self.start = self.end = self.last = 0.0
        self.finished = asyncio.Event()
        self.timer = _Timer(self.loop, self.arrive)

    async def connect(self) -> None:
        for _ in range(self.load.connections):
            try:
                _, c = await self.loop.create_connection(lambda: _Connection(self), HOST, self.load.port)
            except OSError as e:
                raise InvalidRequest(f"nothing answers at {HOST}:{self.load.port}: {e.strerror}") from e
            self.connections.append(c)
        self.idle.extend(self.connections)
        self.open = len(self.idle)

    async def measure(self) -> LoadResult:
        self.start, cpu = time.perf_counter(), time.process_time()
        self.end = self.start + self.load.seconds
        if self.load.rate is None:
            for _ in range(self.open):
                self.free(self.idle.popleft())
        else:
            self.arrive()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.finished.wait(), self.load.seconds + GRACE)
        result = self.result
        if unanswered := self.in_flight + len(self.waiting):
            result.count("unanswered", unanswered)
        result.elapsed_s = (self.last or self.end) - self.start
        result.cpu_us = (time.process_time() - cpu) * 1e6 / max(result.sent, 1)
        result.body_bytes = self.body_bytes / max(result.ok, 1)
        return result

    def close(self) -> None:
        self.timer.close()
        for connection in self.connections:
            connection.transport.abort()

    def arrive(self) -> None:
        """Open loop: send all that is due, come back when the next one is."""
        assert self.load.rate is not None
        while self.due < len(self.requests):
            scheduled = self.start + self.due / self.load.rate
            ahead = scheduled - time.perf_counter()
            if ahead > 0:
                self.timer.set(ahead)
                return
            self.due += 1
            if self.idle:
                self.idle.popleft().send(scheduled)
            else:
                self.waiting.append(scheduled)
        self.check_finished()

    def free(self, connection: _Connection) -> None:
        """A connection has its answer; give it the next request, if there is one."""
        if self.load.rate is not None:
            if self.waiting:
                connection.send(self.waiting.popleft())
                return
        elif (now := time.perf_counter()) < self.end and self.result.sent < len(self.requests):
            connection.send(now)
            return
        self.idle.append(connection)
        self.check_finished()

    def check_finished(self) -> None:
        arrived = self.load.rate is None or self.due == len(self.requests)
        if self.open == 0 or (arrived and not self.in_flight and not self.waiting):
            self.finished.set()


class _Timer:
    """Calls back once after a time: by a Linux timerfd, exact to some 50 microseconds, because the timers of event
    loops are exact to a millisecond only, which would be added to the latencies. Elsewhere by the loop's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC) if self._libc else -1
        if self._fd >= 0:
            loop.add_reader(self._fd, self._fire)

    def set(self, seconds: float) -> None:
        if self._fd < 0 or self._libc is None:
            self._loop.call_later(seconds, self._callback)
            return
        whole = int(seconds)
        nanoseconds = max(1, int((seconds - whole) * 1e9))
        self._libc.timerfd_settime(self._fd, 0, struct.pack("@llll", 0, 0, whole, nanoseconds), None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fire(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 8)
            self._callback()


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, run: _Run) -> None:
        self.run, self.scheduled, self.size, self.alive = run, 0.0, 0, False
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none of asyncio's classes

    def send(self, scheduled: float) -> None:
        run = self.run
        self.scheduled, self.size, self.alive = scheduled, 0, True
        if run.load.rate is not None:
            run.result.lag_ms.append((time.perf_counter() - scheduled) * 1e3)
        self.transport.write(run.requests[run.result.sent])
        run.result.sent += 1
        run.in_flight += 1

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self.size += len(body)

    def on_message_complete(self) -> None:
        run, result, status = self.run, self.run.result, self.parser.get_status_code()
        run.last = time.perf_counter()
        if status != 200:
            result.count(f"status {status}")
        elif self.size < _SHORTEST_BODY:
            result.count("short body")
        else:
            result.ok += 1
            run.body_bytes += self.size
            result.latencies_ms.append((run.last - self.scheduled) * 1e3)
        run.in_flight -= 1
        self.alive = False
        run.free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        run = self.run
        run.open -= 1
        if self.alive:
            self.alive = False
            run.in_flight -= 1
            run.result.count("connection")
        elif self in run.idle:
            run.idle.remove(self)
        run.check_finished()


def main(args: list[str]) -> None:
    result = uvloop.run(run_load(Load(**json.loads(args[0]))))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
