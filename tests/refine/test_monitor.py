from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.types import Arm, Feedback
from service.refine.monitor import (
    ALL,
    FEEDBACK_KEPT,
    HALF_LIFE,
    Monitor,
    breaches,
    figures,
    hear,
    judge,
    observe,
    publish,
    resume,
)
from tests.valkey import make_outcome


def _watched(n: int, **changes: Any) -> Monitor:
    monitor = Monitor()
    for i in range(n):
        monitor = observe(monitor, make_outcome(i, **changes))
    return monitor


def test_a_fresh_monitor_knows_nothing() -> None:
    assert set(figures(Monitor()).values()) == {None}
    assert breaches(Monitor(), {"accuracy": 1.0, "consensus": 1.0, "latency_p95_s": 0.0}) == []


def test_figures_of_equal_outcomes_are_those_of_one() -> None:
    now = figures(_watched(50))
    assert now["consensus"] == pytest.approx(2 / 3)
    assert now["confidence"] == pytest.approx(0.875)
    assert now["samples_per_answer"] == pytest.approx(3)
    assert now["parse_failures"] == pytest.approx(1 / 3)
    assert now["completion_tokens"] == pytest.approx(8 / 3)
    assert now["latency_p50_s"] == pytest.approx(0.25, rel=0.06)
    assert now["accuracy"] is None


def test_arms_are_apart_and_together() -> None:
    monitor = Monitor()
    for i in range(10):
        monitor = observe(monitor, make_outcome(i, arm=Arm.CONTROL, share=0.5))
        monitor = observe(monitor, make_outcome(i, arm=Arm.CHAMPION, share=1.0))
    assert figures(monitor, "control")["consensus"] == pytest.approx(0.5)
    assert figures(monitor, "champion")["consensus"] == pytest.approx(1.0)
    assert figures(monitor)["consensus"] == pytest.approx(0.75, abs=0.01)
    assert {arm: r.count for arm, r in monitor.arms.items()} == {"control": 10, "champion": 10, ALL: 20}


def test_old_outcomes_are_forgotten_by_half() -> None:
    monitor = _watched(20 * HALF_LIFE, share=0.0)
    for i in range(HALF_LIFE):
        monitor = observe(monitor, make_outcome(i, share=1.0))
    assert figures(monitor)["consensus"] == pytest.approx(0.5, abs=0.01)
    assert monitor.arms[ALL].count == 21 * HALF_LIFE


def test_free_text_counts_for_length_and_latency_only() -> None:
    free = {"counts": {}, "unparseable": 0, "share": 0.0, "confidence": 0.0}
    now = figures(_watched(30, **free))
    assert (now["consensus"], now["parse_failures"]) == (None, None)
    assert now["samples_per_answer"] == pytest.approx(3)
    mixed = observe(_watched(30, **free), make_outcome(99))
    assert figures(mixed)["consensus"] == pytest.approx(2 / 3)


def test_quantiles() -> None:
    monitor = Monitor()
    for i in range(100):
        monitor = observe(monitor, make_outcome(i, latency_s=10.0 if i % 10 == 0 else 0.1))
    assert figures(monitor)["latency_p50_s"] == pytest.approx(0.1, rel=0.06)
    assert figures(monitor)["latency_p95_s"] == pytest.approx(10.0, rel=0.06)


@given(st.lists(st.floats(min_value=1e-4, max_value=1e4), min_size=1, max_size=40))
def test_quantiles_lie_within_the_data(latencies: list[float]) -> None:
    monitor = Monitor()
    for i, latency in enumerate(latencies):
        monitor = observe(monitor, make_outcome(i, latency_s=latency))
    now = figures(monitor)
    p50, p95 = now["latency_p50_s"], now["latency_p95_s"]
    assert p50 is not None
    assert p95 is not None
    assert min(latencies) / 1.06 <= p50 <= p95 <= max(latencies) * 1.06


@pytest.mark.parametrize("latency", [0.0, -1.0, 1e-9, 1e12, float("inf")])
def test_odd_latencies_do_no_harm(latency: float) -> None:
    assert figures(_watched(1, latency_s=latency))["latency_p95_s"] is not None


def test_breaches_name_value_and_target() -> None:
    monitor = _watched(30)
    met = {"consensus": 0.6, "samples_per_answer": 3.5, "parse_failures": 0.4, "completion_tokens": 3.0}
    assert breaches(monitor, met | {"latency_p95_s": 0.3}) == []
    missed = {"consensus": 0.7, "samples_per_answer": 2.5, "parse_failures": 0.3, "completion_tokens": 2.0}
    found = breaches(monitor, missed | {"latency_p95_s": 0.2, "accuracy": None, "unheard_of": 1.0})
    assert [b["name"] for b in found] == [*missed, "latency_p95_s"]
    assert found[0] == {"name": "consensus", "value": pytest.approx(2 / 3), "target": 0.7}


def test_too_little_evidence_is_no_breach() -> None:
    assert breaches(_watched(19), {"consensus": 1.0}) == []
    assert breaches(_watched(20), {"consensus": 1.0}) != []
    monitor = Monitor()
    for i in range(9):
        monitor = hear(monitor, f"r{i}", "champion", False)
    assert breaches(monitor, {"accuracy": 0.5}) == []
    assert breaches(hear(monitor, "r9", "champion", False), {"accuracy": 0.5}) == [
        {"name": "accuracy", "value": 0.0, "target": 0.5}
    ]


def test_feedback_counts_the_last_word_of_each_request() -> None:
    monitor = hear(hear(Monitor(), "a", "champion", False), "b", "control", True)
    assert figures(monitor)["accuracy"] == 0.5
    assert figures(hear(monitor, "a", "champion", True))["accuracy"] == 1.0
    assert figures(monitor, "control")["accuracy"] == 1.0
    assert figures(monitor, "champion")["accuracy"] == 0.0


def test_feedback_is_bounded_to_the_latest() -> None:
    monitor = Monitor()
    for i in range(2 * FEEDBACK_KEPT):
        monitor = hear(monitor, f"r{i}", "champion", i >= FEEDBACK_KEPT)
    assert len(monitor.feedback) == FEEDBACK_KEPT
    assert figures(monitor)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({"correct": True, "answer": "7", "score": 0.0}, True),
        ({"correct": False, "answer": "42"}, False),
        ({"answer": " 42 "}, True),
        ({"answer": "43", "score": 1.0}, False),
        ({"score": 0.5}, True),
        ({"score": 0.49}, False),
        ({}, None),
    ],
)
def test_the_strongest_word_decides(said: dict[str, object], verdict: bool | None) -> None:
    assert judge(Feedback("r", "math", **said), make_outcome(1)) is verdict  # type: ignore[arg-type]


def test_an_answer_cannot_be_judged_without_its_outcome() -> None:
    assert judge(Feedback("r", "math", answer="42"), None) is None
    assert judge(Feedback("r", "math", correct=True), None) is True


def test_publish_and_resume_round_trip_through_json() -> None:
    monitor = hear(_watched(25), "r1", "champion", True)
    published = orjson.loads(orjson.dumps(publish("math", monitor, {"consensus": 0.9})))
    assert resume(published) == monitor
    assert (published["task"], published["outcomes"], published["feedback"]) == ("math", 25, 1)
    assert [b["name"] for b in published["breaches"]] == ["consensus"]
    assert published["arms"]["champion"]["outcomes"] == 25


@pytest.mark.parametrize("published", [None, {}, {"state": None}, {"state": {"arms": {"all": {}}}}])
def test_a_state_that_cannot_be_read_starts_afresh(published: dict[str, object] | None) -> None:
    assert resume(published) == Monitor()


def test_states_stay_small() -> None:
    monitor = Monitor()
    for i in range(3_000):
        monitor = observe(monitor, make_outcome(i, latency_s=0.001 * (i + 1)))
        monitor = hear(monitor, f"detot-math-{i:032d}", "champion", True)
    assert len(orjson.dumps(publish("math", monitor, {}))) < 32_000
