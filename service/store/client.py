"""One handle on Redis (or Valkey): clients with the right timeouts, and everything stored through them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError, TimeoutError

from service.errors import ConfigError
from service.store.canaries import CanaryStore
from service.store.functions import redis_errors
from service.store.lease import Leases
from service.store.monitors import MonitorStore
from service.store.offsets import OffsetStore
from service.store.outcomes import OutcomeStore
from service.store.rounds import RoundStore
from service.store.tasks import TaskStore


class Store:
    """Outcomes, offsets, run-time tasks, leases, rounds, canaries and monitors in one Redis.

    Two clients: `request` gives up after about 0.2 s and one quick retry, for what a caller waits for; `background`
    has 5 s and no retry, for bulk work whose loops retry by themselves. Nothing blocks on the server, so a silent
    server is noticed by timeout everywhere. Connections are opened at first use: a Redis that is down at start is
    no error, and calls raise StoreUnavailable until it is back.

    Args:
        url: `redis://`, `rediss://` or `unix://` URL, optionally with credentials.
        password: overrides the URL's.
        per_task: outcomes kept per task.

    Raises:
        ConfigError: the URL is not one of these.
    """

    def __init__(
        self, url: str, *, password: str | None = None, per_task: int = 10_000, request_timeout: float = 0.2
    ) -> None:
        self._request = _client(url, password, request_timeout, retries=1, connections=32)
        self._background = _client(url, password, 5.0, retries=0, connections=16)
        self.outcomes = OutcomeStore(self._request, self._background, per_task=per_task)
        self.offsets = OffsetStore(self._background)
        self.tasks = TaskStore(self._background)
        self.lease = Leases(self._background)
        self.rounds = RoundStore(self._background)
        self.canaries = CanaryStore(self._background)
        self.monitors = MonitorStore(self._background)

    async def ping(self) -> None:
        """Raises StoreUnavailable unless Redis answers within the request timeout."""
        with redis_errors():
            await self._request.ping()

    async def aclose(self) -> None:
        await asyncio.gather(self._request.aclose(), self._background.aclose(), return_exceptions=True)


@asynccontextmanager
async def open_store(url: str, **options: Any) -> AsyncIterator[Store]:
    """A Store (same arguments), closed at the end."""
    store = Store(url, **options)
    try:
        yield store
    finally:
        await store.aclose()


def _client(url: str, password: str | None, timeout: float, *, retries: int, connections: int) -> Redis:
    scheme = urlsplit(url).scheme
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(f"Redis URL with scheme {scheme!r}; redis://, rediss:// or unix:// is needed")
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(ConstantBackoff(0.02), retries, supported_errors=(ConnectionError, TimeoutError)),
        "max_connections": connections,
        "timeout": timeout,  # waiting for a free connection
    }
    if password is not None:
        options["password"] = password
    try:
        pool = BlockingConnectionPool.from_url(url, **options)
    except ValueError as e:
        raise ConfigError(f"Redis URL: {e}") from None
    return Redis.from_pool(pool)
