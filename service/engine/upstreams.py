"""Several servers behind one engine: which of them are in rotation, and who gets the next request.

An upstream is in rotation after `admit` has passed. One that nothing listens at leaves at once, one that stops being
healthy or fails its probe within the next look; each is looked at until it is admitted again, without a restart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Generic, TypeVar

import httpx

from service.errors import ConfigError, DetotError, EngineUnavailable, ModelError

log = logging.getLogger(__name__)

_TIMEOUTS = 3  # unanswered looks in a row: a busy server may be late, a dead one refuses the connection
_BUSY = 10.0  # times the probe interval after which an upstream that is never idle is probed all the same


class Standing(StrEnum):
    """Where an upstream stands. Only `SERVING` ones get requests."""

    NEW = "new"
    SERVING = "serving"
    DOWN = "down"
    MISFIT = "misfit"  # another model, a version or a setting that cannot be used
    POISONED = "poisoned"  # answers, but nonsense


class Poisoned(Exception):
    """The probe found nonsense; the message says which."""


class Down(Exception):
    """The upstream cannot be reached or is not healthy."""


class Upstream:
    """One server.

    Attributes:
        outstanding: requests it is working on.
        failures: requests that it broke off or never answered.
        probe_failures: probes that found it poisoned.
    """

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url, self.client = url, client
        self.standing, self.reason = Standing.NEW, "it has not answered yet"
        self.outstanding = self.failures = self.probe_failures = 0
        self.probed = 0.0
        self.unanswered = 0
        self.wake = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self.standing is Standing.SERVING

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts a request while it runs."""
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def suspect(self) -> None:
        """Look at it, and probe it, now."""
        self.probed = 0.0
        self.wake.set()

    def became(self, standing: Standing, reason: str = "") -> None:
        if standing is not self.standing or reason != self.reason:
            level = logging.INFO if standing is Standing.SERVING else logging.WARNING
            log.log(level, "upstream %s is %s%s", self.url, standing, f": {reason}" if reason else "")
        self.standing, self.reason = standing, reason


U = TypeVar("U", bound=Upstream)


class Upstreams(Generic[U]):
    """The pool. `await start()`, then `aclose()`.

    Args:
        admit: whether a server may join: raises ModelError or ConfigError (misfit), Down, or Poisoned.
        health: one cheap look at a server in rotation: raises Down, or TimeoutError for no answer.
        probe: whether a server in rotation still makes sense: raises Poisoned or Down.
        interval, probe_interval: seconds between looks and between probes.
    """

    def __init__(
        self,
        members: Sequence[U],
        *,
        admit: Callable[[U], Awaitable[None]],
        health: Callable[[U], Awaitable[None]],
        probe: Callable[[U], Awaitable[None]],
        interval: float,
        probe_interval: float,
    ) -> None:
        self.members = tuple(members)
        self._admit, self._health, self._probe = admit, health, probe
        self._interval, self._probe_interval = interval, probe_interval
        self._watchers: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Admit who is there; a server that is merely down joins when it comes.

        Raises:
            ModelError, ConfigError: a server answers that cannot be used; it says what to mend.
        """
        results = await asyncio.gather(*(self._try(u) for u in self.members))
        if misfit := next((e for e in results if e is not None), None):
            raise misfit
        self._watchers = [asyncio.create_task(self._watch(u)) for u in self.members]

    def choose(self, avoid: Collection[U] = ()) -> U:
        """The one in rotation with the fewest outstanding requests; one of `avoid` only when there is no other.

        Raises:
            EngineUnavailable: none is in rotation.
        """
        self.check()
        serving = [u for u in self.members if u.serving]
        return min([u for u in serving if u not in avoid] or serving, key=lambda u: u.outstanding)

    def check(self) -> None:
        """Raises EngineUnavailable, with every upstream's reason, when none is in rotation."""
        if self._closed:
            raise EngineUnavailable("the engine is closed")
        if not any(u.serving for u in self.members):
            reasons = "; ".join(f"{u.url} is {u.standing}: {u.reason}" for u in self.members)
            raise EngineUnavailable(f"no vLLM server can be used: {reasons}", retry_after=1.0)

    def broke(self, upstream: Upstream, reason: str, *, gone: bool) -> None:
        """A request failed there: out of rotation if nothing listens, looked at again soon in any case."""
        upstream.failures += 1
        if gone:
            upstream.became(Standing.DOWN, reason)
        upstream.suspect()

    async def aclose(self) -> None:
        self._closed = True
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for upstream in self.members:
            await upstream.client.aclose()

    async def _watch(self, upstream: U) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(upstream.wake.wait(), self._interval)
            upstream.wake.clear()
            await (self._look(upstream) if upstream.serving else self._try(upstream))
            await asyncio.sleep(0.05)  # suspicion comes in bursts

    async def _try(self, upstream: U) -> DetotError | None:
        """Admit it if it may be; returns what makes it a misfit."""
        try:
            await self._admit(upstream)
        except (ModelError, ConfigError) as e:
            upstream.became(Standing.MISFIT, e.message)
            return e
        except Exception as e:
            self._judge(upstream, e)
        else:
            upstream.unanswered, upstream.probed = 0, time.monotonic()
            upstream.became(Standing.SERVING)
        return None

    async def _look(self, upstream: U) -> None:
        try:
            await self._health(upstream)
            upstream.unanswered = 0
            since = time.monotonic() - upstream.probed
            due = since > self._probe_interval * (_BUSY if upstream.outstanding else 1)
            if due or not upstream.probed:
                await self._probe(upstream)
                upstream.probed = time.monotonic()
        except TimeoutError:
            upstream.unanswered += 1
            if upstream.unanswered >= _TIMEOUTS:
                upstream.became(Standing.DOWN, f"no answer {_TIMEOUTS} times in a row")
        except Exception as e:
            self._judge(upstream, e)

    def _judge(self, upstream: Upstream, error: Exception) -> None:
        if isinstance(error, Poisoned):
            upstream.probe_failures += 1
            upstream.became(Standing.POISONED, str(error))
        else:
            if not isinstance(error, (Down, TimeoutError)):
                log.exception("looking at %s failed", upstream.url, exc_info=error)
            upstream.became(Standing.DOWN, str(error) or type(error).__name__)
