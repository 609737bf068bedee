"""The worker process: settings in, a running worker with its metrics out."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import asdict
from typing import Any

from prometheus_client import start_http_server

from service.core.answers import same
from service.core.types import Outcome
from service.errors import ConfigError, InvalidCatalogue
from service.metrics import BREACH, LAG, MONITOR, REGISTRY
from service.refine.loop import Tasks, WorkerOptions, run_worker
from service.settings import Settings
from service.store.client import Store
from service.tasks.catalogue import Catalogue, load_catalogue, parse_task
from service.wiring import open_configured_store

log = logging.getLogger(__name__)


def serve_worker(settings: Settings, *, burst: bool = False) -> dict[str, Any]:
    """Run one worker until SIGTERM or SIGINT, in burst mode until everything is read. Returns its figures.

    Raises:
        ConfigError, InvalidCatalogue: what to mend.
        StoreUnavailable: in burst mode only; otherwise the worker waits for Redis.
    """
    catalogue = load_catalogue(settings.tasks)
    if settings.worker_port is not None and not burst:
        try:
            start_http_server(settings.worker_port, settings.host, registry=REGISTRY)
        except OSError as e:
            raise ConfigError(
                f"DETOT_WORKER_PORT={settings.worker_port}: cannot listen there ({e.strerror}); choose another"
            ) from e
    return asyncio.run(_work(settings, catalogue, burst))


async def _work(settings: Settings, catalogue: Catalogue, burst: bool) -> dict[str, Any]:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_configured_store(settings) as store:
        known = KnownTasks(store, catalogue)
        options = WorkerOptions(retention=settings.record.retention, same=known.same, watch=report)
        handled = await run_worker(store, known.thresholds, burst=burst, stop=stop, options=options)
    return {"entries": handled, "tasks": len(known.catalogue.tasks)}


class KnownTasks:
    """The catalogue from file with the run-time tasks of this moment."""

    def __init__(self, store: Store, base: Catalogue) -> None:
        self._store, self._base, self._revision = store, base, 0
        self.catalogue = base

    async def thresholds(self) -> Tasks:
        """Every task's target thresholds. Raises StoreUnavailable."""
        if await self._store.tasks.revision() != self._revision:
            await self._reload()
        return {task.id: asdict(task.thresholds) for task in self.catalogue.tasks.values()}

    def same(self, answer: str, outcome: Outcome) -> bool:
        """Whether a user's right answer is the one that was served, by canonical keys."""
        task = self.catalogue.tasks.get(outcome.task)
        if task is None or outcome.answer is None:
            return False
        question = next((m["content"] for m in reversed(outcome.messages or ()) if m["role"] == "user"), "")
        return same(outcome.answer, answer, task.answer, question)

    async def _reload(self) -> None:
        self._revision, documents = await self._store.tasks.list()
        self.catalogue = self._base
        for name, document in documents.items():
            try:
                self.catalogue = self.catalogue.with_task(parse_task(document, source=f"run-time task {name}"))
            except InvalidCatalogue as e:
                log.error("skipped run-time task %s: %s", name, e.message)


def report(task: str, published: dict[str, Any]) -> None:
    """A task's monitor as Prometheus metrics."""
    LAG.labels(task).set(published["lag"])
    missed = {breach["name"] for breach in published["breaches"]}
    for name, value in published["arms"].get("all", {}).items():
        if value is not None:
            MONITOR.labels(task, name).set(value)
        BREACH.labels(task, name).set(name in missed)
