"""Chat completions over real HTTP, with the scripted engine and with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest

from tests.live import live_server

QUESTION = "Tom had 30 marbles. He gave 12 to Ann and then found 24 more. How many marbles does he have now?"


def ask(**extra):
    return {"model": "default", "messages": [{"role": "user", "content": QUESTION}], **extra}


@pytest.fixture
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


def test_a_voted_answer_says_how_it_came_about(http):
    body = http.post("/v1/chat/completions", json=ask(seed=7)).json()
    detot = body["detot"]
    assert detot["task"] == "math_word_problem"
    assert detot["answer"] == "42"
    assert detot["votes"] == {"42": detot["samples"]}
    assert detot["confidence"] >= 0.95
    assert detot["stopped"] == "decided"
    assert (detot["version"], detot["unparseable"], detot["tie"]) == (0, 0, False)
    assert detot["plan"]["seed"] == 7
    assert set(detot["timings_ms"]) == {"classify", "compose", "generate", "vote", "record", "total"}
    assert body["choices"][0]["message"]["content"] == "The answer is 42."
    assert body["usage"]["completion_tokens"] > 0
    assert body["id"].startswith("chatcmpl-math_word_problem-")


def test_the_outcome_is_in_redis(http):
    body = http.post("/v1/chat/completions", json=ask()).json()
    found = []
    for _ in range(50):
        rows = http.get("/v1/tasks/math_word_problem/outcomes", params={"limit": 50}).json()["outcomes"]
        if found := [o for o in rows if o["id"] == body["id"]]:
            break
        time.sleep(0.05)
    assert found[0]["counts"] == body["detot"]["votes"]
    assert found[0]["messages"] == [{"role": "user", "content": QUESTION}]
    assert len(found[0]["drawn"]) == body["detot"]["samples"]


def test_record_false_stores_nothing(http):
    body = http.post("/v1/chat/completions", json=ask(detot={"record": False})).json()
    assert body["detot"]["recorded"] is False
    time.sleep(0.3)
    rows = http.get("/v1/tasks/math_word_problem/outcomes", params={"limit": 1000}).json()["outcomes"]
    assert body["id"] not in {o["id"] for o in rows}
    assert http.post("/v1/feedback", json={"request_id": body["id"], "correct": True}).status_code == 404


@pytest.mark.parametrize(("samples", "drawn"), [(1, 1), (3, 3), (9, 9)])
def test_a_fixed_number_of_samples(http, samples, drawn):
    detot = http.post("/v1/chat/completions", json=ask(detot={"samples": samples})).json()["detot"]
    assert detot["samples"] == drawn


def test_sampling_of_the_vote_stands_under_detot_only(http):
    detot = http.post("/v1/chat/completions", json=ask(temperature=0, top_p=0.5)).json()["detot"]
    assert detot["plan"]["temperature"] > 0
    assert detot["plan"]["top_p"] > 0.5
    detot = http.post("/v1/chat/completions", json=ask(detot={"temperature": 1.1, "top_p": 0.8})).json()["detot"]
    assert (detot["plan"]["temperature"], detot["plan"]["top_p"]) == (1.1, 0.8)


def test_n_above_one_gives_raw_samples_without_a_vote(http):
    body = http.post("/v1/chat/completions", json=ask(n=3, temperature=0.4)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["detot"]["votes"] == {}
    assert body["detot"]["answer"] is None
    assert body["detot"]["plan"]["temperature"] == 0.4


def test_content_can_be_the_answer_alone(http):
    body = http.post("/v1/chat/completions", json=ask(detot={"content": "answer"})).json()
    assert body["choices"][0]["message"]["content"] == "42"


def test_a_named_task_is_not_classified(http):
    body = http.post("/v1/chat/completions", json=ask(detot={"task": "sentiment"})).json()
    assert body["detot"]["task"] == "sentiment"
    assert body["detot"]["unparseable"] == body["detot"]["samples"]
    assert body["detot"]["answer"] is None
    assert body["choices"][0]["message"]["content"] == "The answer is 42."


def test_the_same_seed_gives_the_same_body(http):
    def stable(body):
        return body["choices"], body["usage"], {k: v for k, v in body["detot"].items() if k != "timings_ms"}

    first, second = (http.post("/v1/chat/completions", json=ask(seed=-5)).json() for _ in range(2))
    assert stable(first) == stable(second)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"n": "3"}, 400, "n"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"top_k": 5}, 400, "top_k"),
        ({"guided_json": {}}, 400, "guided_json"),
        ({"detot": {"samples": 0}}, 400, "detot.samples"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "prompt_embeds"}]}]}, 400, "messages.0.content.0.type"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 999_999}, 400, "max_tokens"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"detot": {"task": "nonsense"}}, 404, "detot.task"),
        ({"detot": {"samples": 1000}}, 400, "detot.samples"),
        ({"detot": {"samples": {"min": 5, "max": 2}}}, 400, None),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ],
)
def test_mistakes_get_a_clear_error_in_openai_shape(http, change, status, param):
    response = http.post("/v1/chat/completions", json=ask(**change))
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param:
        assert error["param"] == param
    assert error["message"]


def test_an_error_names_value_and_bound(http):
    message = http.post("/v1/chat/completions", json=ask(temperature=3)).json()["error"]["message"]
    assert message == "temperature: Input should be less than or equal to 2, got 3"


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []},
        {"tools": None},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"frequency_penalty": 0},
        {"user": "u", "unknown": {"x": 1}},
        {"detot": {"unknown": 1}},
    ],
)
def test_neutral_values_and_unknown_fields_pass(http, neutral):
    assert http.post("/v1/chat/completions", json=ask(**neutral)).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=["empty", "cut", "list", "string", "null", "bom", "not-utf8", "deep-list", "deep-object"],
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/feedback", "/v1/classify", "/v1/tasks", "/v1/tasks/yes_no/offsets"]
)
def test_broken_bodies_are_4xx(http, path, content):
    response = http.post(path, content=content)
    assert 400 <= response.status_code < 500
    body = response.json()
    assert ("error" in body) if path == "/v1/chat/completions" else ("detail" in body)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_413(http, chunked):
    data = b'{"model": "default", "messages": "' + b"x" * 2_000_000 + b'"}'
    response = http.post("/v1/chat/completions", content=iter([data]) if chunked else data)
    assert response.status_code == 413
    assert "1000000" in response.json()["error"]["message"]


def test_an_over_long_prompt_names_the_context(http):
    messages = [{"role": "user", "content": "How many? " * 50_000}]
    response = http.post("/v1/chat/completions", json={"model": "default", "messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_content_may_come_in_parts(http):
    parts = [{"type": "text", "text": QUESTION[:40]}, {"type": "text", "text": QUESTION[40:]}]
    body = http.post("/v1/chat/completions", json=ask(messages=[{"role": "user", "content": parts}])).json()
    assert body["detot"]["task"] == "math_word_problem"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert http.post("/v1/chat/completions", json=ask(messages=[{"role": "user", "content": image}])).status_code == 400


# --- OpenAI's client ------------------------------------------------------------------------------------------------


def test_openai_client_chat_and_models(client):
    reply = client.chat.completions.create(model="default", messages=[{"role": "user", "content": QUESTION}])
    assert reply.choices[0].message.content == "The answer is 42."
    assert reply.model_extra["detot"]["answer"] == "42"
    assert [m.id for m in client.models.list()] == [reply.model]
    assert client.models.retrieve(reply.model).id == reply.model


def test_openai_client_streams_progress_and_then_the_answer(client):
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    events, text, usage, finish = [], "", None, None
    for chunk in stream:
        if detot := (chunk.model_extra or {}).get("detot"):
            events.append(detot)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert [e["event"] for e in events] == ["route", *["sample"] * (len(events) - 2), "answer"]
    assert [e["samples"] for e in events[1:-1]] == list(range(1, len(events) - 1))
    assert (text, events[-1]["answer"], finish) == ("The answer is 42.", "42", "stop")
    assert usage is not None and usage.completion_tokens > 0


def test_openai_client_streams_free_text_as_it_comes(client):
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Write a short poem about the sea."}],
        stream=True,
        extra_body={"detot": {"task": "general"}},
    )
    pieces = [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == "The answer is 42."


def test_openai_client_streams_raw_samples(client):
    stream = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": QUESTION}], stream=True, n=2
    )
    texts: dict[int, str] = {}
    finished: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
    assert texts == {0: "The answer is 42.", 1: "The answer is 42."}
    assert finished == {0: "stop", 1: "stop"}


def test_openai_client_maps_errors(client):
    messages = [{"role": "user", "content": QUESTION}]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="default", messages=messages, temperature=5)


def test_stream_lines_end_in_lf_and_errors_before_the_stream_have_their_status(http):
    response = http.post("/v1/chat/completions", json=ask(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    assert response.content.endswith(b"data: [DONE]\n\n")
    assert http.post("/v1/chat/completions", json=ask(stream=True, detot={"task": "nonsense"})).status_code == 404


# --- limits, slow engines, leaving clients --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(redis_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    with live_server(redis_url, folder, SCRIPTED__LATENCY="0.5", LIMITS__CONCURRENCY="2") as server:
        yield server


async def test_too_many_at_once_get_429_and_the_openai_client_retries(slow):
    async with httpx.AsyncClient(base_url=slow.url, timeout=30) as http:
        replies = await asyncio.gather(*(http.post("/v1/chat/completions", json=ask()) for _ in range(6)))
    statuses = sorted(r.status_code for r in replies)
    assert statuses == [200, 200, 429, 429, 429, 429]
    refused = next(r for r in replies if r.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    async with openai.AsyncOpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=8) as client:
        messages = [{"role": "user", "content": QUESTION}]
        both = await asyncio.gather(
            *(client.chat.completions.create(model="default", messages=messages) for _ in range(4))  # type: ignore[arg-type]
        )
    assert {r.model_extra["detot"]["answer"] for r in both if r.model_extra} == {"42"}


async def test_a_deadline_returns_the_vote_as_it_stands_or_504(slow):
    async with httpx.AsyncClient(base_url=slow.url, timeout=30) as http:
        reply = await http.post("/v1/chat/completions", json=ask(detot={"deadline": 0.1}))
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "deadline_exceeded"
        reply = await http.post(
            "/v1/chat/completions", json=ask(detot={"deadline": 0.8, "samples": {"max": 40}, "confidence": 0.999999})
        )
        assert reply.status_code == 200
        assert reply.json()["detot"]["stopped"] == "deadline"
        assert 1 <= reply.json()["detot"]["samples"] < 40


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_permit(slow, stream):
    async with httpx.AsyncClient(base_url=slow.url) as http:
        body = ask(stream=stream, detot={"samples": {"max": 64}, "confidence": 0.9999999})  # several seconds of work
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                if stream:
                    async with http.stream("POST", "/v1/chat/completions", json=body, timeout=0.4) as reply:
                        await reply.aread()
                else:
                    await http.post("/v1/chat/completions", json=body, timeout=0.4)
        for _ in range(40):
            if slow.metric("detot_requests_in_flight") == 0:
                break
            await asyncio.sleep(0.05)
        assert slow.metric("detot_requests_in_flight") == 0


async def test_sigterm_lets_running_requests_finish(redis_url, tmp_path):
    with live_server(redis_url, tmp_path, SCRIPTED__LATENCY="0.5") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            running = asyncio.create_task(http.post("/v1/chat/completions", json=ask()))
            await asyncio.sleep(0.2)
            server.process.terminate()
            reply = await running
        assert reply.status_code == 200
        assert await asyncio.to_thread(server.process.wait, 20) in (0, -15)


def test_keys_scopes_and_rate_limits_over_http(redis_url, tmp_path):
    from service.api.auth import Scope, add_key

    path = tmp_path / "keys.json"
    caller = add_key(path, "caller", [Scope.CALL], "3/minute")
    with live_server(redis_url, tmp_path, KEYS_FILE=str(path)) as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/v1/chat/completions", json=ask()).status_code == 401
        assert http.get("/health/ready").status_code == 200
        headers = {"Authorization": f"Bearer {caller}"}
        assert http.post("/v1/chat/completions", json=ask(), headers=headers).status_code == 200
        refused = http.post("/v1/tasks/yes_no/offsets/rollback", json={}, headers=headers)
        assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
        statuses = [http.get("/v1/models", headers=headers).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


def test_progress_reaches_the_client_while_samples_are_drawn(slow):
    body = ask(stream=True, detot={"samples": 9})
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=body, timeout=30) as reply:
        seen = [
            (time.monotonic(), json.loads(line[6:]).get("detot", {}).get("event"))
            for line in reply.iter_lines()
            if line.startswith("data: {")
        ]
    assert [event for _, event in seen[:2]] == ["route", "sample"]
    assert seen[0][0] < seen[1][0] - 0.2  # the route came while the first samples were still being drawn
