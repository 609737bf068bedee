"""Explanations of published versions: made off the event loop, one at a time, and kept, since versions never change."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from service.core.artifact import Artifact, decode
from service.core.explain import explain
from service.core.prompt import ChatFormat
from service.errors import InvalidArtifact, NotFound
from service.store.offsets import OffsetStore


class Explainer:
    """Explains versions of the served model.

    Args:
        offsets: where parents are found.
        chunks: the model's embedding table in order, float32 `(n, d)` at a time.
        chat: spells tokens.
        kept: explanations kept in memory.
    """

    def __init__(
        self, offsets: OffsetStore, chunks: Callable[[], Iterator[np.ndarray]], chat: ChatFormat, *, kept: int = 64
    ) -> None:
        self._offsets, self._chunks, self._chat, self._kept = offsets, chunks, chat, kept
        self._done: OrderedDict[tuple[str, int, str], dict[str, Any]] = OrderedDict()
        self._one = asyncio.Lock()

    async def explain(self, artifact: Artifact) -> dict[str, Any]:
        """See `core.explain.explain`; the artifact must be one for the served model. Raises StoreUnavailable."""
        key = (artifact.task, artifact.version, artifact.anchor_text)
        async with self._one:
            if key not in self._done:
                parent = await self._parent(artifact)
                self._done[key] = await asyncio.to_thread(explain, artifact, parent, self._chunks(), self._spell)
                while len(self._done) > self._kept:
                    self._done.popitem(last=False)
            self._done.move_to_end(key)
            return self._done[key]

    async def _parent(self, artifact: Artifact) -> Artifact | None:
        if artifact.parent == 0:
            return None
        try:
            return decode(await self._offsets.get(artifact.task, artifact.parent))
        except (NotFound, InvalidArtifact):
            return None

    def _spell(self, token: int) -> str:
        """A token's text; its number in brackets where it has none of its own."""
        try:
            return self._chat.decode([token]) or f"<{token}>"
        except UnicodeDecodeError:
            return f"<{token}>"
