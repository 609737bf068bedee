"""Choosing the next token of every row: greedy, or by temperature and nucleus (Holtzman et al., 1904.09751, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_CANDIDATES = 64
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn; `u` in [0, 1) is the row's own random number, not used when the temperature is 0."""

    temperature: float
    top_p: float
    u: float


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[tuple[int, float]]:
    """Token and its untempered log-probability (nats) for each row of float32 logits `(rows, vocabulary)`.

    Sorting a whole vocabulary is dear, so the likeliest tokens are looked at first, and the rest only when the draw
    lies beyond them: the result is that of the full sort. Rows do not influence each other, bit for bit (of PyTorch's
    reductions over a row, softmax has this property and logsumexp has not). A log-probability that is NaN tells that
    the row's logits are not finite.
    """
    plain = logits.softmax(1)
    warmth = [d.temperature or 1.0 for d in draws]
    warm = plain if set(warmth) == {1.0} else (logits / torch.tensor(warmth, device=logits.device)[:, None]).softmax(1)
    values, ids = warm.topk(min(_CANDIDATES, logits.shape[1]), dim=1)
    tops, names, likely = values.cpu().numpy(), ids.cpu().numpy(), plain.gather(1, ids).cpu().numpy()
    found = []
    for row, draw in enumerate(draws):
        at = 0 if draw.temperature == 0 else _nucleus(tops[row], draw)
        if at is not None:
            token, chance = names[row, at], likely[row, at]
        else:
            token = _from_all(warm[row], draw)
            chance = plain[row, token].item()
        found.append((int(token), float(np.log(np.maximum(chance, _TINY)))))
    return found


def _nucleus(chances: np.ndarray, draw: Draw, *, complete: bool = False) -> int | None:
    """Position of the drawn token among probabilities in descending order; None if it may lie beyond them."""
    mass = np.cumsum(chances, dtype=np.float64)
    total = mass[-1] if complete else 1.0
    if draw.top_p < 1:
        last = int(np.searchsorted(mass, draw.top_p))
        if last < len(mass):
            total = mass[last]
        elif not complete:
            return None
    at = int(np.searchsorted(mass, draw.u * total, side="right"))
    if at < len(mass):
        return at
    return len(mass) - 1 if complete else None


def _from_all(chances: torch.Tensor, draw: Draw) -> int:
    values, ids = chances.sort(descending=True, stable=True)
    at = _nucleus(values.cpu().numpy(), draw, complete=True)
    return int(ids[at])
