"""Whether a vLLM server can be used: version, model, tokenizer, embeddings, and whether it makes sense at all.

Each check is a cheap real request, made before the server joins the rotation and again whenever it comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from service.core.types import ModelInfo, Prompt, Sample, Sampling
from service.engine.probe import Probe, State, probe_prompt
from service.engine.text import ChatText
from service.engine.upstreams import Down, Poisoned, Upstream
from service.engine.vllm_forms import Form, OtherPrompt
from service.engine.vllm_versions import check_version
from service.engine.vllm_wire import Broken, explain
from service.errors import ConfigError, InvalidRequest, ModelError

log = logging.getLogger(__name__)

_TEXT = "Ω 12,345 apples\n\n  and 6 pears; naïve – 世界"
_QUESTION = {"role": "user", "content": "What is 17 + 25?"}
_OWN = "You are brief.\n\n"
_ANCHOR = "Answer with a number."
_FIRST = Sampling(min_samples=1, max_samples=1, in_flight=1, temperature=0, top_p=1.0, max_tokens=1)
_CLOSE = 0.05  # nats: the same embeddings looked up there or sent from here differ by rounding alone
_LOOK = 5.0  # seconds a cheap look may take

Draw = Callable[["Server", Prompt, Sampling, Form], Awaitable[Sample]]


class Server(Upstream):
    """A vLLM server.

    Attributes:
        served: the name to ask it for.
        context: its `max_model_len`.
        parts, joint: see `Forms.choose`; found out when it is admitted.
        priorities: it takes the `priority` field.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, draw: Draw, chat: ChatText) -> None:
        super().__init__(url, client)
        self.served, self.context = "", 0
        self.parts = self.priorities = True
        self.joint: str | None = "\n"

        async def alone(prompt: Prompt, plan: Sampling) -> Sample:
            return await draw(self, prompt, plan, Form.TOKENS)

        self.draw = draw
        self.probe = Probe(alone, probe_prompt(chat))


class Check:
    """Admits servers of one model.

    Args:
        model: what they must serve.
        wanted: served name to ask for; None for the server's own base model.
        rows: embeddings of token ids, float32 `(n, d)`.
    """

    def __init__(
        self, model: ModelInfo, chat: ChatText, rows: Callable[[Sequence[int]], np.ndarray], wanted: str | None
    ) -> None:
        self._model, self._chat, self._rows, self._wanted = model, chat, rows, wanted

    async def admit(self, server: Server) -> None:
        """Raises ModelError or ConfigError when it can never be used as it is, Down, or Poisoned."""
        await self.health(server)
        await self._version(server)
        await self._served(server)
        await self._tokenizer(server)
        try:
            await self._embeddings(server)
        except Broken as e:
            raise Down(str(e)) from e
        await self.probe(server)

    async def health(self, server: Server) -> None:
        """Raises Down, or TimeoutError when it does not answer in time."""
        response = await _ask(server, "GET", "/health")
        if response.status_code != 200:
            raise Down(f"/health answers {response.status_code}")

    async def probe(self, server: Server) -> None:
        """Raises Poisoned, or Down."""
        try:
            verdict = await server.probe.run()
            if verdict.state is State.SUSPECT:
                verdict = await server.probe.run()
        except Broken as e:
            raise Down(str(e)) from e
        if verdict.state is not State.WELL:
            raise Poisoned(verdict.reason)

    async def _version(self, server: Server) -> None:
        found = await _json(server, "GET", "/version")
        version = found.get("version")
        if not isinstance(version, str):
            raise ModelError(f"{server.url} is no vLLM server: /version says {found}")
        try:
            check_version(version)
        except ConfigError as e:
            raise ModelError(f"{server.url}: {e.message}") from None

    async def _served(self, server: Server) -> None:
        models = {m["id"]: m for m in (await _json(server, "GET", "/v1/models")).get("data", [])}
        base = [name for name, m in models.items() if not m.get("parent")]
        name = self._wanted or next(iter(base), "")
        if name not in models:
            raise ModelError(
                f"{server.url} serves {', '.join(models) or 'no model'}, not {name!r}; "
                "DETOT_UPSTREAM__MODEL names the served model to ask for"
            )
        server.served, server.context = name, int(models[name].get("max_model_len") or self._model.context)

    async def _tokenizer(self, server: Server) -> None:
        request = {"model": server.served, "prompt": _TEXT, "add_special_tokens": False}
        theirs = (await _json(server, "POST", "/tokenize", request)).get("tokens")
        ours = self._chat.encode(_TEXT)
        if theirs != ours:
            raise ModelError(
                f"{server.url} serves {server.served!r}, another model than {self._model.id!r}: its tokenizer "
                f"makes {theirs} of a known text, ours {ours}; serve the same model or change DETOT_MODEL"
            )

    async def _embeddings(self, server: Server) -> None:
        """The anchor's own embeddings instead of its tokens must be taken, and change nothing."""
        plain = _anchored(self._chat, "")
        soft = self._zero(plain)
        try:
            server.parts = await self._fits(server, soft)
            embedded = await server.draw(server, soft, _FIRST, Form.ROWS)
        except InvalidRequest as e:
            raise ModelError(self._unfit(server, e.message)) from e
        looked_up = await server.draw(server, plain, _FIRST, Form.TOKENS)
        apart = abs(embedded.mean_logprob - looked_up.mean_logprob)
        if looked_up.token_ids and (embedded.token_ids != looked_up.token_ids or not apart < _CLOSE):
            raise ModelError(
                f"{server.url} serves {server.served!r}, whose weights are not those of {self._model.id!r}: our "
                f"embeddings of a prompt give another continuation than its own (log-probability off by {apart:.3g})"
            )
        await self._joint(server)

    async def _joint(self, server: Server) -> None:
        """What the server puts between a caller's own system text and the part: depends on the chat template."""
        soft = self._zero(_anchored(self._chat, _OWN))
        for server.joint in ("\n", ""):
            if server.parts and await self._fits(server, soft):
                return
        server.joint = None
        log.warning(
            "%s: its chat template makes other tokens than the model folder's%s; "
            "such prompts with an offset are sent as embeddings throughout",
            server.url,
            " of a caller's own system text" if server.parts else "",
        )

    async def _fits(self, server: Server, prompt: Prompt) -> bool:
        try:
            await server.draw(server, prompt, _FIRST, Form.PART)
        except OtherPrompt:
            return False
        return True

    def _zero(self, prompt: Prompt) -> Prompt:
        return replace(prompt, soft=self._rows(prompt.token_ids[slice(*prompt.span)]))

    def _unfit(self, server: Server, message: str) -> str:
        if "enable-prompt-embeds" in message:
            return f"{server.url} was started without --enable-prompt-embeds; add that flag to `vllm serve`"
        if "hidden_size" in message:
            return (
                f"{server.url} serves {server.served!r}, another model than {self._model.id!r} "
                f"of hidden size {self._model.hidden_size}: {message}"
            )
        return f"{server.url} does not take prompt embeddings: {message}"


def _anchored(chat: ChatText, own: str) -> Prompt:
    """A question with an anchor behind a caller's `own` system text, as `service.core.prompt.compose` makes it."""
    head, _, tail = chat.render([{"role": "system", "content": own + chat.mark}, _QUESTION]).partition(chat.mark)
    ids, length = chat.encode(head + _ANCHOR), len(chat.encode(_ANCHOR))
    turns = ({"role": "system", "content": own}, _QUESTION)
    return Prompt((*ids, *chat.encode(tail)), (len(ids) - length, len(ids)), turns=turns)


async def _ask(server: Server, method: str, path: str, content: Any = None) -> httpx.Response:
    """Raises Down, ConfigError for a refused key, or TimeoutError."""
    try:
        response = await server.client.request(method, path, json=content, timeout=_LOOK)
    except httpx.ConnectTimeout as e:
        raise Down("nothing answers there") from e
    except httpx.TimeoutException as e:
        raise TimeoutError(f"{path} did not answer within {_LOOK:.0f} s") from e
    except httpx.HTTPError as e:
        raise Down(str(e) or type(e).__name__) from e
    if response.status_code in (401, 403):
        raise ConfigError(
            f"{server.url} refuses the key: set DETOT_UPSTREAM__API_KEY to that of `vllm serve --api-key`"
        )
    if response.status_code >= 500:
        raise Down(f"{path} answers {response.status_code}")
    return response


async def _json(server: Server, method: str, path: str, content: Any = None) -> dict[str, Any]:
    response = await _ask(server, method, path, content)
    if response.status_code != 200:
        said = explain(response.content)[0]
        raise ModelError(f"{server.url} is no vLLM server of use: {path} answers {response.status_code}: {said[:200]}")
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{server.url} is no vLLM server: {path} answers no JSON object")
    return found
