"""Statistics of measurements: intervals for shares and means, a paired test, percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.errors import InvalidRequest

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95% interval
Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """95% score interval of a share (Wilson 1927, without continuity correction); (0, 1) without trials.

    Raises:
        InvalidRequest: not 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise InvalidRequest(f"{successes} successes out of {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95 * Z95
    centre = share + z2 / (2 * trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    low, high = (centre - half) / (1 + z2 / trials), (centre + half) / (1 + z2 / trials)
    return 0.0 if successes == 0 else low, 1.0 if successes == trials else high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's test, exact: are the pairs that disagree a fair coin's? 1 without such pairs.

    Twice the smaller binomial tail, at most 1.

    Raises:
        InvalidRequest: a negative count.
    """
    if min(only_first, only_second) < 0:
        raise InvalidRequest(f"counts of pairs are {only_first} and {only_second}; they must not be negative")
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, Interval]:
    """First share minus second share over the same items, with its 95% interval.

    The interval is method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650): Wilson intervals of the two
    shares, combined with the correlation of the pairs. It keeps its coverage in small samples, where Wald's does not.

    Raises:
        InvalidRequest: no pairs, or a negative count.
    """
    n = both + only_first + only_second + neither
    if n == 0 or min(both, only_first, only_second, neither) < 0:
        raise InvalidRequest(f"counts {both}, {only_first}, {only_second}, {neither} are not those of pairs")
    first, second = both + only_first, both + only_second
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    p1, p2, phi = first / n, second / n, _phi(both, only_first, only_second, neither)
    difference = p1 - p2
    below, above = _combine(p1 - low1, high2 - p2, phi), _combine(high1 - p1, p2 - low2, phi)
    return difference, (difference - below, difference + above)


def _combine(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of the pairs, a positive one corrected for continuity as in Newcombe's method 10."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - (both + only_first + only_second + neither) / 2, 0)
    return covariance / math.sqrt(margins)


def bootstrap_mean(values: Sequence[float], *, resamples: int = 2_000, seed: int = 0) -> Interval:
    """95% percentile bootstrap interval of a mean (Efron 1979).

    Raises:
        InvalidRequest: no values.
    """
    data = _array(values)
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(data, data.size).mean() for _ in range(resamples)])
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def percentile(values: Sequence[float], q: float) -> float:
    """Percentile `q` in [0, 100], linear between neighbours.

    Raises:
        InvalidRequest: no values, or q out of range.
    """
    if not 0 <= q <= 100:
        raise InvalidRequest(f"percentile {q} is outside [0, 100]")
    return float(np.percentile(_array(values), q))


def _array(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise InvalidRequest("there are no values to measure")
    return data
