"""What a refiner gets, and what it gives back. Two of them share this boundary: `gradient` and `evolution`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from service.core.artifact import Artifact
from service.core.types import AnswerSpec, DrawnSample, Feedback, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with the samples that serving drew for it under one version.

    Attributes:
        prompt: the whole conversation with the task's anchor in it, without a soft prompt.
        question: the request's text, for reading answers out of new samples.
        version: the offset version that drew `samples`; 0 is the zero offset.
        samples: in order of their index, each with the canonical key it votes for.
        plan: as the samples were drawn.
        frozen: votes by key that the zero offset gave on this same prompt, if it was ever asked.
        feedback: what a user said about the answer, with `gold` the key it makes right, if any.
    """

    prompt: Prompt
    question: str
    version: int
    samples: tuple[DrawnSample, ...]
    plan: Sampling
    frozen: dict[str, int] = field(default_factory=dict)
    feedback: Feedback | None = None
    gold: str | None = None


@dataclass(frozen=True, slots=True)
class Regularisation:
    """What keeps an offset small and its learning steady; settable per task.

    Attributes:
        dropout: probability with which each offset row is left out of an update, in [0, 1).
        decay: share by which the offset shrinks towards zero per update (decoupled weight decay, 1711.05101).
        norm_cap: longest offset row, as a multiple of its anchor row's norm.
        kl: weight of the KL divergence to the zero offset, per token.
        ema: weight of the past in the moving average of offsets that becomes the challenger, in [0, 1).
    """

    dropout: float = 0.1
    decay: float = 0.0
    norm_cap: float = 1.0
    kl: float = 0.01
    ema: float = 0.95


@dataclass(frozen=True, slots=True)
class Work:
    """One round's task for a refiner.

    Attributes:
        task: task id.
        answer: how answers are read.
        start: the artifact to start from: the champion's, or the zero offset on the task's anchor.
        groups: training material; none of these prompts is ever seen by the gate.
        plan: how serving draws samples, for drawing more.
        regularisation: see there.
        updates: most updates, at most 60 (DESIGN section 9: long runs collapse).
        samples: most new samples to draw.
        seed: makes the work repeatable.
        deadline: on `time.monotonic()`'s clock; what is there by then is the result.
    """

    task: str
    answer: AnswerSpec
    start: Artifact
    groups: tuple[Group, ...]
    plan: Sampling
    regularisation: Regularisation = Regularisation()
    updates: int = 60
    samples: int = 5_000
    seed: int = 0
    deadline: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A refiner's result.

    Attributes:
        offset: float32 `(k, d)`, finite, every row within the norm cap; None when nothing can be learned.
        reason: why nothing can be learned, or how the work ended.
        report: figures for the decision record: updates, samples drawn and reused, seconds, and per update
            reward, KL, norm, drift and label mass.
    """

    offset: np.ndarray | None
    reason: str
    report: dict[str, Any] = field(default_factory=dict)


class Refiner(Protocol):
    """Proposes a challenger from a round's training groups."""

    @property
    def name(self) -> str: ...

    async def propose(self, work: Work) -> Proposal:
        """Cancelling it ends the work within one update.

        Raises:
            EngineUnavailable, ModelError: the model it works with is not there.
        """
        ...

    async def aclose(self) -> None: ...
