"""What goes over the wire to a vLLM server and comes back: request bodies, streamed chunks, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from service.core.types import Sample, Sampling
from service.engine.base import PLAIN_ONLY, sample_seed
from service.engine.vllm_forms import CHAT, TOOL_FIELDS, Form
from service.errors import DetotError, InvalidRequest, PromptTooLong

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
HONOURED = frozenset(
    {*PLAIN_ONLY, *TOOL_FIELDS, *_GUIDED, "response_format", "structured_outputs", "logprobs", "top_logprobs"}
    | {"logit_bias", "min_p", "top_k", "stop_token_ids", "ignore_eos"}
)
_NO_LOGPROB = -9999.0  # what vLLM writes for a log-probability of minus infinity or none at all
_TOO_LONG = re.compile(r"context length|max_model_len|longer than the maximum", re.IGNORECASE)


class Broken(Exception):
    """An upstream did not do what it should; `gone` when nothing listens there, `again` when a retry makes sense."""

    def __init__(self, reason: str, *, gone: bool = False, again: bool = True) -> None:
        super().__init__(reason)
        self.gone, self.again = gone, again


def check_logprobs(extra: Mapping[str, Any]) -> None:
    """These two are counted on here, so they are not left to the server. Raises InvalidRequest."""
    wanted, top = extra.get("logprobs", False), extra.get("top_logprobs", 0)
    if not isinstance(wanted, bool):
        raise InvalidRequest(f"logprobs is {wanted!r}; it must be true or false", param="logprobs")
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= 20:
        raise InvalidRequest(f"top_logprobs is {top!r}; it must be a number from 0 to 20", param="top_logprobs")


def body(form: Form, content: Any, plan: Sampling, index: int, *, model: str, max_tokens: int, priority: int) -> bytes:
    """A request for one sample. Every sampling parameter is set, because the server's defaults are the model's own
    (`generation_config.json`), and a repetition penalty there crashes vLLM with embeddings (vllm-project/vllm#57719).

    Args:
        content: token ids, turns, or base64 embeddings, as the form asks.
    """
    extra = dict(plan.extra)
    wanted, top = extra.pop("logprobs", False), extra.pop("top_logprobs", 0)
    for name in _GUIDED.keys() & extra.keys():
        extra["structured_outputs"] = {_GUIDED[name]: extra.pop(name)}
    fields: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": plan.temperature,
        "top_p": plan.top_p,
        "top_k": 0,
        "min_p": 0,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "repetition_penalty": 1,
        "max_tokens": max_tokens,
        "seed": sample_seed(plan.seed, index),
        "stop": list(plan.stop),
        **extra,
    }
    if priority:
        fields["priority"] = priority
    if form.path == CHAT:
        fields |= {"messages": content, "logprobs": True, "top_logprobs": top if wanted else 0}
    else:
        what = {"prompt_embeds": content} if form is Form.ROWS else {"prompt": content, "add_special_tokens": False}
        fields |= {**what, "logprobs": top if wanted else 0}
    return orjson.dumps(fields, option=orjson.OPT_NON_STR_KEYS)


@dataclass(slots=True)
class Reply:
    """A streamed completion as far as it has come. `checked` is set once the prompt's ids are known to be ours."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    finish: str | None = None
    stop: int | str | None = None

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Takes one chunk; returns the new text."""
        if usage := chunk.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
        choice = next(iter(chunk.get("choices") or ()), None)
        if self.prompt_ids is None:
            self.prompt_ids = chunk.get("prompt_token_ids") or (choice or {}).get("prompt_token_ids")
        if choice is None:
            return ""
        delta = choice.get("delta")
        piece = (choice.get("text") if delta is None else delta.get("content")) or ""
        for call in [] if delta is None else delta.get("tool_calls") or []:
            self._call(call)
        self.ids += choice.get("token_ids") or ()
        self._probabilities(choice.get("logprobs"))
        self.text += piece
        if choice.get("finish_reason"):
            self.finish, self.stop = choice["finish_reason"], choice.get("stop_reason")
        return piece

    def sample(self, index: int, extra: Mapping[str, Any]) -> Sample:
        """The finished sample.

        Raises:
            Broken: the stream ended early, or the model's output is not finite.
        """
        if self.finish is None:
            raise Broken("the stream ended before the completion did", again=not self.ids)
        ids, logprobs, shown = self.ids, self.logprobs, self.shown
        if self.finish != "length" and not isinstance(self.stop, str) and ids:  # the token that ended it is no text
            ids, logprobs, shown = ids[:-1], logprobs[: len(ids) - 1], shown[: len(ids) - 1]
        mean = math.fsum(logprobs) / max(1, len(logprobs))
        if not math.isfinite(mean) or (logprobs and min(logprobs) <= _NO_LOGPROB):
            raise Broken("the model's output is not finite", again=False)
        raw: dict[str, Any] | None = None
        if extra:
            raw = {"prompt_tokens": self.prompt_tokens, "logprobs": {"content": shown} if "logprobs" in extra else None}
            raw["tool_calls"] = [self.calls[i] for i in sorted(self.calls)] or None
        return Sample(index, tuple(ids), self.text, self.finish, min(0.0, mean), raw)

    def _call(self, piece: Mapping[str, Any]) -> None:
        """A tool call comes in pieces: id and name first, then its arguments bit by bit."""
        call = self.calls.setdefault(
            piece["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = piece.get("id") or call["id"]
        function = piece.get("function") or {}
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""

    def _probabilities(self, found: Mapping[str, Any] | None) -> None:
        """Both shapes: chat's list of tokens, and the parallel lists of completions."""
        if not found:
            return
        entries: list[dict[str, Any]] | None = found.get("content")
        if entries is None:
            tops = found.get("top_logprobs") or [None] * len(found["tokens"])
            entries = [
                _entry(token, value) | {"top_logprobs": [_entry(*item) for item in (top or {}).items()]}
                for token, value, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
            ]
        self.shown += entries
        self.logprobs += [math.nan if e["logprob"] is None else float(e["logprob"]) for e in entries]


def _entry(token: str, value: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": value, "bytes": list(token.encode(errors="replace"))}


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's server-sent events.

    Raises:
        Broken: an error event.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            continue
        chunk = orjson.loads(data)
        if error := chunk.get("error"):
            raise Broken(f"error {error.get('code')}: {error.get('message')}")
        yield chunk


async def refusal(response: httpx.Response, where: str) -> DetotError:
    """The error that a response of 400 or so stands for: the request's fault.

    Raises:
        Broken: any other status: the upstream's fault.
    """
    message, param = explain(await response.aread())
    if response.status_code not in (400, 413, 422):
        raise Broken(f"{where} answers {response.status_code}: {message}")
    kind = PromptTooLong if _TOO_LONG.search(message) else InvalidRequest
    return kind(f"the vLLM server refuses the request: {message}", param=param)


def explain(content: bytes) -> tuple[str, str | None]:
    """Message and parameter of an error body."""
    try:
        found = orjson.loads(content)
        error = found.get("error") or found
        return str(error.get("message") or error), error.get("param")
    except (orjson.JSONDecodeError, AttributeError):
        return content[:300].decode(errors="replace"), None
