"""The engine boundary: what serving and refinement may ask of a text generator. One conformance suite runs on all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np

from service.core.types import Delta, ModelInfo, Prompt, Sample, Sampling
from service.errors import InvalidRequest, PromptTooLong

# Request fields that never go together with a soft prompt: they crash vLLM (vllm-project/vllm#57719).
PLAIN_ONLY = frozenset({"frequency_penalty", "presence_penalty", "repetition_penalty"})


class Priority(IntEnum):
    """Smaller runs first."""

    LIVE = 0
    IDLE = 1


@dataclass(slots=True)
class Stats:
    """What an engine in this process is doing and has done.

    Attributes:
        running: samples being generated.
        waiting: samples that could run, had they a place.
        tokens, prefill_tokens: tokens sampled; prompt tokens read.
        steps: decoding steps.
    """

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    steps: int = 0


@runtime_checkable
class Engine(Protocol):
    """Generates completions of prompts.

    `generate` yields samples as they finish (completion order, each index 0..max_samples-1 at most once) and keeps
    `plan.in_flight` of them running. Closing the iterator cancels every unfinished sample of that call and frees its
    work at the next step. A deadline (seconds on `time.monotonic()`'s clock) that passes ends the iteration by
    raising DeadlineExceeded; samples yielded before remain valid.

    Raises (from the first `__anext__`):
        PromptTooLong: prompt plus one token exceeds the context.
        InvalidRequest: soft prompt of the wrong shape or dtype, or not finite.
        EngineUnavailable: the engine is dead or closed.
    """

    @property
    def model(self) -> ModelInfo: ...

    @property
    def honours(self) -> frozenset[str]:
        """OpenAI request fields beyond the common ones that this engine passes on (`tools`, `logprobs`, ...)."""
        ...

    def generate(
        self, prompt: Prompt, plan: Sampling, *, priority: Priority = Priority.LIVE, deadline: float | None = None
    ) -> AsyncIterator[Sample | Delta]: ...

    async def health(self) -> None:
        """Raises EngineUnavailable with the reason when the engine cannot serve."""
        ...

    async def aclose(self) -> None: ...


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request, in [0, 2**63): splitmix64 of the pair, so neighbours are unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


def check_prompt(prompt: Prompt, model: ModelInfo) -> None:
    """What every engine checks before a prompt reaches the model.

    Raises:
        PromptTooLong: no room for a single new token.
        InvalidRequest: empty prompt, span outside the prompt, or a soft prompt that is not finite float32 of
            shape `(stop - start, d)`.
    """
    n, (start, stop) = len(prompt.token_ids), prompt.span
    if n == 0:
        raise InvalidRequest("the prompt is empty")
    if n + 1 > model.context:
        raise PromptTooLong(f"the prompt has {n} tokens; the model's context of {model.context} leaves no room")
    if not 0 <= start <= stop <= n:
        raise InvalidRequest(f"anchor span [{start}, {stop}) lies outside the prompt of {n} tokens")
    if prompt.soft is None:
        return
    want = (stop - start, model.hidden_size)
    if prompt.soft.dtype != np.float32 or prompt.soft.shape != want:
        raise InvalidRequest(f"soft prompt is {prompt.soft.dtype} {prompt.soft.shape}; the model needs float32 {want}")
    if not np.isfinite(prompt.soft).all():
        raise InvalidRequest("soft prompt holds a value that is not finite")


def check_plan(plan: Sampling) -> None:
    """What every engine checks before it draws samples.

    Raises:
        InvalidRequest: a count below 1, a negative temperature, or a nucleus mass outside (0, 1].
    """
    for name in ("max_samples", "in_flight", "max_tokens"):
        if (value := getattr(plan, name)) < 1:
            raise InvalidRequest(f"{name} is {value}; it must be at least 1", param=name)
    if not 0 <= plan.temperature < float("inf"):
        raise InvalidRequest(f"temperature is {plan.temperature}; it must be at least 0", param="temperature")
    if not 0 < plan.top_p <= 1:
        raise InvalidRequest(f"top_p is {plan.top_p}; it must be in (0, 1]", param="top_p")


async def collect(engine: Engine, prompt: Prompt, plan: Sampling, **kw: object) -> list[Sample]:
    """All samples of one call, by index."""
    async with aclosing(engine.generate(prompt, plan, **kw)) as stream:  # type: ignore[arg-type,type-var]
        return sorted([s async for s in stream if isinstance(s, Sample)], key=lambda s: s.index)
