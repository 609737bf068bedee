"""Drawing tokens: against the definition of the nucleus, and row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from service.engine.local_sampling import Draw, choose  # noqa: E402


def by_definition(logits: np.ndarray, draw: Draw) -> int:
    chances = np.exp(logits / draw.temperature - np.max(logits / draw.temperature))
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    mass = np.cumsum(chances[order])
    kept = order[: int(np.searchsorted(mass, draw.top_p)) + 1] if draw.top_p < 1 else order
    inside = np.cumsum(chances[kept]) / chances[kept].sum()
    return int(kept[int(np.searchsorted(inside, draw.u, side="right"))])


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0], ids=["flat", "wide", "peaked"])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_definition(spread: float, top_p: float, temperature: float):
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(6, 5_000)) * spread).astype(np.float32)
    draws = [Draw(temperature, top_p, float(u)) for u in rng.random(6)]
    want = [by_definition(row.astype(np.float64), draw) for row, draw in zip(logits, draws, strict=True)]
    assert [token for token, _ in choose(torch.tensor(logits), draws)] == want


def test_log_probabilities_are_untempered():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3
    draws = [Draw(0, 1, 0.5), Draw(0.7, 0.9, 0.2), Draw(1, 1, 0.9), Draw(2, 1, 0.99)]
    for row, (token, logprob) in zip(logits, choose(logits, draws), strict=True):
        assert logprob == pytest.approx(row.log_softmax(0)[token].item(), abs=1e-5)
    assert choose(logits, draws)[0][0] == logits[0].argmax().item()


def test_rows_do_not_influence_each_other():
    logits = torch.randn(16, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    draws = [Draw(0.3 * (i % 5), 0.9 + 0.05 * (i % 3), i / 16) for i in range(16)]
    together = choose(logits, draws)
    assert [choose(logits[i : i + 1], draws[i : i + 1])[0] for i in range(16)] == together
    assert choose(logits[3:8], draws[3:8]) == together[3:8]


def test_logits_that_are_not_finite_show():
    logits = torch.zeros(2, 100)
    logits[0, 5] = math.nan
    (_, bad), (_, good) = choose(logits, [Draw(1, 0.9, 0.5)] * 2)
    assert math.isnan(bad)
    assert good == pytest.approx(-math.log(100))
