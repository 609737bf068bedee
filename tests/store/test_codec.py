from __future__ import annotations

import dataclasses

import orjson
import pytest

from service.core.types import DrawnSample, Feedback
from service.store.codec import decode_feedback, decode_outcome, encode_feedback, encode_outcome
from tests.valkey import make_outcome


def test_round_trip_is_exact() -> None:
    for outcome in (make_outcome(1), make_outcome(2, answer=None, key=None, counts={}, messages=None, drawn=())):
        assert decode_outcome(encode_outcome(outcome)) == outcome


def test_fields_of_a_newer_service_are_ignored() -> None:
    body = orjson.loads(encode_outcome(make_outcome(1))) | {"novelty": [1, 2]}
    body["drawn"][0]["novelty"] = 3
    assert decode_outcome(orjson.dumps(body)) == make_outcome(1, created=body["created"])


def test_long_conversations_are_cut_and_marked() -> None:
    messages = ({"role": "system", "content": "a" * 70}, {"role": "user", "content": "b" * 70})
    kept = decode_outcome(encode_outcome(make_outcome(1, messages=messages), prompt_chars=100))
    assert kept.truncated
    assert kept.messages is not None
    assert [m["content"] for m in kept.messages] == ["a" * 70, "b" * 30]
    assert not decode_outcome(encode_outcome(make_outcome(1, messages=messages), prompt_chars=140)).truncated


def test_no_room_for_prompts_keeps_none() -> None:
    kept = decode_outcome(encode_outcome(make_outcome(1), prompt_chars=0))
    assert kept.messages is None
    assert not kept.truncated


def test_samples_beyond_the_token_cap_lose_their_ids() -> None:
    drawn = tuple(DrawnSample("1", tuple(range(10)), -1.0, "stop") for _ in range(3))
    kept = decode_outcome(encode_outcome(make_outcome(1, drawn=drawn), token_ids=20))
    assert kept.truncated
    assert [len(s.token_ids) for s in kept.drawn] == [10, 10, 0]
    assert [s.key for s in kept.drawn] == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty document"),
        (b"\xff\xfe", "str is not valid UTF-8"),
        (b"[]", "list"),
        (b"{}", "format None"),
        (b'{"v": 2}', "format 2"),
        (b'{"v": 1}', "arm"),
    ],
)
def test_malformed_outcomes_say_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_outcome(data)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(make_outcome(1)) if f.name != "truncated"])
def test_every_missing_field_is_noticed(field: str) -> None:
    body = orjson.loads(encode_outcome(make_outcome(1)))
    del body[field]
    with pytest.raises(ValueError, match=field):
        decode_outcome(orjson.dumps(body))


@pytest.mark.parametrize(("field", "value"), [("latency_s", "fast"), ("arm", "blue"), ("drawn", [1]), ("counts", 7)])
def test_wrong_types_are_noticed(field: str, value: object) -> None:
    body = orjson.loads(encode_outcome(make_outcome(1))) | {field: value}
    with pytest.raises(ValueError, match="outcome"):
        decode_outcome(orjson.dumps(body))


def test_feedback_is_canonical() -> None:
    one = Feedback("r1", "math", correct=True)
    assert encode_feedback(one) == encode_feedback(Feedback("r2", "other", correct=True))
    assert decode_feedback(encode_feedback(one), task="math", request_id="r1") == one
    assert encode_feedback(one) != encode_feedback(Feedback("r1", "math", correct=True, answer="7"))
