"""The engine behind HTTP: one or more `vllm serve --enable-prompt-embeds`, shared by many API processes.

This process needs the model's tokenizer, chat template and embedding table, but neither PyTorch nor a GPU.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import orjson

from service.core.types import Delta, ModelInfo, Prompt, Sample, Sampling
from service.engine.base import PLAIN_ONLY, Priority, Stats, check_plan, check_prompt
from service.engine.embeddings import EmbeddingTable
from service.engine.text import ChatText
from service.engine.upstreams import Upstreams
from service.engine.vllm_check import Check, Server
from service.engine.vllm_forms import TOOL_FIELDS, Call, Form, Forms, OtherPrompt
from service.engine.vllm_wire import HONOURED, Broken, Reply, body, check_logprobs, chunks, refusal
from service.engine.weights import revision
from service.errors import DeadlineExceeded, DetotError, EngineUnavailable, InvalidRequest, ModelError

_LARGEST_ROW = 100.0  # times the norm of a typical embedding; learned rows stay within twice their anchor's
_KEEP = 3.0  # seconds an idle connection is kept; vLLM closes it after five

_UNKNOWN_CONTEXT = 1 << 20

Item = Sample | Delta | DetotError | None


class VllmServerEngine:
    """See `service.engine.base.Engine`; make one with `await VllmServerEngine.open(folder, ...)`."""

    def __init__(self, model: ModelInfo, chat: ChatText, table: EmbeddingTable) -> None:
        self._model, self._table, self._forms = model, table, Forms(chat, table)
        self._upstreams: Upstreams[Server]
        self.stats = Stats()
        self.retries = 0

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        model_id: str,
        urls: Sequence[str],
        served: str | None = None,
        key: str | None = None,
        context: int | None = None,
        connect: float = 2.0,
        read: float = 120.0,
        interval: float = 2.0,
        probe_interval: float = 30.0,
    ) -> VllmServerEngine:
        """Read the model's folder, and admit the servers that are there.

        Args:
            folder: tokenizer, template, configuration and safetensors of the model that is served.
            model_id: public id, as in `ModelInfo.id`.
            urls: the servers, `http://host:port`, without `/v1`.
            served: name under which they serve the model; None for their own base model.
            key: bearer key.
            context: longest prompt plus completion in tokens; never more than the servers' `max_model_len`.
            connect, read: seconds to connect, and between two pieces of an answer.
            interval, probe_interval: seconds between looks at a server, and between probes of an idle one.

        Raises:
            ModelError, ConfigError: a server that answers cannot be used; it says what to mend.
        """
        chat, table = await asyncio.to_thread(ChatText.open, folder), EmbeddingTable.open(folder)
        info = ModelInfo(
            id=model_id,
            revision=revision(folder),
            hidden_size=table.hidden_size,
            tokenizer_hash=chat.hash,
            context=min(_positions(folder), context or _positions(folder)),
        )
        engine = cls(info, chat, table)
        timeout = httpx.Timeout(read, connect=connect, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        servers = [
            Server(url, client, engine.draw, chat)
            for url in (u.rstrip("/").removesuffix("/v1") for u in urls)
            for client in [
                httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False)
            ]
        ]
        check = Check(info, chat, table.rows, served)

        async def admit(server: Server) -> None:
            await check.admit(server)
            engine._model = replace(info, context=min(info.context, *(s.context for s in servers if s.context)))

        engine._upstreams = Upstreams(
            servers,
            admit=admit,
            health=check.health,
            probe=check.probe,
            interval=interval,
            probe_interval=probe_interval,
        )
        try:
            await engine._upstreams.start()
        except BaseException:
            await engine.aclose()
            raise
        return engine

    @property
    def model(self) -> ModelInfo:
        """As served: the context is the smallest of the servers seen so far."""
        return self._model

    @property
    def honours(self) -> frozenset[str]:
        return HONOURED

    @property
    def upstreams(self) -> tuple[Server, ...]:
        return self._upstreams.members

    @property
    def rotation(self) -> dict[str, float]:
        """1 for each upstream that gets requests, by URL."""
        return {u.url: float(u.serving) for u in self.upstreams}

    @property
    def failures(self) -> dict[str, float]:
        """Requests that an upstream broke off or never answered, by URL."""
        return {u.url: u.failures for u in self.upstreams}

    @property
    def probe_failures(self) -> dict[str, float]:
        """Probes that found an upstream poisoned, by URL."""
        return {u.url: u.probe_failures for u in self.upstreams}

    async def generate(
        self, prompt: Prompt, plan: Sampling, *, priority: Priority = Priority.LIVE, deadline: float | None = None
    ) -> AsyncGenerator[Sample | Delta, None]:
        """See `Engine.generate`."""
        check_plan(plan)
        self._check(prompt, plan)
        items: asyncio.Queue[Item] = asyncio.Queue()
        room = self._model.context - len(prompt.token_ids)
        call = Call(prompt, plan, min(plan.max_tokens, room), priority, items.put_nowait if plan.stream else None)
        timer = None
        if deadline is not None:
            wait = deadline - time.monotonic()
            timer = asyncio.get_running_loop().call_later(wait, items.put_nowait, _late())
        indexes = iter(range(plan.max_samples))
        count = min(plan.in_flight, plan.max_samples)
        workers = [asyncio.create_task(self._work(call, indexes, items)) for _ in range(count)]
        try:
            while count:
                item = await items.get()
                if item is None:
                    count -= 1
                elif isinstance(item, DetotError):
                    raise item
                else:
                    yield item
        finally:
            if timer:
                timer.cancel()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def health(self) -> None:
        """Raises EngineUnavailable, with every upstream's reason, when none is in rotation."""
        self._upstreams.check()

    async def aclose(self) -> None:
        """Stop looking after the servers; calls still running get EngineUnavailable."""
        await self._upstreams.aclose()

    async def draw(self, server: Server, prompt: Prompt, plan: Sampling, form: Form) -> Sample:
        """One sample from one server, without retries: for its checks and probes.

        Raises:
            Broken, OtherPrompt, InvalidRequest: as the server behaves.
        """
        return await self._drawn(server, Call(prompt, plan, plan.max_tokens), form, 0)

    def _check(self, prompt: Prompt, plan: Sampling) -> None:
        """What must never reach a server. Raises PromptTooLong or InvalidRequest."""
        check_prompt(prompt, self._model)
        size = self._table.vocab_size
        if (wrong := max(prompt.token_ids)) >= size or (wrong := min(prompt.token_ids)) < 0:
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {size}")
        check_logprobs(plan.extra)
        if prompt.soft is None:
            return
        with np.errstate(over="ignore"):
            largest = float(np.linalg.norm(prompt.soft, axis=1).max(initial=0.0))
        bound = _LARGEST_ROW * self._table.rms * self._model.hidden_size**0.5
        if not largest <= bound:  # float16 servers would make infinity of it, and one such value poisons the engine
            raise InvalidRequest(f"soft prompt has a row of norm {largest:.3g}; at most {bound:.3g} is sent")
        if crash := next((name for name in PLAIN_ONLY & plan.extra.keys()), None):
            raise InvalidRequest(
                f"{crash} cannot be used together with an offset (vllm-project/vllm#57719)", param=crash
            )
        if plan.extra.keys() & TOOL_FIELDS:
            raise InvalidRequest("tools cannot be used together with an offset", param="tools")

    async def _work(self, call: Call, indexes: Iterator[int], items: asyncio.Queue[Item]) -> None:
        """Draws samples until none is left to draw. What goes wrong is the caller's to see."""
        try:
            for index in indexes:
                items.put_nowait(await self._sample(call, index))
        except DetotError as e:
            items.put_nowait(e)
        except Exception as e:
            items.put_nowait(EngineUnavailable(f"a request to a vLLM server failed: {type(e).__name__}: {e}"))
            raise
        else:
            items.put_nowait(None)

    async def _sample(self, call: Call, index: int) -> Sample:
        """One sample, from another server if the first one breaks before the first token.

        Raises:
            EngineUnavailable: no server is in rotation, or the second one broke too.
        """
        tried: list[Server] = []
        while True:
            server = self._upstreams.choose(avoid=tried)
            tried.append(server)
            try:
                with server.busy():
                    sample = await self._any_form(server, call, index)
            except Broken as e:
                self._upstreams.broke(server, str(e), gone=e.gone)
                if len(tried) > 1 or not e.again:
                    raise EngineUnavailable(f"{server.url}: {e}", retry_after=1.0) from e
                self.retries += 1
                continue
            self.stats.tokens += len(sample.token_ids)
            if not sample.text and not (sample.raw or {}).get("tool_calls"):
                server.suspect()  # a poisoned engine answers with empty texts
            return sample

    async def _any_form(self, server: Server, call: Call, index: int) -> Sample:
        form = self._forms.choose(call, parts=server.parts, joint=server.joint)
        try:
            return await self._drawn(server, call, form, index)
        except OtherPrompt:
            call.other = True
            return await self._drawn(server, call, Form.ROWS, index)

    async def _drawn(self, server: Server, call: Call, form: Form, index: int) -> Sample:
        """One request. Raises Broken, OtherPrompt, or InvalidRequest where the request itself is refused."""
        reply = Reply()
        self.stats.running += 1
        try:
            data = body(
                form,
                self._forms.content(call, form, server.joint),
                call.plan,
                index,
                model=server.served,
                max_tokens=call.max_tokens,
                priority=call.priority if server.priorities else 0,
            )
            async with server.client.stream("POST", form.path, content=data) as response:
                if response.status_code != 200:
                    raise await refusal(response, form.path)
                await self._read(response, reply, call, form, index)
            return reply.sample(index, call.plan.extra)
        except InvalidRequest as e:
            if call.priority and server.priorities and "priority" in e.message:
                server.priorities = False  # started without --scheduling-policy priority, and strict about it
                return await self._drawn(server, call, form, index)
            raise
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise Broken(f"cannot connect: {e}", gone=True) from e
        except httpx.TimeoutException as e:
            raise Broken("nothing came for too long", again=False) from e
        except (httpx.HTTPError, orjson.JSONDecodeError) as e:
            raise Broken(str(e) or type(e).__name__, again=not reply.ids) from e
        except RuntimeError as e:  # httpx: the client has been closed
            raise EngineUnavailable("the engine is closed") from e
        except Broken as e:
            e.again = e.again and not reply.ids
            raise
        finally:
            self.stats.running -= 1

    async def _read(self, response: httpx.Response, reply: Reply, call: Call, form: Form, index: int) -> None:
        unchecked = form is Form.PART
        async with aclosing(chunks(response)) as stream:  # type: ignore[type-var]
            async for chunk in stream:
                piece = reply.add(chunk)
                if unchecked:
                    call.compare(reply.prompt_ids)
                    unchecked = False
                if piece and call.deliver:
                    call.deliver(Delta(index, piece))


def _positions(folder: Path) -> int:
    """Longest context that the model was made for; a very large one where its configuration does not say."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return int(config.get("max_position_embeddings") or config.get("n_positions") or _UNKNOWN_CONTEXT)
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {e}") from e


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before all samples were finished")
