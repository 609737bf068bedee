"""Fixtures and helpers for tests on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service.core.types import Arm, DrawnSample, Outcome
from service.store.client import Store, open_store
from service.store.embedded import EmbeddedValkey


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server of this test's own, to be killed or restarted."""
    with EmbeddedValkey(tmp_path / "data") as server:
        yield server


@pytest.fixture
def empty_url(redis_url: str) -> str:
    """A database of the shared server that the `store` fixture has emptied."""
    return f"{redis_url}?db=5"


@pytest.fixture
async def raw(empty_url: str) -> AsyncIterator[Redis]:
    """A plain client on the emptied database."""
    async with Redis.from_url(empty_url) as client:
        yield client


@pytest.fixture
async def store(empty_url: str) -> AsyncIterator[Store]:
    """A store on an emptied database of the shared server, apart from what live servers use."""
    async with Redis.from_url(empty_url) as client:
        await client.flushdb()
    async with open_store(empty_url) as opened:
        yield opened


def make_outcome(number: int, task: str = "math", **changes: Any) -> Outcome:
    """A plausible outcome with id `r-<task>-<number>`: three samples, two for 42, one not parsed."""
    drawn = (
        DrawnSample("42", (1, 2, 3), -0.1, "stop"),
        DrawnSample("42", (1, 2, 4, 5), -0.2, "stop"),
        DrawnSample(None, (7,), -1.5, "length"),
    )
    values: dict[str, Any] = {
        "id": f"r-{task}-{number}",
        "task": task,
        "version": 0,
        "arm": Arm.CHAMPION,
        "model": "tiny",
        "created": time.time(),
        "messages": ({"role": "user", "content": f"What is {number} + 1?"},),
        "answer": "42",
        "key": "42",
        "counts": {"42": 2},
        "share": 2 / 3,
        "confidence": 0.875,
        "unparseable": 1,
        "tie": False,
        "drawn": drawn,
        "anchor": "default",
        "plan": {"temperature": 0.7, "top_p": 0.95, "max_tokens": 64, "seed": number},
        "prompt_tokens": 20,
        "completion_tokens": 8,
        "latency_s": 0.25,
    }
    return Outcome(**values | changes)


async def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Waits until something holds; fails loudly if it never does."""
    give_up = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < give_up, "the condition never came true"
        await asyncio.sleep(0.01)
