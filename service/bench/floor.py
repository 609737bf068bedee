"""A trivial HTTP server, to show what a load generator measures when the server does nothing or only burns CPU time.

`python -m service.bench.floor <bytes> [<milliseconds>]` prints its port and serves bodies of that size on loopback
until terminated. With milliseconds, each request first costs a fixed amount of work that takes so long on a quiet
core: a core that other tenants of the machine slow down shows in the latencies, as it does in the real server's.
"""

from __future__ import annotations

import asyncio
import sys
import time
from statistics import median
from typing import cast

import httptools
import uvloop


class _Protocol(asyncio.Protocol):
    """Answers every request with the same bytes, after `units` of work."""

    def __init__(self, answer: bytes, units: int) -> None:
        self._answer, self._units, self._parser = answer, units, httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        _work(self._units)
        self._transport.write(self._answer)


def _work(units: int) -> int:
    total = 0
    for i in range(units):
        total += i * i
    return total


def _units(milliseconds: float) -> int:
    """Units of work that take so long on this core when nothing slows it."""
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        _work(10_000)
        seconds.append(time.perf_counter() - start)
    return round(10_000 * milliseconds / 1e3 / median(seconds))


async def serve_floor(body_bytes: int, milliseconds: float = 0.0) -> None:
    """Serve until cancelled; prints the port first."""
    units = _units(milliseconds)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (body_bytes, b"x" * body_bytes)
    server = await asyncio.get_running_loop().create_server(lambda: _Protocol(answer, units), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve_floor(int(sys.argv[1]), *map(float, sys.argv[2:])))
