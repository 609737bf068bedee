"""The live snapshot: catalogue, classifier and current offsets, swapped by reference so that a request reads it once.

Notices make a new version visible at once; polling makes up for notices that get lost. Whatever fails a check is
refused with its reason and counted, and the version served before stays. With Redis away the last snapshot stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from service.core.artifact import Artifact, check, decode, soft_prompt
from service.core.types import Head, ModelInfo
from service.errors import DetotError, InvalidArtifact, InvalidCatalogue, StoreUnavailable
from service.metrics import CHALLENGER, REFUSED, SHARE, STORE_ERRORS, VERSION
from service.store.client import Store
from service.tasks.catalogue import Catalogue, Task, parse_task
from service.tasks.classify import Classifier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """A verified offset version, ready to serve as champion or challenger.

    `soft` is float32 `(k, d)`, None where the offset is zero.
    """

    version: int
    anchor_text: str
    soft: np.ndarray | None = field(compare=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a request needs to know, all of one moment.

    Attributes:
        champions: by task; one without a champion is served at the zero offset.
        challengers: by task, those that may be served.
        refused: by task, why its published champion, or else its challenger, is not served.
        revision: of the run-time tasks that `catalogue` contains.
    """

    catalogue: Catalogue
    classifier: Classifier
    champions: Mapping[str, Ready] = field(default_factory=dict)
    challengers: Mapping[str, Ready] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    revision: int = 0


class Live:
    """Keeps `snapshot` current while its loop runs.

    Args:
        store: where versions and run-time tasks are published.
        base: the catalogue from file.
        model: the served model; an artifact for another one is refused.
        rows: the model's embedding rows, ids -> float32 `(n, d)`.
        tokenise: token ids of an anchor text.
        poll: seconds between looks when no notice comes.
    """

    def __init__(
        self,
        store: Store,
        base: Catalogue,
        model: ModelInfo,
        rows: Callable[[tuple[int, ...]], np.ndarray],
        tokenise: Callable[[str], tuple[int, ...]],
        *,
        poll: float = 0.5,
    ) -> None:
        self._store, self._base, self._model, self._rows, self._poll = store, base, model, rows, poll
        self._tokenise = tokenise
        self._wake = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._refreshed = time.monotonic()
        self._known: dict[tuple[str, int], Ready | str] = {}  # verified versions, or the reason of refusal
        self.snapshot = Snapshot(base, Classifier.build(base))

    @property
    def age(self) -> float:
        """Seconds since the snapshot was last known to be current."""
        return time.monotonic() - self._refreshed

    async def start(self) -> None:
        """First refresh (Redis may be away: then the zero offsets serve), then keep refreshing in the background."""
        with suppress(StoreUnavailable):
            await self.refresh()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._listen())]

    async def aclose(self) -> None:
        pending = set(self._tasks)
        while pending:  # one cancellation may be lost in a timeout that redis-py handles at the same moment
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)

    async def refresh(self) -> None:
        """Read tasks and heads, verify what is new, swap the snapshot.

        Raises:
            StoreUnavailable: Redis cannot be reached; the snapshot is unchanged.
        """
        async with self._refreshing:
            snapshot = await self._catalogue(self.snapshot)
            heads = await self._store.offsets.heads(list(snapshot.catalogue.tasks))
            champions, challengers, refused = {}, {}, {}
            for task, head in heads.items():
                trial = await self._look(task, head.challenger)
                if isinstance(trial, Ready):
                    challengers[task] = trial
                elif trial:
                    refused[task] = f"challenger {head.challenger}: {trial}"
                found = await self._look(task, head.version)
                if isinstance(found, Ready):
                    champions[task] = found
                elif found:
                    refused[task] = found
                    if task in self.snapshot.champions:
                        champions[task] = self.snapshot.champions[task]
            current = {(task, v) for task, head in heads.items() for v in (head.version, head.challenger)}
            self._known = {k: v for k, v in self._known.items() if k in current}
            for task, head in heads.items():
                VERSION.labels(task).set(champions[task].version if task in champions else 0)
                CHALLENGER.labels(task).set(challengers[task].version if task in challengers else 0)
                SHARE.labels(task).set(head.share if task in challengers else 0)
            self.snapshot = replace(
                snapshot, champions=champions, challengers=challengers, heads=heads, refused=refused
            )
            self._refreshed = time.monotonic()

    def verify(self, artifact: Artifact) -> None:
        """The checks that every artifact passes before it is published or served.

        Raises:
            InvalidArtifact: with the reason.
        """
        ids = self._tokenise(artifact.anchor_text)
        if ids != artifact.anchor_ids:
            raise InvalidArtifact(
                f"the anchor text has {len(ids)} tokens here and {len(artifact.anchor_ids)} ids in the artifact, "
                "or other ones"
            )
        try:
            rows = self._rows(artifact.anchor_ids)
        except (IndexError, ValueError, DetotError) as e:
            raise InvalidArtifact(f"anchor ids are not in the model's vocabulary: {e}") from e
        check(artifact, self._model, rows)

    async def _look(self, task: str, version: int) -> Ready | str | None:
        """The verified version, the reason why it is refused, or None for version 0."""
        if version == 0:
            return None
        if (task, version) not in self._known:
            self._known[task, version] = found = await self._load(task, version)
            if isinstance(found, str):
                REFUSED.inc()
                log.error("refused offset of task %s, version %d: %s", task, version, found)
            else:
                log.info("task %s: offset version %d is verified", task, version)
        return self._known[task, version]

    async def _load(self, task: str, version: int) -> Ready | str:
        try:
            artifact = decode(await self._store.offsets.get(task, version))
            if (artifact.task, artifact.version) != (task, version):
                return f"the artifact says task {artifact.task!r}, version {artifact.version}"
            self.verify(artifact)
        except StoreUnavailable:
            raise
        except DetotError as e:
            return e.message
        return Ready(version, artifact.anchor_text, soft_prompt(artifact))

    async def _catalogue(self, old: Snapshot) -> Snapshot:
        """The snapshot with the run-time tasks of this moment; the classifier is built anew when they changed."""
        revision = await self._store.tasks.revision()
        if revision == old.revision:
            return old
        revision, registered = await self._store.tasks.list()
        catalogue = self._base
        for name, document in registered.items():
            try:
                catalogue = catalogue.with_task(_parse(name, document))
            except InvalidCatalogue as e:
                log.error("skipped run-time task %s: %s", name, e.message)
        classifier = await asyncio.to_thread(Classifier.build, catalogue)
        return replace(old, catalogue=catalogue, classifier=classifier, revision=revision)

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):  # not wait_for, which may swallow a cancellation in Python 3.11
                async with asyncio.timeout(self._poll):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.refresh()
            except StoreUnavailable:
                STORE_ERRORS.labels("refresh").inc()
            except Exception:
                STORE_ERRORS.labels("refresh").inc()
                log.exception("the snapshot could not be refreshed; the last one stays")

    async def _listen(self) -> None:
        async for _ in self._store.offsets.notices():
            self._wake.set()


def _parse(name: str, document: Mapping[str, Any]) -> Task:
    return parse_task(document, source=f"run-time task {name}")
