"""Means and whether the shift between two of them is large and beyond chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 4.0  # standard errors that a shift has to exceed: chance does so with probability 3e-5
MIN_ITEMS = 20  # below so many values no shift is judged


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean and standard deviation of `n` independent values, such as one per request."""

    mean: float
    sd: float
    n: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.sd) and self.sd >= 0 and self.n >= 1):
            raise ValueError(f"mean and sd must be finite, sd at least 0 and n at least 1, not {self}")

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Raises ValueError if there are no values or one is not finite."""
        xs = [float(x) for x in values]
        if not xs:
            raise ValueError("a mean needs at least 1 value, not 0")
        mean = math.fsum(xs) / len(xs)
        return cls(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / max(len(xs) - 1, 1)), len(xs))


def shift(low: Mean, high: Mean, bound: float, *, z: float = Z, unit: float = 1.0) -> float | None:
    """`high - low` if it exceeds the bound by itself and zero by `z` standard errors, else None.

    The standard error has a term of one `unit` in n values, so that windows without any spread are not certain.
    """
    if low.n < MIN_ITEMS or high.n < MIN_ITEMS:
        return None
    up = high.mean - low.mean
    error = math.hypot(*(m.sd / math.sqrt(m.n) for m in (low, high)), *(unit / m.n for m in (low, high)))
    return up if up > bound and up > z * error else None


def shares(a: tuple[int, int], b: tuple[int, int]) -> tuple[Mean, Mean]:
    """The two shares `hits / n` with the spread that they have if they are the same."""
    p = (a[0] + b[0]) / (a[1] + b[1])
    sd = math.sqrt(p * (1 - p))
    return Mean(a[0] / a[1], sd, a[1]), Mean(b[0] / b[1], sd, b[1])


def z_of_many(comparisons: int) -> float:
    """Standard errors that the largest of so many shifts has to exceed, for about the chance that one has with Z."""
    return math.sqrt(Z**2 + 2 * math.log(comparisons))
