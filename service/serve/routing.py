"""Which task, arm, version, anchor and sampling plan serve a request: everything decided before the first token."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from service.core.types import AnswerType, Arm, Sampling
from service.engine.base import PLAIN_ONLY
from service.errors import UnknownTask
from service.serve.live import Snapshot
from service.tasks.catalogue import Task
from service.tasks.classify import Classification
from service.tasks.signals import Signals


@dataclass(frozen=True, slots=True)
class Ask:
    """A validated request. None means: as the task's plan says.

    `n` > 1 asks for that many raw samples and no vote; `temperature` and `top_p` then, and for free text, are the
    request's own, while a vote's stand in `vote_temperature` and `vote_top_p`.

    `extra` are OpenAI fields that the engine passes on. With `forward` the conversation is for the engine's server to
    render (tools): no anchor, no offset, no vote.
    """

    messages: tuple[dict[str, Any], ...]
    text: str
    n: int = 1
    task: str | None = None
    arm: Arm | None = None
    min_samples: int | None = None
    max_samples: int | None = None
    confidence: float | None = None
    vote_temperature: float | None = None
    vote_top_p: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    record: bool = True
    deadline: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    forward: bool = False

    @property
    def plain(self) -> bool:
        """It must be served at the zero offset."""
        return self.forward or bool(self.extra.keys() & PLAIN_ONLY)

    @property
    def recordable(self) -> bool:
        """Its samples are draws of a plan; other ways of drawing would mislead a refiner."""
        return self.record and not self.forward and not self.extra.keys() - {"logprobs", "top_logprobs"}


@dataclass(frozen=True, slots=True)
class Route:
    """How a request is served: everything that is decided before the first token."""

    id: str
    task: Task
    probability: float
    arm: Arm
    version: int
    anchor: str
    anchor_text: str | None
    plan: Sampling
    voted: bool
    soft: np.ndarray | None = field(default=None, compare=False)


def route(snapshot: Snapshot, ask: Ask, seen: Signals, found: Classification | None, control_share: float) -> Route:
    """Pin task, arm, version, anchor and plan.

    Champion and challenger bring the anchor they were learned on; without one, or on the control arm, the task's
    metadata choose the anchor variant: its embeddings are the task's initial ones. Who asks for a challenger where
    there is none gets the champion arm.

    Raises:
        UnknownTask: the named task is not in the catalogue.
    """
    name = ask.task or (found.task if found else "general")
    task = snapshot.catalogue.tasks.get(name)
    if task is None:
        known = ", ".join(snapshot.catalogue.tasks)
        raise UnknownTask(f"there is no task {name!r}; known tasks: {known}", param="detot.task")
    initial = task.plan(seen)
    free = task.answer.type is AnswerType.FREE
    voted = not free and ask.n == 1 and not ask.forward
    champion, challenger = (None, None) if free else (snapshot.champions.get(name), snapshot.challengers.get(name))
    share = snapshot.heads[name].share if challenger else 0.0
    arm = Arm.CONTROL if ask.plain else ask.arm or assign_arm(name, ask.text, control_share, share)
    if arm is Arm.CHALLENGER and challenger is None:
        arm = Arm.CHAMPION
    served = {Arm.CHAMPION: champion, Arm.CHALLENGER: challenger}.get(arm)
    fixed = Route(
        id=f"chatcmpl-{name}-{uuid.uuid4().hex}",
        task=task,
        probability=found.probability if found else 1.0,
        arm=arm,
        version=0,
        anchor=initial.anchor,
        anchor_text=None if ask.forward else initial.anchor_text or None,
        plan=_plan(initial.sampling, ask, voted),
        voted=voted,
    )
    if served is None:
        return fixed
    return replace(fixed, version=served.version, anchor=str(arm), anchor_text=served.anchor_text, soft=served.soft)


def assign_arm(task: str, text: str, control_share: float, challenger_share: float = 0.0) -> Arm:
    """The arm by a hash of task and text: the same request, the same arm.

    The hash is a number in [0, 1): the lowest `control_share` is control, of the rest the lowest `challenger_share` is
    challenger. So control stays what it was whatever is on trial, and a larger share only moves requests from champion
    to challenger.
    """
    if control_share <= 0 and challenger_share <= 0:
        return Arm.CHAMPION
    digest = hashlib.blake2b(f"{task}\0{text}".encode(errors="surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    if place < control_share:
        return Arm.CONTROL
    return Arm.CHALLENGER if place < control_share + (1 - control_share) * challenger_share else Arm.CHAMPION


def task_of(request_id: str) -> str | None:
    """The task that a request id names (`chatcmpl-<task>-<32 hex digits>`), None if it has another form."""
    head, _, unique = request_id.rpartition("-")
    prefix, _, task = head.partition("-")
    return task if prefix == "chatcmpl" and task and len(unique) == 32 else None


def _plan(initial: Sampling, ask: Ask, voted: bool) -> Sampling:
    """The task's plan with the request's wishes on top."""
    seed = ask.seed if ask.seed is not None else uuid.uuid4().int >> 65
    most = min(initial.max_tokens, ask.max_tokens) if voted and ask.max_tokens else ask.max_tokens
    plan = initial.but(seed=seed, stop=ask.stop, max_tokens=most or initial.max_tokens, extra=ask.extra)
    if not voted:
        return plan.but(
            min_samples=ask.n,
            max_samples=ask.n,
            in_flight=ask.n,
            temperature=plan.temperature if ask.temperature is None else ask.temperature,
            top_p=plan.top_p if ask.top_p is None else ask.top_p,
            stream=ask.stream and ask.n == 1,
        )
    most_samples = max(ask.max_samples or plan.max_samples, ask.min_samples or 1)
    least = min(ask.min_samples or plan.min_samples, most_samples)
    return plan.but(
        min_samples=least,
        max_samples=most_samples,
        in_flight=max(1, min(max(plan.in_flight, least), most_samples)),
        temperature=plan.temperature if ask.vote_temperature is None else ask.vote_temperature,
        top_p=plan.top_p if ask.vote_top_p is None else ask.vote_top_p,
        confidence=plan.confidence if ask.confidence is None else ask.confidence,
    )
