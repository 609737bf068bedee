"""The values that travel between the layers. Frozen, comparable, without behaviour beyond derived properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np


class AnswerType(StrEnum):
    """What a task's answer is; decides extraction and canonical key."""

    NUMBER = "number"
    CHOICE = "choice"
    BOOLEAN = "boolean"
    LABEL = "label"
    TEXT = "text"  # short text
    FREE = "free"  # never voted on


class Arm(StrEnum):
    """Which version serves a request. Control is always the zero offset."""

    CONTROL = "control"
    CHAMPION = "champion"
    CHALLENGER = "challenger"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A templated conversation ready for an engine.

    Attributes:
        token_ids: ids of the whole conversation, anchor included.
        span: `[start, stop)` of the anchor's tokens in `token_ids`; empty span when there is no anchor.
        soft: soft prompt, float32 `(stop - start, d)`, standing where the anchor's tokens stand; None for the
            zero offset, so that zero is exactly the plain prompt.
        turns: the conversation, for engines behind a server that renders it itself: the last of its opening system
            messages ends where the anchor begins. Empty where only token ids are known.
    """

    token_ids: tuple[int, ...]
    span: tuple[int, int] = (0, 0)
    soft: np.ndarray | None = field(default=None, compare=False)
    turns: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How samples are drawn and when to stop.

    Attributes:
        min_samples, max_samples: bounds of the vote; equal for a fixed number.
        in_flight: samples generated at the same time.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        max_tokens: longest completion, in tokens.
        confidence: the vote stops once the leader is ahead of the runner-up with this posterior probability.
        stop: strings that end a completion (not included in its text).
        seed: sample `i` is drawn with `sample_seed(seed, i)`.
        stream: the engine yields a Delta for every piece of text as well (only with one sample).
        extra: OpenAI request fields beyond these that the engine honours, as the caller wrote them (never mutated).
    """

    min_samples: int = 3
    max_samples: int = 16
    in_flight: int = 4
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 256
    confidence: float = 0.95
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def but(self, **changes: Any) -> Sampling:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed completion's text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    Attributes:
        index: 0-based number of the sample within its request.
        token_ids: generated ids, end-of-sequence token excluded.
        text: decoded text, special tokens removed.
        finish_reason: "stop" or "length"; "tool_calls" where the plan's extra fields hold tools.
        mean_logprob: mean log-probability, in nats per token, of the generated tokens under the model's
            untempered distribution; 0.0 for an empty completion.
        raw: what the plan's extra fields asked for beyond text, in OpenAI's words (`tool_calls`, `logprobs`,
            `prompt_tokens`); None without such fields.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    mean_logprob: float
    raw: Mapping[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one sample votes for. `key` is None when no answer could be read from it."""

    index: int
    key: str | None
    answer: str | None
    mean_logprob: float


@dataclass(frozen=True, slots=True)
class Vote:
    """The tally of a request's ballots.

    Attributes:
        answer: the leader's answer as written by its best sample, None if nothing could be parsed.
        key: canonical key of the leader.
        counts: votes per canonical key, most first.
        share: leader's votes over all samples, unparseable ones included.
        confidence: posterior probability that the leader beats the runner-up (2305.11860, Beta stopping).
        samples: ballots counted, unparseable ones included.
        unparseable: samples that voted for nothing.
        tie: two or more answers had the most votes, and mean log-probability decided.
        best: index of the leader's sample with the highest mean log-probability, None without a leader.
    """

    answer: str | None
    key: str | None
    counts: dict[str, int]
    share: float
    confidence: float
    samples: int
    unparseable: int
    tie: bool
    best: int | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The identity of a served model; an offset is valid for exactly one of these.

    Attributes:
        id: public model id.
        revision: content hash or hub commit of the weights.
        hidden_size: embedding width `d`.
        tokenizer_hash: sha256 of the tokenizer definition.
        context: longest prompt plus completion, in tokens.
    """

    id: str
    revision: str
    hidden_size: int
    tokenizer_hash: str
    context: int


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """How the answer of a task is read from text.

    Attributes:
        type: kind of answer.
        labels: canonical labels of a closed set (`label`), in catalogue order.
        aliases: other spellings, lower case -> canonical label.
    """

    type: AnswerType
    labels: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """What an outcome keeps of one sample: enough for a refiner to use it again."""

    key: str | None
    token_ids: tuple[int, ...]
    mean_logprob: float
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished request.

    Attributes:
        id: the request's id, also the OpenAI response id; unique.
        task, version, arm, model: what served it.
        created: Unix time in seconds.
        messages: the conversation as sent, roles and text; None where prompts are not retained.
        answer, key, counts, share, confidence, unparseable, tie: the vote (see Vote); answer None for free text.
        drawn: every finished sample.
        anchor: the anchor variant's name.
        plan: temperature, top_p, max_tokens, seed, min_samples, max_samples as used.
        prompt_tokens, completion_tokens: token counts, completion summed over samples.
        latency_s: seconds from admission to the answer.
        truncated: messages or token ids were cut for storage; such an outcome is no training material.
    """

    id: str
    task: str
    version: int
    arm: Arm
    model: str
    created: float
    messages: tuple[dict[str, str], ...] | None
    answer: str | None
    key: str | None
    counts: dict[str, int]
    share: float
    confidence: float
    unparseable: int
    tie: bool
    drawn: tuple[DrawnSample, ...]
    anchor: str
    plan: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Feedback:
    """A user's word on a recorded request. At least one of `correct`, `answer`, `score` is set; score in [0, 1]."""

    request_id: str
    task: str
    correct: bool | None = None
    answer: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A task's pointer: which versions are served. Version 0 is the zero offset and needs no artifact.

    Attributes:
        version: the champion's version.
        epoch: counts changes of the head; every step that changes anything makes it grow by one.
        frozen: refinement is stopped (by an operator or a guard), with `reason`.
        challenger: the version on trial, 0 for none.
        share: the challenger's share of the requests that are not on the control arm, in [0, 1).
        pinned: an operator holds the champion where it is; nothing automatic moves it.
    """

    version: int = 0
    epoch: int = 0
    frozen: bool = False
    reason: str = ""
    challenger: int = 0
    share: float = 0.0
    pinned: bool = False


ROLLOUT = (0.05, 0.25, 1.0)  # a challenger's shares, one after the other; the last one is the promotion
