"""The OpenAI-compatible routes: chat completions, streamed and not, and models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from starlette.types import Receive, Scope, Send

from service.api.auth import Require
from service.api.auth import Scope as KeyScope
from service.api.http import body_of, error_payload, json_response, openai_errors, until_disconnect
from service.api.schemas import NEUTRAL, ChatRequest, DetotOptions, SampleBounds
from service.core.types import Arm, Delta, Sample, Vote
from service.errors import DetotError, InvalidRequest, UnknownModel, UnsupportedField
from service.metrics import REQUESTS, of
from service.serve.pipeline import Answer, Event, Progress, answer
from service.serve.routing import Ask, Route
from service.wiring import Runtime

log = logging.getLogger(__name__)

router = APIRouter(dependencies=[Depends(Require(KeyScope.CALL))])

PING = 5.0  # seconds between comments on a silent stream, so that nothing between here and the client gives up

_CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A chat completion, or its chunks",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **openai_errors(400, 401, 403, 404, 413, 429, 500, 503, 504),
}


@router.get("/v1/models", responses=openai_errors(401, 403, 429))
async def models(request: Request) -> dict[str, Any]:
    """The served model."""
    return {"object": "list", "data": [_model(request.app.state.runtime)]}


@router.get("/v1/models/{model:path}", responses=openai_errors(400, 401, 403, 404, 429))
async def model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    _check_model(model, request.app.state.runtime)
    return _model(request.app.state.runtime)


@router.post("/v1/chat/completions", responses=_RESPONSES, openapi_extra=_CHAT_BODY)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation: classified, sampled, voted on."""
    runtime: Runtime = request.app.state.runtime
    task, arm, status = "unknown", "none", 500
    try:
        body = await body_of(request, ChatRequest)
        ask = to_ask(body, runtime)
        events = answer(runtime.server, ask)
        options = body.detot or DetotOptions()  # type: ignore[call-arg]
        if ask.stream:
            first = await anext(events)  # errors before any work get their own status
            assert isinstance(first, Route)
            task, arm, status = first.task.id, first.arm, 200
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(chunks(first, events, ask, options, runtime, usage=usage))
        result = await until_disconnect(request, _last(events))
        task, arm, status = result.route.task.id, result.route.arm, 200
        return json_response(completion(result, options, runtime))
    except DetotError as e:
        status = e.status
        raise
    finally:
        of(REQUESTS, task, arm, str(status)).inc()


def to_ask(body: ChatRequest, runtime: Runtime) -> Ask:
    """The request in the pipeline's terms.

    Raises:
        UnknownModel, UnsupportedField, InvalidRequest.
    """
    _check_model(body.model, runtime)
    for field, neutral in NEUTRAL.items():
        value = getattr(body, field)
        if value is not None and field not in runtime.engine.honours and value not in neutral:
            raise UnsupportedField(f"{field} is not supported by the {runtime.settings.engine} engine", param=field)
    extra = _extra(body, runtime.engine.honours)
    forward = bool(extra.get("tools")) or any(m.of_tools for m in body.messages)
    if forward and "tools" not in runtime.engine.honours:
        raise UnsupportedField(f"tools are not supported by the {runtime.settings.engine} engine", param="messages")
    options = body.detot or DetotOptions()  # type: ignore[call-arg]
    most = runtime.settings.limits.max_samples
    low, high = _bounds(options.samples)
    for name, value in (("n", body.n), ("detot.samples", low), ("detot.samples", high)):
        if value is not None and value > most:
            raise InvalidRequest(f"{name} is {value}; this service draws at most {most} samples", param=name)
    max_tokens = body.max_completion_tokens or body.max_tokens
    context = runtime.engine.model.context
    if max_tokens is not None and max_tokens > context:
        raise InvalidRequest(f"max_tokens is {max_tokens}; the model's context is {context}", param="max_tokens")
    asked = [m.text for m in body.messages if m.role == "user"]
    if not asked or not any(text.strip() for text in asked):
        raise InvalidRequest("messages: there is no user message with text", param="messages")
    return Ask(
        messages=tuple(m.turn() if forward else {"role": m.role, "content": m.text} for m in body.messages),
        text=asked[-1],
        n=body.n or 1,
        task=options.task,
        arm=Arm(options.arm) if options.arm else None,
        min_samples=low,
        max_samples=high,
        confidence=options.confidence,
        vote_temperature=options.temperature,
        vote_top_p=options.top_p,
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=max_tokens,
        stop=tuple(s for s in ([body.stop] if isinstance(body.stop, str) else body.stop or ()) if s),
        seed=body.seed,
        stream=bool(body.stream),
        record=options.record,
        deadline=options.deadline,
        extra=extra,
        forward=forward,
    )


def _extra(body: ChatRequest, honours: frozenset[str]) -> dict[str, Any]:
    """The fields that go to the engine as they are. What would change nothing stays behind, except beside tools."""
    given = {name: value for name in NEUTRAL if name in honours and (value := getattr(body, name)) is not None}
    tools = ("tool_choice", "parallel_tool_calls") if given.get("tools") else ()
    return {name: value for name, value in given.items() if name in tools or value not in NEUTRAL[name]}


def completion(result: Answer, options: DetotOptions, runtime: Runtime) -> dict[str, Any]:
    """The response body: one choice for an answer, `n` for raw samples."""
    shown = result.samples if result.vote is None else (result.best,)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", **_said(result, sample, options), "refusal": None},
            "logprobs": (sample.raw or {}).get("logprobs"),
            "finish_reason": sample.finish_reason,
        }
        for i, sample in enumerate(sorted(shown, key=lambda s: s.index))
    ]
    return {
        "id": result.route.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": runtime.engine.model.id,
        "choices": choices,
        "usage": _usage(result),
        "system_fingerprint": runtime.fingerprint,
        "detot": report(result),
    }


def report(result: Answer) -> dict[str, Any]:
    """The `detot` field of a response."""
    chosen, plan = result.route, result.route.plan
    return {
        **_routing(chosen),
        **_votes(result.vote),
        "samples": len(result.samples),
        "stopped": result.stopped,
        "plan": {
            "anchor": chosen.anchor,
            "min_samples": plan.min_samples,
            "max_samples": plan.max_samples,
            "in_flight": plan.in_flight,
            "temperature": plan.temperature,
            "top_p": plan.top_p,
            "max_tokens": plan.max_tokens,
            "confidence": plan.confidence,
            "seed": plan.seed,
        },
        "timings_ms": {stage: round(seconds * 1e3, 3) for stage, seconds in result.timings.items()},
        "recorded": result.recorded,
    }


async def chunks(
    first: Route,
    events: AsyncGenerator[Event, None],
    ask: Ask,
    options: DetotOptions,
    runtime: Runtime,
    *,
    usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's chunks: the route, progress or text, then the answer and how it came about."""

    def chunk(
        delta: dict[str, Any], index: int = 0, finish: str | None = None, detot: Any = None, of: Sample | None = None
    ) -> dict[str, Any]:
        logprobs = ((of and of.raw) or {}).get("logprobs")
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        extra = {"detot": detot} if detot else {}
        return {**head, "choices": [choice], **({"usage": None} if usage else {}), **extra}

    head = {
        "id": first.id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": runtime.engine.model.id,
        "system_fingerprint": runtime.fingerprint,
    }
    async with aclosing(events):
        for i in range(ask.n):
            routed = {"event": "route", **_routing(first)} if i == 0 else None
            yield chunk({"role": "assistant", "content": ""}, i, detot=routed)
        async for event in events:
            match event:
                case Delta():
                    yield chunk({"content": event.text}, event.index)
                case Progress(vote=None, sample=sample) if ask.n > 1:
                    yield chunk({"content": sample.text, **_calls(sample)}, sample.index, of=sample)
                    yield chunk({}, sample.index, finish=sample.finish_reason)
                case Progress(vote=Vote() as vote, sample=sample):
                    seen = {"event": "sample", "samples": vote.samples, "sample": sample.index, **_votes(vote)}
                    yield chunk({}, detot=seen)
                case Answer():
                    if event.vote is not None:
                        yield chunk({"content": _content(event, event.best, options)}, of=event.best)
                    elif ask.n == 1 and event.best.raw:
                        yield chunk(_calls(event.best), of=event.best)
                    final = {"event": "answer", **report(event)}
                    yield chunk({}, 0, event.best.finish_reason if ask.n == 1 else None, detot=final)
                    if usage:
                        yield {**head, "choices": [], "usage": _usage(event)}


class EventStream(Response):
    """Server-sent events (LF line ends), a comment when nothing happens for a while, cancelled when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(scope["path"], send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            sending.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, path: str, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(self._source):
                async for data in _paced(self._source, PING):
                    await write(b"data: " + orjson.dumps(data) + b"\n\n" if data else b": working\n\n")
        except Exception as e:
            if not isinstance(e, DetotError):
                log.exception("unexpected error in a stream")
                e = DetotError("an unexpected error; the log has the details")
            await write(b"data: " + orjson.dumps(error_payload(e, path)[0]) + b"\n\n")
        await write(b"data: [DONE]\n\n", more=False)


async def _paced(source: AsyncIterator[Any], seconds: float) -> AsyncGenerator[Any, None]:
    """The items of `source`, with None whenever none came for that long."""
    pending: asyncio.Future[Any] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(source))  # type: ignore[arg-type]
            done, _ = await asyncio.wait((pending,), timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


async def _last(events: AsyncGenerator[Event, None]) -> Answer:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Answer):
                return event
    raise AssertionError("the pipeline ends with an Answer")


def _routing(chosen: Route) -> dict[str, Any]:
    return {
        "task": chosen.task.id,
        "task_probability": round(chosen.probability, 4),
        "version": chosen.version,
        "arm": chosen.arm,
    }


def _votes(vote: Vote | None) -> dict[str, Any]:
    if vote is None:
        return {"answer": None, "key": None, "votes": {}, "share": None, "confidence": None, "unparseable": 0} | {
            "tie": False
        }
    return {
        "answer": vote.answer,
        "key": vote.key,
        "votes": vote.counts,
        "share": round(vote.share, 4),
        "confidence": round(vote.confidence, 4),
        "unparseable": vote.unparseable,
        "tie": vote.tie,
    }


def _calls(sample: Sample) -> dict[str, Any]:
    """A sample's tool calls as a chunk holds them: each one whole."""
    calls = (sample.raw or {}).get("tool_calls") or ()
    return {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]} if calls else {}


def _said(result: Answer, sample: Sample, options: DetotOptions) -> dict[str, Any]:
    """The assistant's words and calls."""
    calls = (sample.raw or {}).get("tool_calls")
    if not calls:
        return {"content": _content(result, sample, options)}
    return {"content": sample.text or None, "tool_calls": calls}


def _content(result: Answer, sample: Sample, options: DetotOptions) -> str:
    if options.content == "answer" and result.vote is not None:
        return result.vote.answer or ""
    return sample.text


def _usage(result: Answer) -> dict[str, int]:
    prompt, drawn = result.prompt_tokens, result.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _bounds(samples: int | SampleBounds | None) -> tuple[int | None, int | None]:
    if isinstance(samples, SampleBounds):
        return samples.min, samples.max
    return samples, samples


def _check_model(name: str, runtime: Runtime) -> None:
    known = runtime.engine.model.id
    if name not in (known, "default"):
        raise UnknownModel(f"there is no model {name!r}; this service serves {known!r} (or 'default')", param="model")


def _model(runtime: Runtime) -> dict[str, Any]:
    info = runtime.engine.model
    return {"id": info.id, "object": "model", "created": runtime.started, "owned_by": "detot"} | {
        "detot": {"revision": info.revision, "hidden_size": info.hidden_size, "context": info.context}
    }
