"""Fixtures that several test folders use: real Valkey, real API processes, real model folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.engine.weights import resolve
from service.settings import DEFAULT_MODEL, load_settings
from service.store.embedded import EmbeddedValkey
from tests.live import LiveServer, live_server
from tests.valkey import empty_url, raw, store, valkey  # noqa: F401


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("DETOT_") and not name.startswith("DETOT_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey that the whole session shares."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture(scope="session")
def live(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A running API process with the scripted engine, open on loopback."""
    with live_server(redis_url, tmp_path_factory.mktemp("live")) as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The default model, fetched once into the ordinary cache."""
    return resolve(DEFAULT_MODEL, load_settings().cache_dir)


@pytest.fixture(scope="session")
def small_model_folder() -> Path:
    """A 135M model for smoke tests."""
    return resolve("SmolLM2-135M-Instruct", load_settings().cache_dir)


@pytest.fixture(scope="session")
def learner_folder() -> Path:
    """A model of half a million parameters, checked in, that reasons as its instruction says (tests/learner)."""
    return Path(__file__).parent / "learner" / "model"
