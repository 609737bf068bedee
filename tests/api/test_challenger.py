"""Challengers, pins, explanations and canaries over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest

from service.core.artifact import decode, encode

TASK = "sentiment"
BINARY = {"Content-Type": "application/octet-stream"}
PROBLEM = "application/problem+json"


@pytest.fixture(autouse=True)
def _as_it_was(http: httpx.Client) -> Iterator[None]:
    yield
    post(http, "unpin")
    http.post(f"/v1/tasks/{TASK}/offsets/freeze", json={"frozen": False})
    post(http, "rollback", to=0)
    post(http, "withdraw")


def artifact(http, scale=0.02):
    zero = decode(http.get(f"/v1/tasks/{TASK}/offsets/0").content)
    offset = np.random.default_rng(1).normal(0, scale, zero.offset.shape).astype(np.float32)
    return replace(zero, offset=offset, evidence={"cost": {"samples": 96, "seconds": 1.5}})


def put(http, made=None, **params):
    blob = encode(made or artifact(http))
    return http.post(f"/v1/tasks/{TASK}/offsets", content=blob, headers=BINARY, params=params)


def post(http, step, **body):
    return http.post(f"/v1/tasks/{TASK}/offsets/{step}", json=body)


def state(http):
    return http.get(f"/v1/tasks/{TASK}/offsets").json()


def asked(http, text="Fine film.", **detot):
    body = {"model": "default", "messages": [{"role": "user", "content": text}], "detot": {"task": TASK, **detot}}
    return http.post("/v1/chat/completions", json=body).json()["detot"]


def test_a_challenger_is_put_served_promoted_and_undone(http):
    champion = put(http).json()["version"]
    response = put(http, **{"as": "challenger", "share": 0.25})
    assert response.status_code == 201
    proposed = response.json()
    assert (proposed["version"], proposed["share"], proposed["parent"]) == (champion, 0.25, champion)
    challenger = proposed["challenger"]
    assert challenger == champion + 1
    assert (asked(http, arm="challenger")["version"], asked(http, arm="challenger")["arm"]) == (
        challenger,
        "challenger",
    )
    assert asked(http, arm="champion")["version"] == champion
    seen = {(d["arm"], d["version"]) for d in (asked(http, f"Film number {i}.") for i in range(60))}
    assert {("champion", champion), ("challenger", challenger)} <= seen
    assert seen <= {("champion", champion), ("challenger", challenger), ("control", 0)}
    promoted = post(http, "promote", reason="looks good").json()
    assert (promoted["version"], promoted["challenger"], promoted["share"]) == (challenger, None, 0)
    assert (asked(http, arm="challenger")["version"], asked(http, arm="challenger")["arm"]) == (challenger, "champion")
    last = state(http)["history"][0]
    assert (last["action"], last["reason"], last["challenger"]) == ("promote", "looks good", challenger)
    assert post(http, "rollback").json()["version"] == champion


def test_withdraw_and_what_needs_a_challenger(http):
    for step in ("promote", "withdraw"):
        response = post(http, step)
        assert (response.status_code, response.headers["content-type"]) == (409, PROBLEM)
    put(http, **{"as": "challenger"})
    assert state(http)["share"] == 0.05
    assert put(http, **{"as": "challenger"}).status_code == 409
    assert post(http, "withdraw", reason="no").json()["challenger"] is None


@pytest.mark.parametrize(
    "params", [{"as": "challenger", "share": 1}, {"as": "challenger", "share": 0}, {"as": "king"}, {"share": 0.5}]
)
def test_a_wrong_role_or_share_names_value_and_bound(http, params):
    response = put(http, **params)
    assert (response.status_code, response.headers["content-type"]) == (400, PROBLEM)
    assert str(params.get("share", params.get("as"))) in response.json()["detail"]


def test_a_pin_holds_and_shows(http):
    version = put(http).json()["version"]
    put(http, **{"as": "challenger"})
    pinned = post(http, "pin", reason="release week").json()
    assert (pinned["version"], pinned["pinned"], pinned["challenger"]) == (version, True, None)
    assert post(http, "pin", version=0).json()["version"] == 0
    assert post(http, "pin", version=999999).status_code == 404
    assert post(http, "pin", version="x").status_code == 400
    assert post(http, "unpin").json()["pinned"] is False
    assert [d["action"] for d in state(http)["history"][:3]] == ["unpin", "pin", "pin"]


def test_explain_says_rows_change_evidence_and_cost(http):
    version = put(http).json()["version"]
    found = http.get(f"/v1/tasks/{TASK}/offsets/{version}/explain").json()
    made = artifact(http)
    assert [row["norm"] for row in found["rows"]] == pytest.approx(
        np.linalg.norm(made.offset, axis=1).tolist(), rel=1e-5
    )
    assert "".join(row["token"] for row in found["rows"]) == made.anchor_text
    assert all(len(row["soft"]) == len(row["offset"]) == 5 for row in found["rows"])
    assert found["cost"] == {"samples": 96, "seconds": 1.5}
    assert found["change"]["comparable"]
    again = put(http, artifact(http, 0.03)).json()["version"]
    assert http.get(f"/v1/tasks/{TASK}/offsets/{again}/explain").json()["parent"] == version
    zero = http.get(f"/v1/tasks/{TASK}/offsets/0/explain").json()
    assert {row["norm"] for row in zero["rows"]} == {0}
    assert http.get(f"/v1/tasks/{TASK}/offsets/999999/explain").status_code == 404
    assert http.get(f"/v1/tasks/{TASK}/offsets/x/explain").status_code == 400


CANARIES = (
    '{"question": "A wonderful film.", "answer": "positive"}\n\n'
    '{"id": "mine", "question": "A dreadful film.", "answer": "negative"}\n'
)


def test_labelled_canaries_are_kept_shown_and_removed(http):
    put_ = http.put(f"/v1/tasks/{TASK}/canaries", content=CANARIES)
    assert put_.json() == {"task": TASK, "count": 2}
    found = http.get(f"/v1/tasks/{TASK}/canaries").json()
    assert [(c["question"], c["answer"]) for c in found["canaries"]] == [
        ("A wonderful film.", "positive"),
        ("A dreadful film.", "negative"),
    ]
    assert len({c["id"] for c in found["canaries"]}) == 2
    assert http.put(f"/v1/tasks/{TASK}/canaries", content=CANARIES.splitlines()[0]).json()["count"] == 1
    assert http.delete(f"/v1/tasks/{TASK}/canaries").status_code == 204
    assert http.delete(f"/v1/tasks/{TASK}/canaries").status_code == 404
    assert http.get(f"/v1/tasks/{TASK}/canaries").json()["count"] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "x", "answer": "purple"}', ("line 2", "answer", "purple")),
        ('{"question": "", "answer": "positive"}', ("line 2", "question")),
        ('{"answer": "positive"}', ("line 2", "question")),
        ('{"question": 5, "answer": "positive"}', ("line 2", "question", "5")),
        ('{"question": "\\ud800", "answer": "positive"}', ("line 2", "question")),
        (json.dumps({"question": "x" * 20_001, "answer": "positive"}), ("line 2", "question", "20000")),
        ("[1]", ("line 2",)),
        ("{", ("line 2",)),
        ('{"question": "Good.", "answer": "positive"}', ("line 2", "Good.")),
        (b"\xff\xfe", ("line 2", "UTF-8")),
    ],
)
def test_a_mistake_in_a_canary_names_line_field_and_value(http, line, said):
    body = b'{"question": "Good.", "answer": "positive"}\n' + (line if isinstance(line, bytes) else line.encode())
    response = http.put(f"/v1/tasks/{TASK}/canaries", content=body)
    assert (response.status_code, response.headers["content-type"]) == (400, PROBLEM)
    assert all(part in response.json()["detail"] for part in said), response.json()


def test_canaries_need_answers_that_can_be_checked(http):
    assert http.put("/v1/tasks/general/canaries", content=CANARIES).status_code == 400
    assert http.put(f"/v1/tasks/{TASK}/canaries", content="\n").status_code == 400
    assert http.put("/v1/tasks/nowhere/canaries", content=CANARIES).status_code == 404
