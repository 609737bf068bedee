"""A server that speaks just enough of vLLM's HTTP for the engine to use it, and misbehaves when told to.

It generates nothing: real vLLM servers are in test_vllm_server.py. This one is for what a real one does rarely.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from service.engine.text import ChatText

PLACE = 999_999  # the id of an embedded place


class Peer:
    """`mode` decides what becomes of a completion request; see `_complete`. `seen` are the bodies, in order.

    Attributes:
        health, version, text: what it answers.
        key: bearer key it wants, if any.
        joint: what its template puts between a text and an embeddings part.
        gone: requests whose client left before the end.
    """

    def __init__(self, chat: ChatText, hidden_size: int) -> None:
        self.chat, self.hidden_size = chat, hidden_size
        self.mode, self.health, self.version, self.text = "well", 200, "0.32.0", "step by step"
        self.key: str | None = None
        self.joint: str | None = "\n"
        self.context = 512
        self.priorities = True
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.gone = self.running = self.most = 0
        self.release = asyncio.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Peer]:
        """Accepts connections; on the same port each time."""
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                    await self._serve(reader, writer)
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tasks.copy():
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head[0].split()[1]
        if self.key and path.startswith("/v1") and headers.get("authorization") != f"bearer {self.key}":
            return _json(writer, {"error": "Unauthorized"}, 401)
        if path == "/health":
            return _json(writer, {}, self.health)
        if path == "/version":
            return _json(writer, {"version": self.version})
        if path == "/v1/models":
            return _json(writer, {"data": [{"id": "tiny", "parent": None, "max_model_len": self.context}]})
        body = json.loads(raw)
        if path == "/tokenize":
            return _json(writer, {"tokens": self.chat.encode(body["prompt"])})
        self.seen.append(body)
        self.paths.append(path)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._complete(path, body, reader, writer)
        finally:
            self.running -= 1

    async def _complete(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if body.get("priority") and not self.priorities:
            return _error(writer, 400, "Got priority 1 but Priority scheduling is not enabled.")
        if self.mode == "drop":
            return None
        if self.mode == "drop once":
            self.mode = "well"
            return None
        if self.mode == "500":
            return _error(writer, 500, "CUDA error")
        if self.mode == "too long":
            return _error(writer, 400, "This model's maximum context length is 512 tokens. However, ...", "messages")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        if self.mode == "hang":
            return await self._until_gone(reader)
        chat, prompt = path == "/v1/chat/completions", self._prompt(body)
        if chat:
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "prompt_token_ids": prompt})
        if self.mode == "error event":
            _event(writer, {"error": {"message": "EngineCore died", "code": 500}})
            return None
        ids = [] if self.mode == "poisoned" else self.chat.encode(self.text)
        for i, token in enumerate(ids):
            if self.mode == "slow" or (self.mode == "stall" and i == 1):
                if self.mode == "stall":
                    return await self._until_gone(reader)
                await asyncio.wait_for(self.release.wait(), 30)
            if self.mode == "cut" and i == 1:
                return None
            logprob = None if self.mode == "nan" else -0.5
            _event(writer, {"choices": [_choice(chat, self.chat.decode([token]), token, logprob, prompt)]})
            await writer.drain()
            if i + 1 == body["max_tokens"]:
                return _event(writer, {"choices": [_choice(chat, "", None, None, None) | {"finish_reason": "length"}]})
        _event(writer, {"choices": [_choice(chat, "", 2, -0.5, prompt) | {"finish_reason": "stop"}]})
        writer.write(b"data: [DONE]\n\n")
        return None

    async def _until_gone(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self.gone += 1

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        if "messages" not in body:
            return body.get("prompt") or [0]
        turns, count = [], 0
        for turn in body["messages"]:
            if isinstance(turn["content"], list):
                texts = [p["text"] for p in turn["content"] if p["type"] == "text"]
                count = sum(self._rows(p["data"]) for p in turn["content"] if p["type"] == "prompt_embeds")
                joint = "~" if self.joint is None else self.joint
                turn = {**turn, "content": joint.join([*texts, self.chat.mark])}
            turns.append(turn)
        head, _, tail = self.chat.render(turns).partition(self.chat.mark)
        return [*self.chat.encode(head), *[PLACE] * count, *self.chat.encode(tail)]

    def _rows(self, data: str) -> int:
        archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(data)))
        return len(archive.read("archive/data/0")) // (4 * self.hidden_size)


def _choice(chat: bool, text: str, token: int | None, logprob: float | None, prompt: Any) -> dict[str, Any]:
    ids = [] if token is None else [token]
    if chat:
        shown = [{"token": text, "logprob": logprob, "bytes": [], "top_logprobs": []} for _ in ids]
        return {"index": 0, "delta": {"content": text}, "token_ids": ids, "logprobs": {"content": shown}}
    shown = {"tokens": [text] * len(ids), "token_logprobs": [logprob] * len(ids), "top_logprobs": [{}] * len(ids)}
    return {"index": 0, "text": text, "token_ids": ids, "logprobs": shown, "prompt_token_ids": prompt}


def _event(writer: asyncio.StreamWriter, data: Any) -> None:
    writer.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def _error(writer: asyncio.StreamWriter, status: int, message: str, param: str | None = None) -> None:
    _json(writer, {"error": {"message": message, "type": "x", "param": param, "code": status}}, status)


def _json(writer: asyncio.StreamWriter, data: Any, status: int = 200) -> None:
    raw = json.dumps(data).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + raw)
