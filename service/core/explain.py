"""What an offset does, in words and numbers: its rows beside the anchor's, and the tokens they come nearest to.

The nearest tokens of a soft prompt's row by cosine are the usual reading of prompt tuning (Lester et al. 2021,
2104.08691, section 7), and as usual to be read with care: a row may work for other reasons (Khashabi et al. 2022,
2112.08348).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from service.core.artifact import Artifact

_TINY = 1e-12  # a norm from which a direction can be read


def explain(
    artifact: Artifact,
    parent: Artifact | None,
    chunks: Iterable[np.ndarray],
    spell: Callable[[int], str],
    *,
    count: int = 5,
) -> dict[str, Any]:
    """A version explained, JSON-ready.

    Args:
        parent: the version that it was made from; None for the zero offset, and where it is not at hand.
        chunks: the model's embedding table in order, float32 `(n, d)` at a time; read once.
        spell: text of a token id.
        count: nearest tokens per row.

    Returns:
        `rows`, one per token of the anchor: its `token`, the offset row's `norm`, its `ratio` to the norm of the
        anchor's row, its `cosine` to that (null for a zero row), its `change` against the parent's (a norm, null where
        the two cannot be compared), and the nearest tokens of the `soft` prompt's row and of the `offset` row alone.
        Beside them `change` over all rows, the gate's `evidence`, the `cost` in it (samples, tokens, seconds), and
        where the version comes from.
    """
    offset, anchor = artifact.offset, artifact.anchor
    norms, sizes = np.linalg.norm(offset, axis=1), np.linalg.norm(anchor, axis=1)
    near = nearest(np.concatenate((anchor + offset, offset)), chunks, count)
    soft, alone = near[: len(offset)], near[len(offset) :]
    changes, cost = _difference(artifact, parent), artifact.evidence.get("cost")
    rows = [
        {
            "id": token,
            "token": spell(token),
            "norm": float(norms[i]),
            "ratio": float(norms[i] / max(sizes[i], _TINY)),
            "cosine": _cosine(offset[i], anchor[i]),
            "change": None if changes is None else float(np.linalg.norm(changes[i])),
            "soft": _spelled(soft[i], spell),
            "offset": _spelled(alone[i], spell),
        }
        for i, token in enumerate(artifact.anchor_ids)
    ]
    return {
        "task": artifact.task,
        "version": artifact.version,
        "parent": artifact.parent,
        "anchor": artifact.anchor_text,
        "refiner": artifact.refiner,
        "settings": dict(artifact.settings),
        "created": artifact.created,
        "rows": rows,
        "change": _change(artifact, parent, changes),
        "evidence": dict(artifact.evidence),
        "cost": dict(cost) if isinstance(cost, Mapping) else {},
    }


def nearest(queries: np.ndarray, chunks: Iterable[np.ndarray], count: int = 5) -> list[list[tuple[int, float]]]:
    """The rows of a table that are nearest to each query by cosine, nearest first.

    Args:
        queries: float32 `(n, d)`; a zero row has no neighbours.
        chunks: the table in order, float32 `(c, d)` at a time; memory is that of one chunk and `(n, c)`.

    Returns:
        For each query at most `count` pairs of row number and cosine.
    """
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    unit = queries / np.maximum(lengths, _TINY)
    ids, best = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for chunk in chunks:
        cosines = unit @ chunk.T / np.maximum(np.linalg.norm(chunk, axis=1), _TINY)
        found = np.broadcast_to(np.arange(start, start + len(chunk)), cosines.shape)
        ids, best = _leaders(np.concatenate((ids, found), 1), np.concatenate((best, cosines), 1), count)
        start += len(chunk)
    return [
        [(int(i), float(c)) for i, c in zip(row, values, strict=True)] if length > _TINY else []
        for row, values, length in zip(ids, best, lengths[:, 0], strict=True)
    ]


def _leaders(ids: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the `count` largest values, largest first, with their ids."""
    if values.shape[1] > count:
        some = np.argpartition(-values, count - 1, axis=1)[:, :count]
        ids, values = np.take_along_axis(ids, some, 1), np.take_along_axis(values, some, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def _difference(artifact: Artifact, parent: Artifact | None) -> np.ndarray | None:
    """Offset minus the parent's, `(k, d)`; None where they stand on different anchors or the parent is not at hand."""
    if artifact.parent == 0:
        return artifact.offset
    if parent is None or parent.anchor_ids != artifact.anchor_ids or parent.offset.shape != artifact.offset.shape:
        return None
    return artifact.offset - parent.offset


def _change(artifact: Artifact, parent: Artifact | None, changes: np.ndarray | None) -> dict[str, Any]:
    """How far the whole offset moved: its `norm`, the change's, and the `cosine` between the offset and its parent."""
    return {
        "comparable": changes is not None,
        "norm": float(np.linalg.norm(artifact.offset)),
        "parent_norm": float(np.linalg.norm(parent.offset)) if parent is not None else 0.0,
        "change_norm": None if changes is None else float(np.linalg.norm(changes)),
        "cosine": None
        if parent is None or changes is None
        else _cosine(artifact.offset.ravel(), parent.offset.ravel()),
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / size if size > _TINY else None


def _spelled(found: list[tuple[int, float]], spell: Callable[[int], str]) -> list[dict[str, Any]]:
    return [{"id": token, "token": spell(token), "cosine": round(cosine, 6)} for token, cosine in found]
