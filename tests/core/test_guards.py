"""Guards: each failure signature fires on its failure, and on nothing else; noise stays quiet by simulation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from service.core.guards import (
    Alarm,
    Signature,
    Window,
    alternation,
    collapse,
    constant_template,
    fall_after_publish,
    flips,
    overfitting,
    parse_failures,
    replicas_differ,
    stale_offsets,
    worker_lag,
    zigzag,
)
from service.core.shift import Mean


def window(
    rng: np.random.Generator,
    n: int = 200,
    *,
    consensus: float = 0.7,
    agreement: float = 0.8,
    answers: tuple[float, ...] = (0.5, 0.5),
    entropy: float = 0.4,
    length: float = 120,
    unparseable: float = 0.05,
) -> Window:
    """A window of `n` requests with these true means."""
    drawn = Counter(f"answer {i}" for i in rng.choice(len(answers), n, p=answers))
    return Window(
        consensus=Mean.of(rng.binomial(8, consensus, n) / 8),
        agreement=Mean.of(rng.binomial(1, agreement, n)),
        answers=drawn,
        entropy=Mean.of(entropy * rng.gamma(4, 1 / 4, n)),
        length=Mean.of(length * rng.gamma(4, 1 / 4, n)),
        unparseable=Mean.of(rng.binomial(8, unparseable, n) / 8),
    )


STILL = (
    window,
    lambda rng, n: window(rng, n, agreement=0.98, unparseable=0.005, consensus=0.98),
    lambda rng, n: window(rng, n, answers=(0.1,) * 10),
)


def checks(alarms: list[Alarm]) -> list[str]:
    return [alarm.check for alarm in alarms]


@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({"consensus": 0.95, "agreement": 0.55}, ["consensus_without_agreement"]),
        ({"answers": (0.97, 0.03)}, ["one_answer"]),
        ({"entropy": 0.05}, ["low_entropy"]),
        ({"length": 30}, ["length_drift"]),
        ({"length": 400}, ["length_drift"]),
        ({"unparseable": 0.4}, ["parse_failures"]),
        (
            {"consensus": 0.99, "agreement": 0.5, "answers": (0.99, 0.01)},
            ["consensus_without_agreement", "one_answer"],
        ),
    ],
)
def test_each_sign_of_collapse(change, fires):
    rng = np.random.default_rng(1)
    alarms = collapse(window(rng), window(rng, **change))
    assert checks(alarms) == fires
    assert {a.signature for a in alarms} == {Signature.COLLAPSE}
    assert all("bound" in a.reason for a in alarms)


@pytest.mark.parametrize(
    "change",
    [
        {"consensus": 0.95, "agreement": 0.85},  # learning: more consensus, and with the anchor
        {"agreement": 0.6},  # corrects the anchor without more consensus: the gate's business
        {"entropy": 0.2, "length": 80, "unparseable": 0.0, "consensus": 0.85},  # what a good offset does
        {"answers": (0.6, 0.4)},
    ],
)
def test_learning_is_no_collapse(change):
    rng = np.random.default_rng(2)
    assert collapse(window(rng), window(rng, **change)) == []


def test_a_task_that_mostly_has_one_answer_is_no_collapse():
    rng = np.random.default_rng(3)
    skewed = (0.9, 0.1)
    assert collapse(window(rng, answers=skewed), window(rng, answers=skewed)) == []


@pytest.mark.parametrize("n", [20, 40, 100, 400])
def test_noise_fires_no_collapse_alarm(n):
    """4 x 500 pairs of windows without any change, of which some have rare events and hardly any spread."""
    rng, fired = np.random.default_rng(n), []
    for i in range(500):
        base, now = (STILL[i % 3](rng, n) for _ in range(2))
        fired += checks(collapse(base, now))
    assert fired == []


def test_few_items_are_no_evidence():
    rng = np.random.default_rng(4)
    assert collapse(window(rng, 19), window(rng, 19, unparseable=1.0, answers=(1.0, 0.0))) == []


def test_reason_and_values_name_what_was_compared():
    rng = np.random.default_rng(5)
    base, now = window(rng), replace(window(rng), unparseable=Mean(0.5, 0.1, 200))
    alarm = parse_failures(base, now)
    assert alarm is not None
    assert alarm.values == {"unparseable": 0.5, "base_unparseable": base.unparseable.mean}
    assert "to 0.500 (bound 0.1)" in alarm.reason


def test_a_template_that_always_gets_one_answer():
    truths = ["yes", "no"] * 20
    stuck = [("yes", truth) for truth in truths]
    right = [(truth, truth) for truth in truths]
    constant_by_right = [("yes", "yes")] * 40
    alarm = constant_template({"fine": right, "one-sided": constant_by_right, "stuck": stuck})
    assert alarm is not None
    assert "'stuck' got 'yes' for 40 of 40" in alarm.reason
    assert constant_template({"fine": right, "one-sided": constant_by_right}) is None
    assert constant_template({"few": stuck[:18]}) is None
    assert constant_template({"unreadable": [(None, t) for t in truths]}) is None
    assert constant_template({}) is None


def test_guessing_is_not_a_constant_template():
    rng = np.random.default_rng(6)
    for _ in range(500):
        pairs = [(str(rng.integers(2)), str(rng.integers(2))) for _ in range(30)]
        assert constant_template({"t": pairs}) is None


def test_champion_flips():
    assert flips([0, 1, 0, 1, 0]) is not None
    assert flips([0, 1, 2, 3, 4, 5, 6]) is None
    assert flips([0, 1, 0, 2, 3, 4]) is None  # one rollback is daily life
    assert flips([0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) is None  # long ago
    assert flips([]) is None


def test_a_metric_that_goes_up_and_down_in_turn():
    up, down = Mean(0.7, 0.4, 400), Mean(0.5, 0.4, 400)
    assert alternation([down, up, down, up, down]) is not None
    assert alternation([up, down, up, down]) is None  # not yet often enough
    assert alternation([down, up, down, up, up]) is None
    assert alternation([replace(down, n=20), replace(up, n=20)] * 3) is None  # within chance


def test_noise_does_not_alternate():
    """Differences of independent values change sign two times in three: signs alone would fire."""
    rng = np.random.default_rng(7)
    metrics = [Mean.of(rng.binomial(1, 0.6, 100)) for _ in range(4000)]
    assert all(alternation(metrics[i : i + 5]) is None for i in range(len(metrics) - 5))


def test_updates_that_undo_each_other():
    assert zigzag([0.1, -0.8, -0.9, -0.7, -0.6]) is not None
    assert zigzag([-0.8, -0.9, -0.7]) is None
    assert zigzag([-0.8, -0.9, 0.2, -0.7]) is None
    rng = np.random.default_rng(8)
    steps = rng.normal(size=(2000, 16))  # a very small offset, so that chance has its best try
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    cosines = (steps[1:] * steps[:-1]).sum(1).tolist()
    assert all(zigzag(cosines[: i + 1]) is None for i in range(len(cosines)))


def test_a_fall_after_publishing():
    before = Mean(0.8, 0.4, 300)
    assert fall_after_publish(before, Mean(0.6, 0.49, 300)) is not None
    assert fall_after_publish(before, Mean(0.9, 0.3, 300)) is None
    assert fall_after_publish(before, Mean(0.76, 0.43, 100_000)) is None  # certain, but within the bound


def test_one_replica_that_differs():
    good = {f"api-{i}": Mean(0.8, 0.4, 300) for i in range(8)}
    alarm = replicas_differ({**good, "api-8": Mean(0.5, 0.5, 300)})
    assert alarm is not None
    assert "'api-8'" in alarm.reason
    assert replicas_differ(good) is None
    assert replicas_differ({"api-0": good["api-0"]}) is None


def test_equal_replicas_do_not_differ_by_chance():
    rng = np.random.default_rng(9)
    for _ in range(500):
        assert replicas_differ({f"api-{i}": Mean.of(rng.binomial(1, 0.7, 60)) for i in range(12)}) is None


def test_overfitting():
    assert overfitting(Mean(0.3, 0.4, 100), Mean(0.0, 0.3, 200)) is not None
    assert overfitting(Mean(0.3, 0.4, 100), Mean(0.28, 0.3, 200)) is None
    assert overfitting(Mean(-0.1, 0.4, 100), Mean(-0.5, 0.3, 200)) is None  # gained nothing: just bad
    rng = np.random.default_rng(10)
    for _ in range(500):
        train, gate = (Mean.of(rng.choice((-1, 0, 1), 64, p=(0.1, 0.75, 0.15))) for _ in range(2))
        assert overfitting(train, gate) is None


def test_stale_offsets():
    alarm = stale_offsets(7, 45, {"api-0": 7, "api-1": 6})
    assert alarm is not None
    assert alarm.signature is Signature.BROKEN_COMMUNICATION
    assert "'api-1' serves 6" in alarm.reason
    assert "45 s ago (bound 30 s)" in alarm.reason
    assert stale_offsets(7, 10, {"api-1": 6}) is None
    assert stale_offsets(7, 4500, {"api-0": 7, "api-1": 7}) is None


def test_worker_lag():
    assert worker_lag(1000, 3) is not None
    assert worker_lag(1, 6000) is not None
    assert worker_lag(10, 100) is None
    assert worker_lag(5000, 0) is None  # nothing waits


@pytest.mark.parametrize("values", [(math.nan, 0.1, 3), (0.5, -0.1, 3), (0.5, math.inf, 3), (0.5, 0.1, 0)])
def test_a_mean_that_is_no_number_is_refused_not_passed_over(values):
    with pytest.raises(ValueError, match="must be finite"):
        Mean(*values)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 value"):
        Mean.of([])
    with pytest.raises(ValueError, match="must be finite"):
        Mean.of([1.0, math.nan])
