"""Notices a poisoned engine: a known short prompt, and whether its known greedy continuation still comes out.

One value that is not finite in the embeddings of one request can leave vLLM answering every later request with
status 200 and nonsense (empty text, or the token of id 0 over and over), so being alive says nothing about being well.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.core.types import Prompt, Sample, Sampling

PLAN = Sampling(min_samples=1, max_samples=1, in_flight=1, temperature=0, top_p=1.0, max_tokens=8)
_QUESTION = "Repeat exactly: one two three four five six seven eight"
_COMPARED = 4  # tokens: later ones are more often near ties, which reduced precision may turn over

Generate = Callable[[Prompt, Sampling], Awaitable[Sample]]


class Chat(Protocol):
    """What a probe needs of a `service.core.prompt.ChatFormat`."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str: ...

    def encode(self, text: str) -> list[int]: ...


class State(StrEnum):
    """What a probe found. `SUSPECT`: probe again now; the second mismatch in a row is `POISONED`."""

    WELL = "well"
    SUSPECT = "suspect"
    POISONED = "poisoned"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found, and why; `reason` is empty for a well engine."""

    state: State
    reason: str = ""


def probe_prompt(chat: Chat) -> Prompt:
    """The known prompt under a model's chat format: plain, without an anchor."""
    return Prompt(tuple(chat.encode(chat.render([{"role": "user", "content": _QUESTION}]))))


class Probe:
    """Remembers what an engine answers to the known prompt, and says whether it still does.

    Keep one probe for as long as the model is the same, also across restarts of the engine, so that a restarted one is
    held to the same continuation. Errors of `generate` (dead, late, closed) are passed on and leave the probe as it is.

    Args:
        generate: one greedy sample of a prompt under a plan.
        prompt: see `probe_prompt`.

    Attributes:
        expected: first token ids of the continuation; None until the first answer that makes sense.
        failures: probes that did not find the engine well.
    """

    def __init__(self, generate: Generate, prompt: Prompt) -> None:
        self._generate, self._prompt = generate, prompt
        self._suspect = False
        self.expected: tuple[int, ...] | None = None
        self.failures = 0

    async def run(self) -> Verdict:
        """One probe. An empty text or a log-probability that is not finite is final at once.

        A continuation that differs once may be a near tie in reduced precision: it is suspect, and final when the
        probe right after differs too.
        """
        verdict = self._judge(await self._generate(self._prompt, PLAN))
        self._suspect = verdict.state is State.SUSPECT
        self.failures += verdict.state is not State.WELL
        return verdict

    def _judge(self, sample: Sample) -> Verdict:
        if not sample.token_ids or not sample.text.strip():
            return Verdict(State.POISONED, "the known prompt was answered with an empty text")
        if not math.isfinite(sample.mean_logprob):
            return Verdict(State.POISONED, f"the known prompt's log-probability is {sample.mean_logprob}")
        got = sample.token_ids[:_COMPARED]
        self.expected = self.expected or got
        if got == self.expected:
            return Verdict(State.WELL)
        reason = f"the known prompt was continued with tokens {list(got)}, not {list(self.expected)}"
        return Verdict(State.POISONED if self._suspect else State.SUSPECT, reason)
