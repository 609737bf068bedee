from __future__ import annotations

import numpy as np
import pytest

from service.core import gate
from service.core.types import Head
from service.refine.state import Candidate, Progress, figures
from service.refine.trigger import Policy, due
from service.store.rounds import Round

POLICY = Policy(outcomes=200, fewest=40, cooldown=300)
BREACH = {"name": "consensus", "value": 0.4, "target": 0.5}


def candidate() -> Candidate:
    evidence = gate.update(gate.start(gate.Rules(), 3), gate.CanaryPair(True, False, 3, 5, 16))
    return Candidate(np.ones((2, 3), np.float32) / 3, 4, "gradient", {"updates": 7}, evidence, canaries=1)


def test_progress_survives_the_store():
    before = Progress(5, 3, 120, 1e9, {"level": 2}, candidate(), {"result": "undecided"})
    after = Progress.of(before.to_round())
    assert after.candidate is not None and before.candidate is not None
    assert (after.candidate.offset == before.candidate.offset).all()
    assert after.candidate.offset.dtype == np.float32
    assert figures(after.candidate) == figures(before.candidate)
    assert after.but(candidate=None).to_round() == before.but(candidate=None).to_round()


def test_a_fresh_task_has_no_progress():
    assert Progress.of(Round()).rounds == 0


def test_what_cannot_be_read_is_dropped_but_spent_alpha_stays_spent():
    kept = Progress(challengers=3, candidate=candidate()).to_round()
    spoiled = Round(kept.cursor, kept.gate.replace(b"superiority", b"something"))
    assert Progress.of(spoiled).candidate is None
    assert Progress.of(spoiled).challengers == 3


@pytest.mark.parametrize(
    ("outcomes", "missed", "reason"),
    [
        (199, [], None),
        (200, [], "200 new outcomes"),
        (39, [BREACH], None),
        (40, [BREACH], "target missed: consensus 0.4 against 0.5"),
    ],
)
def test_a_round_is_due_for_missed_targets_or_new_outcomes(outcomes, missed, reason):
    seen = {"outcomes": 1_000 + outcomes, "breaches": missed}
    assert due(Progress(outcomes=1_000), Head(), seen, 1e9, POLICY) == reason


def test_a_candidate_goes_on_by_itself():
    seen = {"outcomes": 0, "breaches": []}
    assert due(Progress(candidate=candidate()), Head(), seen, 1e9, POLICY) == "a challenger is on its way"


@pytest.mark.parametrize("head", [Head(frozen=True), Head(pinned=True)])
def test_never_on_a_frozen_or_pinned_task(head):
    assert due(Progress(), head, {"outcomes": 10_000, "breaches": []}, 1e9, POLICY) is None


def test_never_within_the_cooldown_nor_before_the_worker_has_looked():
    seen = {"outcomes": 10_000, "breaches": []}
    assert due(Progress(finished=1e9 - 299), Head(), seen, 1e9, POLICY) is None
    assert due(Progress(finished=1e9 - 301), Head(), seen, 1e9, POLICY) is not None
    assert due(Progress(), Head(), None, 1e9, POLICY) is None
