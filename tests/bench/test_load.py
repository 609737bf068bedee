"""The load generator against real sockets: what it sends, what it counts, and that a stall cannot hide."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from service.bench import load as module
from service.bench.load import Load, run_load
from service.bench.traffic import chat_requests, word_problems
from service.errors import InvalidRequest
from service.tasks.catalogue import load_catalogue
from service.tasks.classify import Classifier
from tests.live import free_port

Answer = Callable[[int], Awaitable[bytes | None]]  # number of the request -> raw answer, None closes the connection


def response(status: int = 200, body: bytes = b"x" * 100) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[int, list[bytes]]]:
    """An HTTP server that answers as told; yields its port and the bodies it has got."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                reply = await answer(len(bodies) - 1)
                if reply is None:
                    return
                writer.write(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield running.sockets[0].getsockname()[1], bodies
    finally:
        running.close()


async def good(_: int) -> bytes:
    return response()


async def test_closed_loop_sends_each_request_once_and_times_each_answer():
    async with server(good) as (port, bodies):
        result = await run_load(Load(port, connections=4, seconds=20, count=200))
    assert (result.sent, result.ok, result.errors, result.body_bytes) == (200, 200, {}, 100)
    assert len(result.latencies_ms) == 200 and min(result.latencies_ms) > 0
    assert result.per_second == pytest.approx(200 / result.elapsed_s)
    assert len(set(bodies)) == 200


async def test_closed_loop_ends_in_time():
    async with server(good) as (port, _):
        result = await run_load(Load(port, connections=2, seconds=0.2))
    assert 0 < result.ok == result.sent < 50_000 and not result.errors


async def test_open_loop_sends_what_the_rate_says():
    async with server(good) as (port, bodies):
        result = await run_load(Load(port, connections=4, seconds=0.5, rate=200))
    assert (result.sent, result.ok, len(bodies), len(result.lag_ms)) == (100, 100, 100, 100)
    assert result.elapsed_s >= 99 / 200
    assert min(result.lag_ms) >= 0 and all(a >= 0 for a in result.latencies_ms)


async def test_open_loop_counts_the_wait_behind_a_stall():
    """The first answer takes 0.5 s on the only connection: all requests scheduled meanwhile waited, and must say so."""

    async def stall(number: int) -> bytes:
        await asyncio.sleep(0.5 if number == 0 else 0)
        return response()

    async with server(stall) as (port, _):
        result = await run_load(Load(port, connections=1, seconds=0.6, rate=100))
    assert result.ok == 60
    assert result.latencies_ms[0] >= 499
    assert all(result.latencies_ms[i] >= 499 - 10 * i for i in range(1, 49))


async def test_what_is_no_good_answer_is_counted_by_kind():
    async def odd(number: int) -> bytes | None:
        return [response(), response(503), response(body=b"{}"), b"not http\r\n\r\n", response()][number]

    async with server(odd) as (port, _):
        result = await run_load(Load(port, connections=1, seconds=5, count=5))
    assert (result.sent, result.ok) == (4, 1)  # a broken connection is not opened again
    assert result.errors == {"status 503": 1, "short body": 1, "connection": 1}


async def test_a_closed_connection_is_an_error_and_the_others_go_on():
    async def leave(number: int) -> bytes | None:
        return None if number == 0 else response()

    async with server(leave) as (port, _):
        result = await run_load(Load(port, connections=2, seconds=5, count=20))
    assert (result.sent, result.ok, result.errors) == (20, 19, {"connection": 1})


async def test_requests_without_an_answer_are_counted(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.1)

    async def never(_: int) -> bytes:
        await asyncio.sleep(30)
        return b""

    async with server(never) as (port, _):
        result = await run_load(Load(port, connections=2, seconds=0.1, rate=50))
    assert (result.ok, result.errors, result.latencies_ms) == (0, {"unanswered": 5}, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connections": 0}, r"connections is 0; it must lie in \[1, 512\]"),
        ({"connections": 513}, "connections is 513"),
        ({"seconds": 61}, "seconds is 61"),
        ({"rate": 0}, "rate is 0"),
        ({"count": 200_001}, "count is 200001"),
        ({"port": 0}, "port is 0"),
    ],
)
async def test_out_of_bounds_is_refused(change, message):
    with pytest.raises(InvalidRequest, match=message):
        await run_load(Load(**{"port": 1, **change}))


async def test_nobody_listening_is_a_clear_error():
    with pytest.raises(InvalidRequest, match="nothing answers at"):
        await run_load(Load(free_port()))


def test_as_processes_generator_and_floor():
    with subprocess.Popen([sys.executable, "-m", "service.bench.floor", "700"], stdout=subprocess.PIPE) as floor:
        try:
            assert floor.stdout is not None
            load = {"port": int(floor.stdout.readline()), "seconds": 0.2, "rate": 100, "connections": 2}
            command = [sys.executable, "-m", "service.bench.load", json.dumps(load)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        finally:
            floor.kill()
    assert (result["ok"], result["errors"], result["body_bytes"]) == (20, {}, 700)


def test_requests_are_complete_and_ask_for_three_votes():
    requests = chat_requests("127.0.0.1:1", seed=3, count=50)
    for raw in requests:
        head, _, body = raw.partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % len(body) in head
        assert json.loads(body)["detot"] == {"samples": 3}
    assert len(set(requests)) == 50
    assert chat_requests("127.0.0.1:1", 3, 50) == requests != chat_requests("127.0.0.1:1", 4, 50)


def test_questions_are_classified_as_word_problems():
    """So that every one is voted on; the benchmark checks it on what it sends."""
    classifier = Classifier.build(load_catalogue(None))
    tasks = [classifier.classify(text).task for text in word_problems(0, 1_000)]
    assert tasks.count("math_word_problem") == 1_000
