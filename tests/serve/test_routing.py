"""Which arm a request gets: fixed by its hash, and only ever moved from champion to challenger."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.types import Arm, Head
from service.serve.live import Ready, Snapshot
from service.serve.routing import Ask, assign_arm, route
from service.tasks.catalogue import load_catalogue
from service.tasks.classify import Classifier
from service.tasks.signals import signals

TASK = "yes_no"
SHARES = st.floats(0, 1)


@pytest.fixture(scope="module")
def bare() -> Snapshot:
    catalogue = load_catalogue()
    return Snapshot(catalogue, Classifier.build(catalogue))


@pytest.fixture(scope="module")
def trial(bare: Snapshot) -> Snapshot:
    """Champion 3, challenger 4 at a quarter of the requests."""
    soft = np.ones((2, 16), np.float32)
    return replace(
        bare,
        champions={TASK: Ready(3, "Say yes or no.", soft)},
        challengers={TASK: Ready(4, "Yes or no?", 2 * soft)},
        heads={TASK: Head(version=3, epoch=9, challenger=4, share=0.25)},
    )


def routed(snapshot: Snapshot, text: str = "Is it?", task: str = TASK, arm: Arm | None = None, control: float = 0.05):
    ask = Ask(messages=({"role": "user", "content": text},), text=text, task=task, arm=arm)
    return route(snapshot, ask, signals(text), None, control)


@given(text=st.text(), control=SHARES, low=SHARES, high=SHARES)
def test_a_larger_share_only_moves_requests_from_champion_to_challenger(text, control, low, high):
    low, high = sorted((low, high))
    before, after = assign_arm("t", text, control, low), assign_arm("t", text, control, high)
    assert before == after or (before, after) == (Arm.CHAMPION, Arm.CHALLENGER)
    assert (before is Arm.CONTROL) == (assign_arm("t", text, control) is Arm.CONTROL), "control is permanent"
    assert before == assign_arm("t", text, control, low), "the same request, the same arm"


def test_shares_are_met():
    arms = [assign_arm("t", f"question {i}", 0.1, 0.25) for i in range(20_000)]
    assert arms.count(Arm.CONTROL) / 20_000 == pytest.approx(0.1, abs=0.01)
    assert arms.count(Arm.CHALLENGER) / 20_000 == pytest.approx(0.9 * 0.25, abs=0.01)
    assert {assign_arm("t", f"question {i}", 0, 0) for i in range(100)} == {Arm.CHAMPION}
    assert {assign_arm("t", f"question {i}", 0, 1) for i in range(100)} == {Arm.CHALLENGER}


def test_each_arm_is_served_by_its_version_and_anchor(trial):
    seen = {}
    for i in range(500):
        chosen = routed(trial, f"question {i}", control=0.2)
        seen.setdefault(chosen.arm, set()).add((chosen.version, chosen.anchor_text))
    assert seen[Arm.CHAMPION] == {(3, "Say yes or no.")}
    assert seen[Arm.CHALLENGER] == {(4, "Yes or no?")}
    assert {version for version, _ in seen[Arm.CONTROL]} == {0}


def test_an_arm_can_be_asked_for(trial):
    for arm, version in ((Arm.CONTROL, 0), (Arm.CHAMPION, 3), (Arm.CHALLENGER, 4)):
        chosen = routed(trial, arm=arm)
        assert (chosen.arm, chosen.version) == (arm, version)


def test_who_asks_for_a_challenger_where_there_is_none_is_told_so(bare, trial):
    assert (routed(bare, arm=Arm.CHALLENGER).arm, routed(bare, arm=Arm.CHALLENGER).version) == (Arm.CHAMPION, 0)
    over = replace(trial, challengers={})
    assert (routed(over, arm=Arm.CHALLENGER).arm, routed(over, arm=Arm.CHALLENGER).version) == (Arm.CHAMPION, 3)
    refused = [routed(over, f"question {i}").arm for i in range(200)]
    assert Arm.CHALLENGER not in refused, "a challenger that is not served gets no requests, whatever the head says"


def test_free_text_is_never_on_trial(trial):
    free = replace(
        trial, challengers={"general": Ready(4, "x", None)}, heads={"general": Head(challenger=4, share=0.9)}
    )
    assert {routed(free, f"text {i}", "general").arm for i in range(200)} == {Arm.CONTROL, Arm.CHAMPION}
