"""The probe that notices a poisoned engine, on the scripted engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from service.core.types import Prompt, Sample, Sampling
from service.engine.base import collect
from service.engine.probe import Probe, State, probe_prompt
from service.engine.scripted import Cue, ScriptedEngine, Utf8Chat
from service.errors import EngineUnavailable


class Answers:
    """A probe on a scripted engine that says `text`, with the log-probability turned into `logprob` if given."""

    def __init__(self, text: str = "one two three") -> None:
        self.text = text
        self.logprob: float | None = None
        self.engine = ScriptedEngine(self._say)
        self.probe = Probe(self.generate, probe_prompt(self.engine.chat))

    def _say(self, cue: Cue) -> str:
        assert "one two three" in cue.text
        return self.text

    async def generate(self, prompt: Prompt, plan: Sampling) -> Sample:
        (sample,) = await collect(self.engine, prompt, plan)
        return sample if self.logprob is None else replace(sample, mean_logprob=self.logprob)

    async def run(self) -> State:
        return (await self.probe.run()).state


async def test_it_learns_the_continuation_and_finds_it_again():
    answers = Answers()
    assert [await answers.run() for _ in range(3)] == [State.WELL] * 3
    assert answers.probe.expected == tuple(b"one ")
    assert answers.probe.failures == 0


async def test_later_tokens_may_differ():
    answers = Answers("one two three")
    await answers.run()
    answers.text = "one 2 3"
    assert await answers.run() is State.WELL


async def test_a_mismatch_is_suspect_and_poisoned_the_second_time_in_a_row():
    answers = Answers()
    await answers.run()
    answers.text = "!!!!!!!!"
    assert await answers.run() is State.SUSPECT
    answers.text = "one two three"
    assert await answers.run() is State.WELL
    answers.text = "!!!!!!!!"
    assert await answers.run() is State.SUSPECT
    verdict = await answers.probe.run()
    assert verdict.state is State.POISONED
    assert str(list(b"!!!!")) in verdict.reason
    assert answers.probe.failures == 3


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("text, logprob", [("", None), (" \n", None), ("one two", math.nan), ("one two", -math.inf)])
async def test_empty_text_and_values_that_are_not_finite_are_final_at_once(
    text: str, logprob: float | None, learned: bool
):
    answers = Answers()
    if learned:
        await answers.run()
    answers.text, answers.logprob = text, logprob
    verdict = await answers.probe.run()
    assert verdict.state is State.POISONED
    assert verdict.reason
    assert answers.probe.failures == 1


async def test_what_makes_no_sense_is_not_learned():
    answers = Answers("")
    assert await answers.run() is State.POISONED
    answers.text = "one two three"
    assert await answers.run() is State.WELL


async def test_errors_are_passed_on():
    answers = Answers()
    await answers.engine.aclose()
    with pytest.raises(EngineUnavailable):
        await answers.probe.run()
    assert answers.probe.failures == 0


def test_the_known_prompt_is_plain():
    prompt = probe_prompt(Utf8Chat())
    assert prompt.soft is None
    assert prompt.span == (0, 0)
