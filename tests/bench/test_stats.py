"""Statistics against published values and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from service.bench.stats import bootstrap_mean, mcnemar_exact, paired_difference, percentile, wilson
from service.errors import InvalidRequest

counts = st.integers(0, 60)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 857-872, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(counts, counts)
def test_wilson_lies_around_the_share(successes, failures):
    low, high = wilson(successes, successes + failures)
    assert 0 <= low <= high <= 1
    if successes + failures:
        assert low <= successes / (successes + failures) <= high


def test_wilson_without_trials_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(InvalidRequest, match="5 successes out of 4"):
        wilson(5, 4)


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(6, 2) == pytest.approx(2 * (1 + 8 + 28) / 256)
    assert mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(400, 200) == mcnemar_exact(200, 400) < 1e-15


@settings(deadline=None)
@given(counts, counts)
def test_mcnemar_is_the_binomial_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
    ],
)
def test_paired_difference_published_values(cells, low, high):
    difference, interval = paired_difference(*cells)
    assert difference == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert interval == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(counts, counts, counts, counts)
def test_paired_difference_is_antisymmetric_and_holds_the_difference(a, b, c, d):
    if a + b + c + d == 0:
        with pytest.raises(InvalidRequest):
            paired_difference(a, b, c, d)
        return
    difference, (low, high) = paired_difference(a, b, c, d)
    back, (low2, high2) = paired_difference(a, c, b, d)
    assert -1 - 1e-9 <= low <= difference + 1e-9 and difference - 1e-9 <= high <= 1 + 1e-9
    assert (back, low2, high2) == pytest.approx((-difference, -high, -low))


def test_paired_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(7)
    truth = np.array([0.5, 0.2, 0.1, 0.2])
    hits = 0
    for cells in rng.multinomial(60, truth, size=2_000):
        _, (low, high) = paired_difference(*(int(x) for x in cells))
        hits += low <= 0.1 <= high
    assert 0.93 < hits / 2_000 < 0.98


def test_bootstrap_mean_agrees_with_the_normal_interval_and_repeats():
    values = np.random.default_rng(0).exponential(2.0, 500).tolist()
    low, high = bootstrap_mean(values)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.05)
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean([3.0, 3.0]) == (3.0, 3.0)


def test_percentile():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile(range(101), 99) == 99
    assert percentile([7.0], 99.9) == 7.0


@pytest.mark.parametrize("call", [lambda: percentile([], 50), lambda: percentile([1], 101), lambda: bootstrap_mean([])])
def test_nothing_to_measure_is_an_error(call):
    with pytest.raises(InvalidRequest):
        call()
