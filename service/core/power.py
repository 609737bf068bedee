"""How many items the gate needs: simulated rounds of paired evidence, run abreast by the gate's own processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.core.eprocess import bet_canary, bet_heldout, even, for_harm, for_promotion, log_e
from service.core.gate import Rules, spent_alpha


@dataclass(frozen=True, slots=True)
class World:
    """What is true of a challenger in a simulation.

    Attributes:
        gain: accuracy of the challenger minus that of the champion on canaries, in [-1, 1].
        discordance: share of canaries on which exactly one of them is right, at least |gain|, at most 1.
        saving: mean samples saved, as a share of max_samples - 1; the difference of a pair is -1, 0 or 1 times
            `saving_spread`.
        heldout_gain, heldout_discordance: the same two of agreement with the anchor on held-out prompts.
    """

    gain: float
    discordance: float
    saving: float = 0.0
    saving_spread: float = 0.5
    heldout_gain: float = 0.0
    heldout_discordance: float = 0.0

    def __post_init__(self) -> None:
        for name, mean, spread in (
            ("gain", self.gain, self.discordance),
            ("heldout_gain", self.heldout_gain, self.heldout_discordance),
            ("saving", self.saving, self.saving_spread),
        ):
            if not abs(mean) <= spread <= 1:
                raise ValueError(f"|{name}| must be at most its spread, and that at most 1, not {mean} and {spread}")


@dataclass(frozen=True, slots=True)
class Power:
    """What the gate did in simulated rounds.

    Attributes:
        promoted, rejected: share of rounds; the others were undecided when the items ran out.
        items: canary items (each with one held-out prompt) until promotion, at 50 and 90 percent of all rounds; None
            where fewer rounds than that were promoted.
    """

    promoted: float
    rejected: float
    items: tuple[int | None, int | None]


def power(
    world: World, rng: np.random.Generator, *, rules: Rules | None = None, number: int = 1, rounds: int = 500
) -> Power:
    """Rounds of up to `rules.max_items` canary items, each with one held-out prompt, looked at after every item.

    A round ends as in `gate.verdict`: promoted or rejected at the first look that says so.
    """
    rules = rules or Rules()
    bar, harm_bar = -np.log(spent_alpha(rules.alpha, number)), -np.log(rules.harm_alpha)
    wealth, running = even((rounds,)), np.arange(rounds)
    promoted_at, rejected = np.full(rounds, np.inf), 0
    for item in range(1, rules.max_items + 1):
        gain, saved = _ternary(world.gain, world.discordance, len(running), rng), np.zeros(len(running))
        if world.saving_spread:
            saved = _ternary(world.saving / world.saving_spread, 1.0, len(running), rng) * world.saving_spread
        wealth = bet_canary(wealth, gain, saved, rules.margin)
        if rules.heldout:
            agreed = _ternary(world.heldout_gain, world.heldout_discordance, len(running), rng)
            wealth = bet_heldout(wealth, agreed, rules.margin)
        logs = log_e(wealth)
        won = for_promotion(logs, rules.heldout) >= bar
        lost = ~won & (for_harm(logs) >= harm_bar)
        promoted_at[running[won]] = item
        rejected += int(lost.sum())
        if (won | lost).any():
            on = ~(won | lost)
            running, wealth = running[on], {name: w[on] for name, w in wealth.items()}
        if not len(running):
            break
    return Power(float(np.isfinite(promoted_at).mean()), rejected / rounds, _quantiles(promoted_at))


def _ternary(mean: float, spread: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws from {-1, 0, 1} with this mean and this share of non-zeros."""
    u = rng.random(size)
    up, down = (spread + mean) / 2, (spread - mean) / 2
    return (u < up).astype(float) - (u >= 1 - down)


def _quantiles(promoted_at: np.ndarray) -> tuple[int | None, int | None]:
    at = np.quantile(promoted_at, (0.5, 0.9), method="higher")
    median, most = (int(x) if np.isfinite(x) else None for x in at)
    return median, most
