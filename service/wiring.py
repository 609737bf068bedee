"""Puts the parts together: `open_runtime(settings)` is the one place where a process gets its lifetime."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from service import metrics
from service.core.prompt import ChatFormat, anchor_ids
from service.engine.base import Engine
from service.engine.embeddings import EmbeddingTable
from service.engine.scripted import Script, ScriptedEngine
from service.engine.text import ChatText
from service.engine.vllm_server import VllmServerEngine
from service.engine.weights import find, resolve
from service.errors import ConfigError, ModelError, StoreUnavailable
from service.serve.admission import Admission
from service.serve.explain import Explainer
from service.serve.live import Live
from service.serve.pipeline import Server
from service.serve.symbolic import SymbolicPool
from service.settings import Settings
from service.store.client import Store, open_store
from service.store.outcomes import OutcomeWriter
from service.tasks.catalogue import Catalogue, load_catalogue

log = logging.getLogger(__name__)


class Table(Protocol):
    """The model's input embedding table, read in pieces."""

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of token ids, float32 `(len(ids), d)`. Raises ModelError or IndexError outside the table."""
        ...

    def chunks(self, size: int = 4_096) -> Iterator[np.ndarray]:
        """The whole table in order, float32 `(size, d)` at a time."""
        ...


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything a running API process holds."""

    settings: Settings
    catalogue: Catalogue
    engine: Engine
    chat: ChatFormat
    table: Table
    store: Store
    writer: OutcomeWriter
    live: Live
    server: Server
    explainer: Explainer
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
        engine, chat, table = await open_engine(settings)
        stack.push_async_callback(engine.aclose)
        record = settings.record
        writer = await stack.enter_async_context(
            OutcomeWriter(store.outcomes, buffer=record.buffer, prompt_chars=record.prompt_chars)
        )
        symbolic = SymbolicPool()
        stack.push_async_callback(symbolic.aclose)
        live = Live(store, catalogue, engine.model, table.rows, partial(anchor_ids, chat), poll=settings.redis.poll)
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
        if settings.engine == "vllm":
            stack.enter_context(metrics.passed_on("vllm:"))
        explainer = Explainer(store.offsets, table.chunks, chat)
        started = int(time.time())
        yield Runtime(settings, catalogue, engine, chat, table, store, writer, live, server, explainer, started)


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


async def open_engine(settings: Settings) -> tuple[Engine, ChatFormat, Table]:
    """The engine with the chat format and the embedding table of its model.

    Raises:
        ModelError: weights cannot be had, or the extra that the engine needs is not installed.
    """
    if settings.engine == "scripted":
        scripted = ScriptedEngine(_script(settings.scripted.text), latency=settings.scripted.latency)
        return scripted, scripted.chat, scripted
    folder = await asyncio.to_thread(resolve, settings.model, settings.cache_dir, offline=settings.offline)
    known = find(settings.model)
    start = {"vllm": _open_vllm, "vllm-server": _open_vllm_server}.get(settings.engine, _open_local)
    engine = await start(settings, folder, known.name if known else settings.model)
    return engine, ChatText.open(folder), EmbeddingTable.open(folder)


def _script(text: str) -> Script | str:
    """What the scripted engine says: `{soft}` in the text is replaced by the soft prompt's digest, if there is one."""
    return (lambda cue: text.replace("{soft}", cue.soft)) if "{soft}" in text else text


async def _open_local(settings: Settings, folder: Path, model_id: str) -> Engine:
    try:
        from service.engine.local import LocalEngine
    except ImportError as e:
        raise ModelError(f"the local engine needs PyTorch ({e}); install it with: pip install 'detot[local]'") from e
    local = settings.local
    return await LocalEngine.open(
        folder,
        model_id=model_id,
        quantize={"auto": "auto", "yes": True, "no": False}[local.quantize],
        device=local.device,
        max_batch=local.max_batch,
        context=local.context,
        threads=local.threads,
    )


async def _open_vllm(settings: Settings, folder: Path, model_id: str) -> Engine:
    try:
        from service.engine.vllm import VllmEngine
        from service.engine.vllm_core import Options
    except ImportError as e:
        raise ModelError(f"the vllm engine needs vLLM ({e}); install it with: pip install 'detot[vllm]'") from e
    options = Options(**settings.vllm.model_dump(exclude={"probe_interval"}))
    interval = settings.vllm.probe_interval
    return await VllmEngine.open(folder, model_id=model_id, options=options, probe_interval=interval)


async def _open_vllm_server(settings: Settings, folder: Path, model_id: str) -> Engine:
    upstream = settings.upstream
    if not upstream.addresses:
        raise ConfigError("DETOT_UPSTREAM__URLS is not set; it names the vLLM servers, http://host:port,http://...")
    return await VllmServerEngine.open(
        folder,
        model_id=model_id,
        urls=upstream.addresses,
        served=upstream.model,
        key=settings.upstream_key,
        context=upstream.context,
        connect=upstream.connect_timeout,
        read=upstream.read_timeout,
        interval=upstream.health_interval,
        probe_interval=upstream.probe_interval,
    )


def _readings(writer: OutcomeWriter, live: Live, engine: Engine) -> metrics.Reading:
    engine_gauges: dict[str, tuple[str, Callable[[], Any]]] = {
        f"detot_engine_{name}": (text, lambda name=name: float(getattr(engine.stats, name)))  # type: ignore[attr-defined]
        for name, text in (("running", "Samples being decoded"), ("waiting", "Samples waiting for a place"))
        if hasattr(engine, "stats")
    }
    if hasattr(engine, "rotation"):
        engine_gauges["detot_engine_rotation"] = (
            "1 while a server gets requests, 0 while it is out of rotation",
            lambda: engine.rotation,  # type: ignore[attr-defined]
        )
    engine_counters = {
        f"detot_engine_{name}": (text, lambda name=name: getattr(engine, name))
        for name, text in (
            ("probe_failures", "Probes that did not find the engine well"),
            ("restarts", "Times the model was started again"),
            ("failures", "Requests that a server broke off or never answered"),
            ("retries", "Requests that were sent a second time"),
        )
        if hasattr(engine, name)
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
            **engine_counters,
        },
    )
