"""Recorded pools of samples, and what early stopping would have made of them.

A pool file has one JSON line a question: `{"id", "gold_key", "task", "samples": [{"key", "answer", "mean_logprob",
"tokens", "correct"}, ...]}`; `key` is null for a sample that could not be parsed. Questions' texts are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.core.types import Ballot, Sampling
from service.core.vote import decided, tally
from service.errors import InvalidRequest

CONFIDENCES = (0.8, 0.9, 0.95, 0.99)
MINIMA = (2, 3, 5)
TARGET_RATIO = 0.5  # samples of the early vote over samples of the fixed one
_RESAMPLES = 2000
_TABLE_ORDERS = 50
_TABLE_FIGURES = ("accuracy", "samples", "tokens", "agreement")


@dataclass(frozen=True, slots=True)
class PoolSample:
    """One recorded sample. `tokens`: completion tokens; `correct`: its key is the gold key."""

    key: str | None
    answer: str | None
    mean_logprob: float
    tokens: int
    correct: bool


@dataclass(frozen=True, slots=True)
class PoolQuestion:
    """A question's id, gold key, task and samples in the order of their index."""

    id: str
    gold_key: str
    task: str
    samples: tuple[PoolSample, ...]


# --- replay ----------------------------------------------------------------------------------------------------------


def read_pool(path: Path) -> list[PoolQuestion]:
    """The questions of a pool file.

    Raises:
        InvalidRequest: the file cannot be read, is empty, or a line is no question; names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"pool {path}: {e}") from e
    pool = [_parse(line, f"pool {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pool:
        raise InvalidRequest(f"pool {path}: holds no questions")
    return pool


def replay(
    pool: Sequence[PoolQuestion], plan: Sampling, *, fixed: int = 16, orders: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Early stopping against the fixed vote, on the same samples drawn in random orders.

    Both votes are the service's own (`core.vote`). Figures are means over orders, then over questions; intervals are
    95% percentile bootstraps over questions. Tokens and samples are those counted in the vote: with several samples in
    flight up to `in_flight - 1` more are begun and thrown away, which `samples_begun` adds in full.

    Args:
        pool: recorded questions, each with at least `fixed` samples.
        plan: min_samples, confidence and in_flight of the early vote; its maximum is `fixed`.
        fixed: samples of the fixed vote.
        orders: random orders of each question's samples; the table of thresholds uses at most 50.
        seed: of the orders and the bootstrap.

    Returns:
        JSON-ready figures: `single`, `fixed` and `early` (accuracy, samples, tokens a question), `ratio` early over
        fixed, `difference` of the accuracies, `agreement` of the two votes, `table` by confidence and minimum, and
        `target_met`: at most half the samples at equal accuracy, that is, with a difference whose interval reaches 0.

    Raises:
        InvalidRequest: no questions, a question with too few samples, or a bound out of range.
    """
    _check(pool, plan, fixed, orders)
    plan = plan.but(max_samples=fixed)
    runs = _replayed(pool, plan, orders, seed)
    boot = _bootstrap(len(pool), seed)
    early, full = runs["early"], runs["fixed"]
    ratio = {unit: _ratio(early[unit], full[unit], boot) for unit in ("samples", "tokens")}
    difference = _mean(early["accuracy"] - full["accuracy"], boot)
    return {
        "questions": len(pool),
        "orders": orders,
        "plan": {"min_samples": plan.min_samples, "max_samples": fixed, "confidence": plan.confidence},
        "single": {"accuracy": _mean(runs["single"]["accuracy"], boot)},
        "fixed": {name: _mean(values, boot) for name, values in full.items()},
        "early": {name: _mean(values, boot) for name, values in early.items() if name != "agreement"},
        "ratio": ratio,
        "difference": difference,
        "agreement": _mean(early["agreement"], boot),
        "parsed": round(float(np.mean([s.key is not None for q in pool for s in q.samples])), 4),
        "table": _table(pool, plan, min(orders, _TABLE_ORDERS), seed),
        "target_met": ratio["samples"]["mean"] <= TARGET_RATIO and difference["interval"][1] >= 0,
    }


def _replayed(pool: Sequence[PoolQuestion], plan: Sampling, orders: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Per question, means over orders: `{"single" | "fixed" | "early": {figure: (questions,)}}`."""
    rows = [_one_question(question, plan, orders, random.Random(f"{seed}:{question.id}")) for question in pool]
    return {kind: {name: np.array([row[kind][name] for row in rows]) for name in rows[0][kind]} for kind in rows[0]}


def _one_question(
    question: PoolQuestion, plan: Sampling, orders: int, rng: random.Random
) -> dict[str, dict[str, float]]:
    fixed = plan.max_samples
    sums = np.zeros(9)
    for _ in range(orders):
        drawn = rng.sample(question.samples, fixed)
        ballots = [Ballot(i, s.key, s.answer, s.mean_logprob) for i, s in enumerate(drawn)]
        stop = next(n for n in range(1, fixed + 1) if decided(ballots[:n], plan))
        early, full = tally(ballots[:stop]).key, tally(ballots).key
        begun = min(fixed, stop + plan.in_flight - 1)
        right = (drawn[0].correct, full == question.gold_key, early == question.gold_key)
        tokens = (sum(s.tokens for s in drawn), sum(s.tokens for s in drawn[:stop]))
        sums += (*right, fixed, stop, *tokens, begun, early == full)
    single, right_full, right_early, n_full, n_early, tokens_full, tokens_early, begun, agree = (sums / orders).tolist()
    return {
        "single": {"accuracy": single},
        "fixed": {"accuracy": right_full, "samples": n_full, "tokens": tokens_full},
        "early": {
            "accuracy": right_early,
            "samples": n_early,
            "tokens": tokens_early,
            "samples_begun": begun,
            "agreement": agree,
        },
    }


def _table(pool: Sequence[PoolQuestion], plan: Sampling, orders: int, seed: int) -> list[dict[str, float]]:
    """What other thresholds would have cost, in the same orders."""
    table = []
    for minimum in (m for m in MINIMA if m <= plan.max_samples):
        for confidence in CONFIDENCES:
            early = _replayed(pool, plan.but(min_samples=minimum, confidence=confidence), orders, seed)["early"]
            means = {
                name: round(float(early[name].mean()), 4) for name in ("accuracy", "samples", "tokens", "agreement")
            }
            table.append({"min_samples": minimum, "confidence": confidence, **means})
    return table


def _bootstrap(questions: int, seed: int) -> np.ndarray:
    """Resampled question indices, int `(_RESAMPLES, questions)`; shared by all figures, so that they stay paired."""
    return np.random.default_rng(seed).integers(0, questions, size=(_RESAMPLES, questions))


def _mean(values: np.ndarray, boot: np.ndarray) -> dict[str, Any]:
    return {"mean": round(float(values.mean()), 4), "interval": _interval(values[boot].mean(axis=1))}


def _ratio(top: np.ndarray, bottom: np.ndarray, boot: np.ndarray) -> dict[str, Any]:
    """Ratio of totals; 0 where nothing was spent at all."""
    ratios = top[boot].sum(axis=1) / np.maximum(bottom[boot].sum(axis=1), 1e-9)
    return {"mean": round(float(top.sum() / max(bottom.sum(), 1e-9)), 4), "interval": _interval(ratios)}


def _interval(resampled: np.ndarray) -> list[float]:
    return [round(float(q), 4) for q in np.percentile(resampled, [2.5, 97.5])]


def _check(pool: Sequence[PoolQuestion], plan: Sampling, fixed: int, orders: int) -> None:
    if not pool:
        raise InvalidRequest("the pool holds no questions")
    if orders < 1:
        raise InvalidRequest(f"orders is {orders}; it must be at least 1", param="orders")
    if not 1 <= plan.min_samples <= fixed:
        raise InvalidRequest(f"min_samples is {plan.min_samples}; it must be in [1, {fixed}]", param="min_samples")
    short = min(pool, key=lambda q: len(q.samples))
    if len(short.samples) < fixed:
        raise InvalidRequest(f"question {short.id} has {len(short.samples)} samples; the fixed vote needs {fixed}")


def _parse(line: str, where: str) -> PoolQuestion:
    try:
        row = json.loads(line)
        samples = tuple(
            PoolSample(s["key"], s["answer"], float(s["mean_logprob"]), int(s["tokens"]), bool(s["correct"]))
            for s in row["samples"]
        )
        return PoolQuestion(str(row["id"]), str(row["gold_key"]), str(row["task"]), samples)
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidRequest(f"{where}: not a pool question ({type(e).__name__}: {e})") from e
