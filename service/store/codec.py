"""Outcomes and feedback as bytes. Pure, versioned; fields a newer service added are ignored by an older one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import orjson

from service.core.types import Arm, DrawnSample, Feedback, Outcome

FORMAT = 1
_OUTCOME = frozenset(f.name for f in fields(Outcome))
_DRAWN = frozenset(f.name for f in fields(DrawnSample))
_FEEDBACK = ("correct", "answer", "score")


def encode_outcome(outcome: Outcome, *, prompt_chars: int = 16_384, token_ids: int = 32_768) -> bytes:
    """JSON of an outcome, cut to size.

    Args:
        prompt_chars: characters of conversation kept over all messages; 0 keeps no messages at all.
        token_ids: generated ids kept over all samples; a sample that no longer fits loses all of its ids.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    messages, cut = _cut_messages(outcome.messages, prompt_chars)
    drawn, dropped = _cut_drawn(outcome.drawn, token_ids)
    body = {name: getattr(outcome, name) for name in _OUTCOME}
    body |= {"v": FORMAT, "messages": messages, "drawn": drawn, "truncated": outcome.truncated or cut or dropped}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_outcome(data: bytes) -> Outcome:
    """The outcome of `encode_outcome`. Raises ValueError with what is wrong."""
    body = _object(data, "outcome")
    if body.get("v") != FORMAT:
        raise ValueError(f"outcome of format {body.get('v')!r}; this service reads format {FORMAT}")
    try:
        body["arm"] = Arm(body["arm"])
        body["counts"] = dict(body["counts"])
        body["drawn"] = tuple(_drawn(sample) for sample in body["drawn"])
        body["messages"] = None if body["messages"] is None else tuple(body["messages"])
        outcome = Outcome(**{name: value for name, value in body.items() if name in _OUTCOME})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"outcome: {type(e).__name__}: {e}") from None
    _check_numbers(outcome)
    return outcome


def encode_feedback(feedback: Feedback) -> bytes:
    """Canonical JSON of what was said, without the ids: equal feedback gives equal bytes."""
    said = {name: getattr(feedback, name) for name in _FEEDBACK}
    return orjson.dumps({name: value for name, value in said.items() if value is not None})


def decode_feedback(data: bytes, *, task: str, request_id: str) -> Feedback:
    """The feedback of `encode_feedback`. Raises ValueError with what is wrong."""
    body = _object(data, "feedback")
    return Feedback(request_id=request_id, task=task, **{name: body.get(name) for name in _FEEDBACK})


def _object(data: bytes, what: str) -> dict[str, Any]:
    body = orjson.loads(data)  # its JSONDecodeError is a ValueError
    if not isinstance(body, dict):
        raise ValueError(f"{what}: a JSON object was expected, not {type(body).__name__}")
    return body


def _drawn(sample: dict[str, Any]) -> DrawnSample:
    known = {name: value for name, value in sample.items() if name in _DRAWN}
    known["token_ids"] = tuple(sample["token_ids"])
    return DrawnSample(**known)


def _check_numbers(outcome: Outcome) -> None:
    for name in ("created", "share", "confidence", "unparseable", "completion_tokens", "latency_s", "version"):
        value = getattr(outcome, name)
        if not isinstance(value, (int, float)):
            raise ValueError(f"outcome: {name} is {value!r}, not a number")


def _cut_messages(messages: Sequence[dict[str, str]] | None, room: int) -> tuple[Sequence[dict[str, str]] | None, bool]:
    if messages is None or room == 0:
        return None, False
    if sum(len(m["content"]) for m in messages) <= room:
        return messages, False
    kept = []
    for message in messages:
        kept.append(message | {"content": message["content"][:room]})
        room -= len(kept[-1]["content"])
    return kept, True


def _cut_drawn(drawn: Sequence[DrawnSample], room: int) -> tuple[Sequence[Any], bool]:
    if sum(len(s.token_ids) for s in drawn) <= room:
        return drawn, False
    kept: list[Any] = []
    for sample in drawn:
        room -= len(sample.token_ids)
        ids = sample.token_ids if room >= 0 else ()
        kept.append({name: getattr(sample, name) for name in _DRAWN} | {"token_ids": ids})
    return kept, True
