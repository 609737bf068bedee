"""When a task gets a round. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.core.types import Head
from service.refine.state import Progress


@dataclass(frozen=True, slots=True)
class Policy:
    """How refinement runs; the same for all tasks.

    Attributes:
        outcomes: new outcomes that call for a round by themselves.
        fewest: new outcomes without which a missed threshold calls for none.
        cooldown: seconds between two rounds of a task.
        window: newest outcomes that a round learns from.
        groups: training prompts without which nothing is proposed.
        pairs: canary items a round asks at most; as many held-out prompts.
        held_out: held-out prompts from which on the gate also demands that they show no loss.
        updates, samples: most updates of a refiner, and most samples it draws.
        seconds: most seconds that a refiner may take.
        alpha, margin, items: of the gate (`core.gate.Rules`).
        live: outcomes of the challenger arm between two steps of the rollout.
    """

    outcomes: int = 200
    fewest: int = 40
    cooldown: float = 300.0
    window: int = 2_000
    groups: int = 8
    pairs: int = 48
    held_out: int = 150
    updates: int = 60
    samples: int = 5_000
    seconds: float = 900.0
    alpha: float = 0.05
    margin: float = 0.03
    items: int = 2_000
    live: int = 50


def due(progress: Progress, head: Head, monitor: Mapping[str, Any] | None, now: float, policy: Policy) -> str | None:
    """Why a task gets a round now, None if it does not.

    A candidate on its way goes on after each cool-down. Otherwise a round begins when accuracy or efficiency miss
    their target thresholds, or when enough new outcomes are there.

    Args:
        monitor: what the worker published about the task (`monitor.publish`).
        now: Unix time in seconds.
    """
    if head.frozen or head.pinned or monitor is None or now - progress.finished < policy.cooldown:
        return None
    if progress.candidate is not None:
        return "a challenger is on its way"
    new = monitor["outcomes"] - progress.outcomes
    if new >= policy.outcomes:
        return f"{new} new outcomes"
    if monitor["breaches"] and new >= policy.fewest:
        missed = ", ".join(f"{b['name']} {b['value']:.3g} against {b['target']:.3g}" for b in monitor["breaches"])
        return f"target missed: {missed}"
    return None
