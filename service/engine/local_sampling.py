"""Choosing the next token of every row: greedy, or by temperature and nucleus (Holtzman et al., 1904.09751, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn; `u` in [0, 1) is the row's own random number, not used when the temperature is 0."""

    temperature: float
    top_p: float
    u: float


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[tuple[int, float]]:
    """Token and its untempered log-probability (nats) for each row of float32 logits `(rows, vocabulary)`.

    Sorting a whole vocabulary is dear, so the likeliest tokens are looked at first, and the rest only when the nucleus
    reaches beyond them: the result is that of the full sort. A log-probability that is not finite tells that the
    row's logits are not.
    """
    values, ids = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=1)
    norms = torch.logsumexp(logits, 1)
    warmth = torch.tensor([[d.temperature or 1.0] for d in draws], device=logits.device)
    warm_norms = torch.logsumexp(logits / warmth, 1)
    tops, names = values.double().cpu().numpy(), ids.cpu().numpy()
    found = []
    for row, (draw, norm, warm_norm) in enumerate(zip(draws, norms.tolist(), warm_norms.tolist(), strict=True)):
        at = 0 if draw.temperature == 0 else _nucleus(tops[row] / draw.temperature - warm_norm, draw)
        if at is None:
            found.append(_from_all(logits[row], norm, warm_norm, draw))
        else:
            found.append((int(names[row, at]), float(tops[row, at]) - norm))
    return found


def _nucleus(logprobs: np.ndarray, draw: Draw, *, complete: bool = False) -> int | None:
    """Position of the drawn token among log-probabilities in descending order; None if it may lie beyond them."""
    mass = np.cumsum(np.exp(logprobs))
    total = mass[-1] if complete else 1.0
    if draw.top_p < 1:
        inside = int(np.searchsorted(mass, draw.top_p))
        if inside < len(mass):
            total = mass[inside]
        elif not complete:
            return None
    at = int(np.searchsorted(mass, draw.u * total, side="right"))
    if at < len(mass):
        return at
    return len(mass) - 1 if complete else None


def _from_all(logits: torch.Tensor, norm: float, warm_norm: float, draw: Draw) -> tuple[int, float]:
    values, ids = logits.double().sort(descending=True, stable=True)
    tops = values.cpu().numpy()
    at = _nucleus(tops / draw.temperature - warm_norm, draw, complete=True)
    assert at is not None
    return int(ids[at]), float(tops[at]) - norm
