"""Promote a challenger, reject it, or go on: paired evidence, valid however often one looks (`eprocess`).

Agreement with the votes that a challenger learned from is no evidence here: only `CanaryPair`, whose answers a program
computed, can speak for a promotion; `HeldoutPair` can only forbid one or not. docs/gate.md derives the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from service.core.eprocess import (
    Wealth,
    bet_canary,
    bet_heldout,
    economy,
    even,
    for_harm,
    for_promotion,
    log_e,
)


class Decision(StrEnum):
    PROMOTE = "promote"
    REJECT = "reject"
    UNDECIDED = "undecided"


class Road(StrEnum):
    """By what a challenger was promoted: more right answers, or as many for fewer samples."""

    ACCURACY = "accuracy"
    SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class CanaryPair:
    """Both versions on one canary item that neither was trained on, same seeds.

    Attributes:
        challenger, champion: 1 or True if the voted answer is the computed one, else 0; or, for less noise and a claim
            about single samples, the share of samples that are right. In [0, 1], the same measure for every item.
        challenger_samples, champion_samples: samples drawn until the vote was safe, in [1, max_samples].
        max_samples: the plan's upper bound; 1 says nothing about samples.
    """

    challenger: float
    champion: float
    challenger_samples: int = 1
    champion_samples: int = 1
    max_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("challenger", "champion"):
            _within(name, getattr(self, name), 0, 1)
        _within("max_samples", self.max_samples, 1, math.inf)
        for name in ("challenger_samples", "champion_samples"):
            _within(name, getattr(self, name), 1, self.max_samples)


@dataclass(frozen=True, slots=True)
class HeldoutPair:
    """Both versions on a held-out prompt whose answer the frozen anchor votes agree on. It has no right answer.

    Attributes:
        challenger, champion: whether the version's fresh vote is the anchor's answer. The draws that fixed that answer
            must not be used again as the champion's, or the champion starts with a bonus.
    """

    challenger: bool
    champion: bool

    def __post_init__(self) -> None:
        for name in ("challenger", "champion"):
            _within(name, getattr(self, name), 0, 1)


Pair = CanaryPair | HeldoutPair


@dataclass(frozen=True, slots=True)
class Rules:
    """What is fixed before the first item is seen; kept in the state, so that a restart cannot change it.

    Attributes:
        alpha: bound on the probability that a task ever gets a bad champion, over all its challengers, in (0, 1).
        margin: loss of accuracy that still counts as not inferior, in (0, 1).
        harm_alpha: bound on the probability that a harmless challenger is rejected as harmful, in (0, 1).
        max_items: canary items after which what is still undecided is rejected.
        heldout: held-out prompts must show that the challenger is not inferior; False where a task has none.
    """

    alpha: float = 0.05
    margin: float = 0.03
    harm_alpha: float = 0.05
    max_items: int = 2000
    heldout: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "margin", "harm_alpha"):
            _within(name, getattr(self, name), 0, 1, open_ends=True)
        _within("max_items", self.max_items, 1, math.inf)


@dataclass(frozen=True, slots=True)
class Counts:
    """Pairs seen; a win is a pair that the challenger does better on. Samples are sums over canary pairs."""

    canaries: int = 0
    wins: int = 0
    losses: int = 0
    heldout: int = 0
    heldout_wins: int = 0
    heldout_losses: int = 0
    challenger_samples: int = 0
    champion_samples: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All evidence on one challenger so far; `to_dict` is JSON-ready and `from_dict` its inverse.

    Attributes:
        number: 1 for the first challenger that this task ever had, 2 for the second, and so on; sets its alpha.
    """

    rules: Rules
    number: int
    counts: Counts
    wealth: Wealth = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        wealth = {name: w.tolist() for name, w in self.wealth.items()}
        return {"rules": asdict(self.rules), "number": self.number, "counts": asdict(self.counts), "wealth": wealth}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> State:
        """Raises ValueError if the wealth is not that of this gate's processes and stakes, or not finite."""
        spent_alpha(1.0, body["number"])
        rules, wealth = Rules(**body["rules"]), {k: np.array(w, dtype=float) for k, w in body["wealth"].items()}
        expected = {name: w.shape for name, w in even().items()}
        found = {name: w.shape for name, w in wealth.items()}
        if found != expected:
            raise ValueError(f"gate state has processes {found}; this gate has {expected}")
        if not all(np.isfinite(w).all() for w in wealth.values()):
            raise ValueError("gate state has a wealth that is not finite")
        return cls(rules, body["number"], Counts(**body["counts"]), wealth)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence says now.

    Attributes:
        road: by what it was promoted, else None.
        reason: one sentence for people, naming values and bounds.
        e_value, threshold: evidence for promotion, and what it has to reach: 1 / alpha of this challenger.
        e_values: of every process by name: superiority, noninferiority, saving, harm, heldout, heldout_harm.
    """

    decision: Decision
    road: Road | None
    reason: str
    e_value: float
    threshold: float
    e_values: dict[str, float]
    counts: Counts


def spent_alpha(alpha: float, number: int) -> float:
    """The part of alpha for a task's challenger `number` (1, 2, ...): alpha 6 / (pi^2 number^2); all add up to alpha.

    Raises:
        ValueError: `number` is below 1.
    """
    _within("number", number, 1, math.inf)
    return alpha * 6 / (math.pi * number) ** 2


def start(rules: Rules, number: int) -> State:
    """No evidence yet on a task's challenger `number` (1, 2, ...)."""
    spent_alpha(rules.alpha, number)
    return State(rules, number, Counts(), even())


def update(state: State, pair: Pair) -> State:
    """The state after one more pair."""
    gain = float(pair.challenger) - float(pair.champion)
    won, lost, c = int(gain > 0), int(gain < 0), state.counts
    if isinstance(pair, HeldoutPair):
        wealth = bet_heldout(state.wealth, np.array(gain), state.rules.margin)
        counts = replace(
            c, heldout=c.heldout + 1, heldout_wins=c.heldout_wins + won, heldout_losses=c.heldout_losses + lost
        )
    else:
        saved = (pair.champion_samples - pair.challenger_samples) / max(pair.max_samples - 1, 1)
        wealth = bet_canary(state.wealth, np.array(gain), np.array(saved), state.rules.margin)
        counts = replace(
            c,
            canaries=c.canaries + 1,
            wins=c.wins + won,
            losses=c.losses + lost,
            challenger_samples=c.challenger_samples + pair.challenger_samples,
            champion_samples=c.champion_samples + pair.champion_samples,
        )
    return replace(state, counts=counts, wealth=wealth)


def verdict(state: State) -> Verdict:
    """What the state says; looking costs nothing. The first promote or reject is final: the caller stops there."""
    logs = {name: float(v) for name, v in log_e(state.wealth).items()}
    rules, c = state.rules, state.counts
    threshold = 1 / spent_alpha(rules.alpha, state.number)
    e_value, harm = _e(for_promotion(logs, rules.heldout)), _e(for_harm(logs))
    road, decision = None, Decision.UNDECIDED
    if e_value >= threshold:
        decision, road = Decision.PROMOTE, Road.ACCURACY if logs["superiority"] >= economy(logs) else Road.SAMPLES
        reason = f"{_PROMOTED[road]}: e-value {e_value:.4g} >= {threshold:.4g} after {_seen(c)}"
    elif harm >= 1 / rules.harm_alpha:
        decision = Decision.REJECT
        reason = f"worse than the champion: e-value of harm {harm:.4g} >= {1 / rules.harm_alpha:.4g} after {_seen(c)}"
    elif c.canaries >= rules.max_items:
        decision = Decision.REJECT
        reason = f"no gain shown within {rules.max_items} canary items: e-value {e_value:.4g} < {threshold:.4g}"
    else:
        reason = f"e-value {e_value:.4g} < {threshold:.4g} after {_seen(c)}"
    return Verdict(decision, road, reason, e_value, threshold, {k: _e(v) for k, v in logs.items()}, c)


def decide(pairs: Iterable[Pair], rules: Rules, number: int = 1) -> Verdict:
    """Look after every pair; the first promote or reject, or undecided when the pairs run out."""
    state = start(rules, number)
    for pair in pairs:
        state = update(state, pair)
        seen = verdict(state)
        if seen.decision is not Decision.UNDECIDED:
            return seen
    return verdict(state)


def _e(log: Any) -> float:
    return math.exp(min(float(log), 700.0))


_PROMOTED = {Road.ACCURACY: "more right answers", Road.SAMPLES: "not inferior and fewer samples to a safe vote"}


def _seen(c: Counts) -> str:
    canaries = f"{c.canaries} canary items ({c.wins} won, {c.losses} lost)"
    return f"{canaries} and {c.heldout} held-out prompts ({c.heldout_wins} won, {c.heldout_losses} lost)"


def _within(name: str, value: float, low: float, high: float, *, open_ends: bool = False) -> None:
    """NaN is within nothing."""
    if not (low < value < high if open_ends else low <= value <= high):
        bounds = f"between {low} and {high}" if open_ends else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")
