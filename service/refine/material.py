"""From recorded outcomes to a round's material: groups to learn from, and prompts that only the gate may see. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from service.core.prompt import ChatFormat, compose
from service.core.types import DrawnSample, Feedback, Outcome, Sampling
from service.errors import DetotError
from service.refine.base import Group
from service.tasks.catalogue import Task

GATE_SHARE = 0.3  # of the prompts, kept from every refiner
AGREED_SHARE, AGREED_VOTES = 0.75, 4  # the zero offset's votes fix a held-out prompt's answer from here on

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt for the gate, with the answer that the zero offset's votes agree on."""

    messages: Messages
    question: str
    key: str


@dataclass(frozen=True, slots=True)
class Material:
    """What a round works on.

    Attributes:
        train: groups, newest first; none of their prompts is in `held_out`.
        held_out: prompts for the gate.
        outcomes: recorded requests that were looked at.
        unusable: of these, left out: prompt not retained, cut for storage, or no samples.
    """

    train: tuple[Group, ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    outcomes: int = 0
    unusable: int = 0


def question_of(messages: Iterable[dict[str, str]]) -> str:
    """The request's text: what its last user turn says."""
    return next((m["content"] for m in reversed(list(messages)) if m["role"] == "user"), "")


def for_gate(task: str, question: str, share: float = GATE_SHARE) -> bool:
    """Whether a prompt is the gate's: fixed by a hash of task and question, so that no round ever changes sides."""
    digest = hashlib.blake2b(f"gate\0{task}\0{question}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def gather(
    task: Task,
    outcomes: Iterable[Outcome],
    feedback: dict[str, Feedback],
    *,
    chat: ChatFormat,
    anchor: str,
    version: int,
    gold: Callable[[Feedback, Outcome, str], str | None],
    gate_share: float = GATE_SHARE,
) -> Material:
    """Outcomes of one task, newest first, as material for a round that starts from `version` on `anchor`.

    Samples drawn under another version are not learned from; those of the zero offset are kept as frozen votes.

    Args:
        feedback: by request id.
        gold: the key that a feedback makes right, None if it does not say.
    """
    asked: dict[bytes, list[Outcome]] = defaultdict(list)
    frozen: dict[bytes, Counter[str]] = defaultdict(Counter)
    seen = unusable = 0
    for outcome in outcomes:
        seen += 1
        if outcome.messages is None or outcome.truncated or not outcome.drawn:
            unusable += 1
            continue
        conversation = orjson.dumps(outcome.messages)
        asked[conversation].append(outcome)
        if outcome.version == 0:
            frozen[conversation].update(s.key for s in outcome.drawn if s.key is not None)
    groups, held_out = [], []
    for conversation, recorded in asked.items():
        messages = recorded[0].messages or ()
        question = question_of(messages)
        if for_gate(task.id, question, gate_share):
            if (key := _agreed(frozen[conversation])) is not None:
                held_out.append(HeldOut(messages, question, key))
            continue
        group = _group(task, messages, question, recorded, frozen[conversation], feedback, chat, anchor, version, gold)
        if group is None:
            unusable += len(recorded)
        else:
            groups.append(group)
    return Material(tuple(groups), tuple(held_out), seen, unusable)


def _group(
    task: Task,
    messages: Messages,
    question: str,
    recorded: list[Outcome],
    frozen: Counter[str],
    feedback: dict[str, Feedback],
    chat: ChatFormat,
    anchor: str,
    version: int,
    gold: Callable[[Feedback, Outcome, str], str | None],
) -> Group | None:
    """All samples that `version` drew for one prompt, and the newest feedback on it; None if it cannot be composed."""
    try:
        prompt = compose(chat, messages, anchor)
    except DetotError:
        return None
    samples: list[DrawnSample] = [s for o in recorded if _drawn_by(o, version) for s in o.drawn]
    said = next(((feedback[o.id], o) for o in recorded if o.id in feedback), None)
    return Group(
        prompt=prompt,
        question=question,
        version=version,
        samples=tuple(samples),
        plan=_plan(recorded[0].plan, task.sampling),
        frozen=dict(frozen),
        feedback=said[0] if said else None,
        gold=gold(*said, question) if said else None,
    )


def _drawn_by(outcome: Outcome, version: int) -> bool:
    """Whether the samples came from this version on the anchor that a refiner starts from."""
    return outcome.version == version and (version != 0 or outcome.anchor == "default")


def _plan(used: dict[str, Any], base: Sampling) -> Sampling:
    known = {name: used[name] for name in ("temperature", "top_p", "max_tokens") if name in used}
    return base.but(**known)


def _agreed(votes: Counter[str]) -> str | None:
    if sum(votes.values()) < AGREED_VOTES:
        return None
    (key, count), *_ = votes.most_common(1)
    return key if count >= AGREED_SHARE * sum(votes.values()) else None
