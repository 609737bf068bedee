"""The service's own routes over real HTTP."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from redis import Redis

from service.core.artifact import decode, encode
from service.store import keys
from tests.live import live_server

TASK = "yes_no"
QUESTION = {"model": "default", "messages": [{"role": "user", "content": "Is the sky blue?"}]}
BINARY = {"Content-Type": "application/octet-stream"}


def asked(http, **detot):
    body = {**QUESTION, "detot": {"task": TASK, "arm": "champion", **detot}}
    return http.post("/v1/chat/completions", json=body).json()["detot"]


def zero(http, task=TASK):
    return decode(http.get(f"/v1/tasks/{task}/offsets/0").content)


def noisy(http, scale=0.02):
    artifact = zero(http)
    offset = np.random.default_rng(0).normal(0, scale, artifact.offset.shape).astype(np.float32)
    return replace(artifact, offset=offset)


def put(http, blob):
    return http.post(f"/v1/tasks/{TASK}/offsets", content=blob, headers=BINARY)


def test_an_offset_put_by_hand_is_served_within_a_second_and_rollback_undoes_it(http):
    before = http.get(f"/v1/tasks/{TASK}/offsets").json()["version"]
    published = put(http, encode(noisy(http))).json()
    assert published["version"] > before
    assert asked(http)["version"] == published["version"]
    assert asked(http, arm="control")["version"] == 0
    rolled = http.post(f"/v1/tasks/{TASK}/offsets/rollback", json={}).json()
    assert rolled["version"] == before
    assert asked(http)["version"] == before
    actions = [d["action"] for d in http.get(f"/v1/tasks/{TASK}/offsets").json()["history"]]
    assert actions[:2] == ["rollback", "publish"]


def test_another_replica_serves_it_too(http, live, redis_url, tmp_path):
    with live_server(redis_url, tmp_path) as second, httpx.Client(base_url=second.url, timeout=30) as other:
        version = put(http, encode(noisy(http))).json()["version"]
        deadline = time.monotonic() + 5
        while asked(other)["version"] != version and time.monotonic() < deadline:
            time.sleep(0.02)
        assert asked(other)["version"] == version
        http.post(f"/v1/tasks/{TASK}/offsets/rollback", json={})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_id": "another"}, "another"),
        ({"model_revision": "deadbeef"}, "deadbeef"),
        ({"tokenizer_hash": "0" * 64}, "tokenizer"),
    ],
)
def test_an_artifact_for_another_model_is_refused(http, change, reason):
    response = put(http, encode(replace(noisy(http), **change)))
    assert response.status_code == 422
    assert reason in response.json()["detail"]
    assert asked(http)["version"] == http.get(f"/v1/tasks/{TASK}/offsets").json()["version"]


def test_broken_artifacts_are_refused_with_the_reason(http):
    good = encode(noisy(http))
    broken = bytearray(good)
    broken[-1] ^= 1
    for blob, reason in ((b"", ""), (good[:100], ""), (bytes(broken), "checksum")):
        response = put(http, blob)
        assert response.status_code == 422
        assert reason in response.json()["detail"]


def test_an_artifact_for_another_task_is_refused(http):
    response = put(http, encode(replace(noisy(http), task="sentiment")))
    assert (response.status_code, "sentiment" in response.json()["detail"]) == (422, True)


def test_download_gives_back_what_was_published(http):
    published = put(http, encode(noisy(http, 0.03))).json()
    artifact = decode(http.get(f"/v1/tasks/{TASK}/offsets/{published['version']}").content)
    assert np.array_equal(artifact.offset, noisy(http, 0.03).offset)
    assert artifact.parent == published["parent"]
    http.post(f"/v1/tasks/{TASK}/offsets/rollback", json={})
    assert http.get(f"/v1/tasks/{TASK}/offsets/999999").status_code == 404
    assert http.get(f"/v1/tasks/{TASK}/offsets/x").status_code == 400


def test_a_rollback_to_a_version_that_would_be_refused_changes_nothing(http, redis_url):
    first, second = (put(http, encode(noisy(http, scale))).json()["version"] for scale in (0.01, 0.02))
    with Redis.from_url(redis_url) as redis:
        blob = bytearray(redis.hget(keys.offsets(TASK), str(first)))  # type: ignore[arg-type]
        blob[-1] ^= 1
        redis.hset(keys.offsets(TASK), str(first), bytes(blob))
    for body in ({"to": first}, {}):
        response = http.post(f"/v1/tasks/{TASK}/offsets/rollback", json=body)
        assert response.status_code == 422
        assert "checksum" in response.json()["detail"]
    assert asked(http)["version"] == second
    assert http.post(f"/v1/tasks/{TASK}/offsets/rollback", json={"to": 0}).json()["version"] == 0


def test_freeze_and_unfreeze(http):
    assert http.post("/v1/tasks/choice/offsets/freeze", json={"reason": "holiday"}).json()["frozen"] is True
    assert next(t for t in http.get("/v1/tasks").json()["tasks"] if t["id"] == "choice")["frozen"] is True
    assert http.post("/v1/tasks/choice/offsets/freeze", json={"frozen": False}).json()["frozen"] is False


def test_feedback_is_idempotent_and_the_last_word_wins(http):
    answer = http.post("/v1/chat/completions", json=QUESTION).json()
    said = {"request_id": answer["id"], "correct": True}
    assert http.post("/v1/feedback", json=said).json() == {
        "request_id": answer["id"],
        "task": answer["detot"]["task"],
        "duplicate": False,
    }
    assert http.post("/v1/feedback", json=said).json()["duplicate"] is True
    assert http.post("/v1/feedback", json={**said, "correct": False}).json()["duplicate"] is False


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"request_id": "chatcmpl-nothing"}, 400),
        ({"request_id": "chatcmpl-nothing", "correct": True}, 404),
        ({"request_id": f"chatcmpl-yes_no-{'0' * 32}", "correct": True}, 404),
        ({"request_id": "x", "score": 1.5}, 400),
        ({"request_id": "x", "correct": "maybe"}, 400),
        ({"correct": True}, 400),
    ],
)
def test_feedback_mistakes(http, body, status):
    response = http.post("/v1/feedback", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]


def test_classify(http):
    text = "Ann has 3 boxes with 12 pencils each and gives away 7 pencils. How many pencils are left?"
    body = http.post("/v1/classify", json={"text": text}).json()
    assert body["task"] == "math_word_problem"
    assert body["signals"]["numbers"] == 3
    assert body["plan"]["max_samples"] >= body["plan"]["min_samples"]


def test_a_task_registered_at_run_time_is_classified_served_and_removed(http):
    task = {
        "id": "priority",
        "description": "How urgent a support ticket is",
        "answer": {"type": "label", "labels": ["urgent", "normal"]},
        "anchors": {"default": "Decide how urgent this support ticket is. End with: The answer is urgent or normal."},
        "examples": [
            "Ticket: the production database is down and nobody can log in. How urgent is this ticket?",
            "Ticket: please change the logo colour on the intranet page. How urgent is this ticket?",
            "Ticket: the checkout fails for all customers since midnight. How urgent is this ticket?",
            "Ticket: could you send me the holiday calendar. How urgent is this ticket?",
            "Ticket: the mail server loses messages. How urgent is this ticket?",
        ],
    }
    response = http.post("/v1/tasks", json=task)
    assert response.status_code == 201, response.text
    found = http.post("/v1/classify", json={"text": "Ticket: the printer is on fire. How urgent is this ticket?"})
    assert found.json()["task"] == "priority"
    named = http.post("/v1/chat/completions", json={**QUESTION, "detot": {"task": "priority"}}).json()
    assert named["detot"]["task"] == "priority"
    assert http.delete("/v1/tasks/priority").status_code == 204
    assert http.get("/v1/tasks/priority").status_code == 404


def test_a_mistaken_task_names_task_and_field(http):
    response = http.post(
        "/v1/tasks",
        json={
            "id": "x",
            "description": "d",
            "answer": {"type": "guess"},
            "anchors": {"default": "a"},
            "examples": ["e"],
        },
    )
    assert response.status_code == 422
    assert "answer" in response.json()["detail"]


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_tasks_from_the_file_cannot_be_changed_over_http(http, method):
    if method == "DELETE":
        assert http.delete(f"/v1/tasks/{TASK}").status_code == 409
        return
    definition = {k: v for k, v in http.get("/v1/tasks/yes_no").json().items() if k not in ("offset", "monitor")}
    assert http.post("/v1/tasks", json=definition).status_code == 409


def test_metrics_are_prometheus_text(http):
    asked(http)
    text = http.get("/metrics").text
    assert 'detot_requests_total{arm="champion",status="200",task="yes_no"}' in text
    assert "detot_outcomes_written_total" in text


def test_the_openapi_description_is_served_and_complete(http):
    document = http.get("/openapi.json").json()
    assert "ChatRequest" in document["components"]["schemas"]
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/feedback", "/v1/tasks/{task}/offsets", "/metrics"}


def test_unknown_paths_and_methods(http):
    assert http.get("/nowhere").status_code == 404
    response = http.put("/v1/feedback", json={})
    assert response.status_code == 405
    assert "POST" in response.headers["allow"]
