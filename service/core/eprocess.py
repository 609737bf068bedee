"""E-processes: evidence against a null that stays valid however often one looks and whenever one stops.

For differences x in [-1, 1] and the null "every x has mean at most m, given the past", the wealth of a gambler who
stakes b on each item, `prod (1 + b (x - m))` with 0 < b < 1 / (1 + m), is a non-negative supermartingale that starts
at 1 (betting; Waudby-Smith and Ramdas, 2010.09686, section 4). So is any mixture over b, and by Ville's inequality it
ever reaches 1 / alpha with probability at most alpha under the null. With x in {-1, 0, 1} and m = 0 this is the
e-value on pairs that disagree, `prod (2q)^win (2(1-q))^loss` with q = (1 + b) / 2.

The mixture is over a geometric grid of stakes, not over a truncated Beta: a finite mixture is itself exactly valid,
needs no incomplete beta function, is the same code for margins and for differences that are not binary, and its state
is a short list of numbers. It costs at most ln 5 against the best stake of the grid.

Everything here takes leading axes, so that simulations run abreast by the very code that decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

STAKES = 0.98 * 0.5 ** np.arange(5)  # as fractions of the largest stake that cannot go bankrupt

Wealth = dict[str, np.ndarray]  # ln of the wealth at each stake, (..., G), of each process by name


def even(shape: tuple[int, ...] = ()) -> Wealth:
    """Every process at its start, for `shape` simulations abreast."""
    names = ("superiority", "noninferiority", "saving", "harm", "heldout", "heldout_harm")
    return {name: np.zeros((*shape, len(STAKES))) for name in names}


def _bet(wealth: np.ndarray, x: np.ndarray, mean: float) -> np.ndarray:
    """One round against "x has mean at most `mean`": wealth `(..., G)`, x `(...)` in [-1, 1]."""
    return wealth + np.log1p(STAKES / (1 + mean) * (x - mean)[..., None])


def bet_canary(wealth: Wealth, gain: np.ndarray, saved: np.ndarray, margin: float) -> Wealth:
    """One canary item: accuracy gained and samples saved by the challenger, both in [-1, 1]."""
    return wealth | {
        "superiority": _bet(wealth["superiority"], gain, 0.0),
        "noninferiority": _bet(wealth["noninferiority"], gain, -margin),
        "saving": _bet(wealth["saving"], saved, 0.0),
        "harm": _bet(wealth["harm"], -gain, 0.0),
    }


def bet_heldout(wealth: Wealth, gain: np.ndarray, margin: float) -> Wealth:
    """One held-out prompt. Its answer is not known to be right, so only a loss beyond the margin is harm."""
    return wealth | {
        "heldout": _bet(wealth["heldout"], gain, -margin),
        "heldout_harm": _bet(wealth["heldout_harm"], -gain, margin),
    }


def log_e(wealth: Wealth) -> dict[str, Any]:
    """ln of each process's e-value `(...)`: the mean wealth over the stakes."""
    return {name: _log_mean(w) for name, w in wealth.items()}


def _log_mean(logs: np.ndarray) -> np.ndarray:
    most = logs.max(axis=-1)
    return most + np.log(np.exp(logs - most[..., None]).mean(axis=-1))


def economy(logs: Mapping[str, Any]) -> Any:
    """ln of an e-value against "inferior by more than the margin, or not saving samples"."""
    return np.minimum(logs["noninferiority"], logs["saving"])


def for_promotion(logs: Mapping[str, Any], heldout: bool) -> Any:
    """ln of an e-value against "the challenger deserves neither road".

    Under that null the held-out loss is beyond the margin, or the challenger is not superior and also inferior or not
    saving. A minimum of e-values is one if any of them is, a mean is one if all are.
    """
    roads = np.logaddexp(logs["superiority"], economy(logs)) - math.log(2)
    return np.minimum(roads, logs["heldout"]) if heldout else roads


def for_harm(logs: Mapping[str, Any]) -> Any:
    """ln of an e-value against "no worse on canaries and, within the margin, on held-out prompts"."""
    return np.logaddexp(logs["harm"], logs["heldout_harm"]) - math.log(2)
