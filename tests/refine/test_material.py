from __future__ import annotations

from dataclasses import replace

import pytest

from service.core.types import Arm, DrawnSample, Feedback, Outcome
from service.engine.scripted import Utf8Chat
from service.refine.material import for_gate, gather, question_of
from service.tasks.catalogue import load_catalogue
from tests.valkey import make_outcome

TASK = load_catalogue().tasks["math_word_problem"]
ANCHOR = TASK.anchors["default"]


def outcome(i: int, question: str, keys: list[str | None], **changes) -> Outcome:
    drawn = tuple(DrawnSample(key, (1, 2), -0.5, "stop") for key in keys)
    made = make_outcome(i, messages=({"role": "user", "content": question},), drawn=drawn, arm=Arm.CONTROL)
    return replace(made, task=TASK.id, **{"version": 0, "anchor": "default"} | changes)


def material(outcomes, feedback=None, version=0, gate_share=0.0):
    said = {f.request_id: f for f in feedback or []}
    gold = lambda f, o, q: f.answer  # noqa: E731
    return gather(
        TASK, outcomes, said, chat=Utf8Chat(), anchor=ANCHOR, version=version, gold=gold, gate_share=gate_share
    )


def test_outcomes_of_one_prompt_are_one_group():
    found = material([outcome(1, "a?", ["1", "2"]), outcome(2, "a?", ["1", None]), outcome(3, "b?", ["5"])])
    assert [len(g.samples) for g in found.train] == [4, 1]
    assert found.train[0].frozen == {"1": 2, "2": 1}
    assert found.train[0].question == "a?"
    assert (found.outcomes, found.unusable) == (3, 0)


def test_samples_of_another_version_are_only_frozen_votes():
    found = material([outcome(1, "a?", ["1"], version=3), outcome(2, "a?", ["2"])], version=3)
    (group,) = found.train
    assert [s.key for s in group.samples] == ["1"]
    assert group.frozen == {"2": 1}
    assert group.version == 3


def test_what_cannot_be_used_is_counted():
    whole = outcome(1, "a?", ["1"])
    left_out = [replace(whole, messages=None), replace(whole, truncated=True), replace(whole, drawn=())]
    found = material([whole, *left_out])
    assert (len(found.train), found.outcomes, found.unusable) == (1, 4, 3)


def test_no_prompt_is_on_both_sides_and_sides_never_change():
    outcomes = [outcome(i, f"question {i}?", ["1"] * 4) for i in range(200)]
    found = material(outcomes, gate_share=0.3)
    train, held_out = {g.question for g in found.train}, {h.question for h in found.held_out}
    assert not train & held_out
    assert len(train) + len(held_out) == 200
    assert 30 <= len(held_out) <= 90
    assert held_out == {f"question {i}?" for i in range(200) if for_gate(TASK.id, f"question {i}?", 0.3)}


@pytest.mark.parametrize(("keys", "agreed"), [(["1"] * 4, "1"), (["1"] * 3, None), (["1", "1", "2", "2"], None)])
def test_a_held_out_prompt_needs_votes_that_agree(keys, agreed):
    held_out = material([outcome(1, "a?", keys)], gate_share=1.0).held_out
    assert [h.key for h in held_out] == ([agreed] if agreed else [])


def test_feedback_goes_with_its_prompt():
    one = outcome(1, "a?", ["1"])
    (group,) = material([one], [Feedback(one.id, TASK.id, answer="7")]).train
    assert group.gold == "7"
    assert group.feedback is not None


def test_the_question_is_the_last_user_turn():
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    assert question_of(turns) == "z"
    assert question_of([]) == ""
