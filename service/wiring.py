"""Puts the parts together: `open_runtime(settings)` is the one place where a process gets its lifetime."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from service import metrics
from service.core.prompt import ChatFormat, anchor_ids
from service.engine.base import Engine
from service.engine.embeddings import EmbeddingTable
from service.engine.scripted import ScriptedEngine
from service.engine.text import ChatText
from service.engine.weights import find, resolve
from service.errors import ConfigError, ModelError, StoreUnavailable
from service.serve.admission import Admission
from service.serve.live import Live
from service.serve.pipeline import Server
from service.serve.symbolic import SymbolicPool
from service.settings import Settings
from service.store.client import Store, open_store
from service.store.outcomes import OutcomeWriter
from service.tasks.catalogue import Catalogue, load_catalogue

log = logging.getLogger(__name__)

Rows = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything a running API process holds. `rows` reads the model's embedding rows, ids -> float32 `(n, d)`."""

    settings: Settings
    catalogue: Catalogue
    engine: Engine
    chat: ChatFormat
    rows: Rows
    store: Store
    writer: OutcomeWriter
    live: Live
    server: Server
    started: int

    @property
    def fingerprint(self) -> str:
        """What must be equal for a seed to repeat a request."""
        return f"detot-{self.settings.engine}-{self.engine.model.revision[:12]}"

    def anchor_ids(self, anchor: str) -> tuple[int, ...]:
        """Token ids of an anchor text under the served model's tokenizer."""
        return anchor_ids(self.chat, anchor)

    async def monitor(self, task: str) -> dict[str, Any] | None:
        """What the worker last published about a task; None before that, or while Redis is away."""
        with suppress(StoreUnavailable):
            return await self.store.monitors.read_monitor(task)
        return None


@asynccontextmanager
async def open_runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Open store, engine and live snapshot; close them in reverse order, outcomes written before Redis goes.

    Raises:
        ConfigError, InvalidCatalogue, ModelError: the service cannot start, with what to mend.
    """
    catalogue = load_catalogue(settings.tasks)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_configured_store(settings))
        engine, chat, rows = await open_engine(settings)
        stack.push_async_callback(engine.aclose)
        record = settings.record
        writer = await stack.enter_async_context(
            OutcomeWriter(store.outcomes, buffer=record.buffer, prompt_chars=record.prompt_chars)
        )
        symbolic = SymbolicPool()
        stack.push_async_callback(symbolic.aclose)
        live = Live(store, catalogue, engine.model, rows, partial(anchor_ids, chat), poll=settings.redis.poll)
        stack.push_async_callback(live.aclose)
        await live.start()
        server = Server(
            engine=engine,
            chat=chat,
            live=live,
            admission=Admission(settings.limits.concurrency),
            symbolic=symbolic,
            record=writer.put if record.enabled else lambda _: False,
            control_share=settings.control_share,
            deadline=settings.limits.deadline,
            keep_prompts=record.prompts,
        )
        stack.enter_context(_readings(writer, live, engine))
        yield Runtime(settings, catalogue, engine, chat, rows, store, writer, live, server, started=int(time.time()))


@asynccontextmanager
async def open_configured_store(settings: Settings) -> AsyncIterator[Store]:
    """The store that the settings name.

    Raises:
        ConfigError: there is no Redis URL (`detot serve` starts an embedded one and sets it).
    """
    if settings.redis.url is None:
        raise ConfigError("DETOT_REDIS__URL is not set; set it, or run `detot serve`, which brings an embedded Valkey")
    async with open_store(
        settings.redis.url, password=settings.redis_password, per_task=settings.record.per_task
    ) as store:
        yield store


async def open_engine(settings: Settings) -> tuple[Engine, ChatFormat, Rows]:
    """The engine with the chat format and the embedding rows of its model.

    Raises:
        ModelError: weights cannot be had, or the extra that the engine needs is not installed.
    """
    if settings.engine == "scripted":
        scripted = ScriptedEngine(settings.scripted.text, latency=settings.scripted.latency)
        return scripted, scripted.chat, scripted.rows
    folder = await asyncio.to_thread(resolve, settings.model, settings.cache_dir, offline=settings.offline)
    known = find(settings.model)
    try:
        from service.engine.local import LocalEngine
    except ImportError as e:
        raise ModelError(f"the local engine needs PyTorch ({e}); install it with: pip install 'detot[local]'") from e
    local = settings.local
    engine = await LocalEngine.open(
        folder,
        model_id=known.name if known else settings.model,
        quantize={"auto": "auto", "yes": True, "no": False}[local.quantize],
        device=local.device,
        max_batch=local.max_batch,
        context=local.context,
        threads=local.threads,
    )
    return engine, ChatText.open(folder), EmbeddingTable.open(folder).rows


def _readings(writer: OutcomeWriter, live: Live, engine: Engine) -> metrics.Reading:
    stats = getattr(engine, "stats", None)
    engine_gauges = {
        f"detot_engine_{name}": (text, lambda name=name: float(getattr(stats, name)))
        for name, text in (("running", "Samples being decoded"), ("waiting", "Samples waiting for a place"))
        if hasattr(stats, name)
    }
    return metrics.Reading(
        gauges={
            "detot_outcomes_pending": ("Outcomes not yet written to Redis", lambda: writer.pending),
            "detot_snapshot_age_seconds": ("Time since the live snapshot was known to be current", lambda: live.age),
            **engine_gauges,
        },
        counters={
            "detot_outcomes_written": ("Outcomes that Redis has", lambda: writer.written),
            "detot_outcomes_dropped": ("Outcomes lost: buffer full or refused", lambda: writer.dropped),
            "detot_outcome_write_errors": ("Failed attempts to write outcomes", lambda: writer.errors),
        },
    )
