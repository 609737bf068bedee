"""The shipped fake engine: a function says what every sample says. No model, no PyTorch, and the same contract.

It measures the service itself (`detot bench gateway`), lets one try the API, and makes tests exact. A script that
raises injects a failure; an asynchronous one may wait, or never return.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
import re
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.core.types import Delta, ModelInfo, Prompt, Sample, Sampling
from service.engine.base import Priority, Stats, check_plan, check_prompt, sample_seed
from service.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest

_WORDS = "so then each of them has three four seven apples rolls left over which makes answer is 42".split()  # noqa: SIM905
_PIECES = re.compile(r"\S+\s*|\s+")
_TABLE = np.random.default_rng(0).normal(0, 0.02, (256, 16)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Cue:
    """What a script is told about the sample it speaks for.

    Attributes:
        soft: digest (hex) of the soft prompt; empty for the zero offset.
        seed: the sample's own seed, already derived from the plan's.
    """

    prompt: Prompt
    plan: Sampling
    index: int
    seed: int
    soft: str

    @property
    def text(self) -> str:
        """The templated conversation."""
        return Utf8Chat.decode(self.prompt.token_ids)


Script = Callable[[Cue], str | Awaitable[str]]
_Item = Sample | Delta | Exception


def babble(cue: Cue) -> str:
    """Words that depend on prompt and soft prompt, and with a temperature on the seed: like a model, but no sense."""
    seed = cue.seed if cue.plan.temperature > 0 else None
    voice = random.Random(f"{cue.prompt.token_ids} {cue.soft} {seed}")
    return " ".join(voice.choices(_WORDS, k=voice.randint(20, 40))) + "."


class Utf8Chat:
    """A chat format whose tokens are UTF-8 bytes; see `service.core.prompt.ChatFormat`.

    Turns are set off by lone surrogates, which no Unicode text contains, so that nothing in a message is a control
    token.
    """

    mark = "\udcff"
    roles = frozenset({"system", "user", "assistant"})

    def mask(self, text: str) -> str:
        return text.encode(errors="replace").decode()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"\udc01{m['role']}\n{m['content']}\udc02\n" for m in messages) + "\udc01assistant\n"

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogatepass"))

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        """Text of token ids, with the control tokens spelled out."""
        text = bytes(ids).decode(errors="surrogatepass")
        return text.replace("\udc01", "<|im_start|>").replace("\udc02", "<|im_end|>")


class ScriptedEngine:
    """See `service.engine.base.Engine`.

    Args:
        script: what samples say: always the same text, or a function of the Cue, which may be asynchronous.
        latency: seconds before a sample says anything.
        token_delay: seconds per token (byte) of a sample.
        context: longest prompt plus completion, in bytes.

    Attributes:
        chat: its chat format.
        stats: counters.
    """

    def __init__(
        self,
        script: Script | str = "The answer is 42.",
        *,
        latency: float = 0.0,
        token_delay: float = 0.0,
        context: int = 131_072,
    ) -> None:
        self._script: Script = (lambda _: script) if isinstance(script, str) else script
        self._latency, self._token_delay = latency, token_delay
        self._instant = not latency and not token_delay and not inspect.iscoroutinefunction(script)
        self._running: set[asyncio.Queue[_Item]] = set()
        self._closed = False
        self.chat = Utf8Chat()
        self.stats = Stats()
        self._model = ModelInfo(
            id="scripted",
            revision="scripted-1",
            hidden_size=_TABLE.shape[1],
            tokenizer_hash=hashlib.sha256(b"utf-8").hexdigest(),
            context=context,
        )

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def honours(self) -> frozenset[str]:
        return frozenset()

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of token ids, float32 `(len(ids), 16)`."""
        return _TABLE[np.asarray(ids, dtype=np.int64)]

    def chunks(self, size: int = 4_096) -> Iterator[np.ndarray]:
        """The whole table in order, float32 `(size, 16)` at a time."""
        return (_TABLE[start : start + size] for start in range(0, len(_TABLE), size))

    async def generate(
        self, prompt: Prompt, plan: Sampling, *, priority: Priority = Priority.LIVE, deadline: float | None = None
    ) -> AsyncGenerator[Sample | Delta, None]:
        """See `Engine.generate`."""
        check_plan(plan)
        self._check(prompt)
        self.stats.prefill_tokens += len(prompt.token_ids)
        soft = self._digest(prompt)
        items = self._now(prompt, plan, soft, deadline) if self._instant else self._later(prompt, plan, soft, deadline)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def health(self) -> None:
        """Raises EngineUnavailable when closed."""
        if self._closed:
            raise EngineUnavailable("the engine is closed")

    async def aclose(self) -> None:
        """Running calls get EngineUnavailable."""
        self._closed = True
        for items in self._running:
            items.put_nowait(EngineUnavailable("the engine is closed"))

    def _check(self, prompt: Prompt) -> None:
        if self._closed:
            raise EngineUnavailable("the engine is closed")
        check_prompt(prompt, self._model)
        if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < len(_TABLE):
            raise InvalidRequest(f"a token id is outside the vocabulary of {len(_TABLE)}")

    def _digest(self, prompt: Prompt) -> str:
        if prompt.soft is None or np.array_equal(prompt.soft, self.rows(prompt.token_ids[slice(*prompt.span)])):
            return ""
        return hashlib.sha256(prompt.soft.tobytes()).hexdigest()[:16]

    async def _now(
        self, prompt: Prompt, plan: Sampling, soft: str, deadline: float | None
    ) -> AsyncGenerator[Sample | Delta, None]:
        for index in range(plan.max_samples):
            if deadline is not None and time.monotonic() >= deadline:
                raise _late()
            cue = self._cue(prompt, plan, index, soft)
            said = self._script(cue)
            sample = self._sample(said if isinstance(said, str) else await said, cue)
            if plan.stream:
                for piece in _PIECES.findall(sample.text):
                    yield Delta(index, piece)
            yield sample

    async def _later(
        self, prompt: Prompt, plan: Sampling, soft: str, deadline: float | None
    ) -> AsyncGenerator[Sample | Delta, None]:
        items: asyncio.Queue[_Item] = asyncio.Queue()
        cues = (self._cue(prompt, plan, index, soft) for index in range(plan.max_samples))
        tasks = [asyncio.create_task(self._speak(cues, items)) for _ in range(min(plan.in_flight, plan.max_samples))]
        timer = _expire(items, deadline)
        self._running.add(items)
        left = plan.max_samples
        try:
            while left:
                if isinstance(item := await items.get(), Exception):
                    raise item
                left -= isinstance(item, Sample)
                yield item
        finally:
            self._running.discard(items)
            for task in tasks:
                task.cancel()
            if timer:
                timer.cancel()

    async def _speak(self, cues: Iterator[Cue], items: asyncio.Queue[_Item]) -> None:
        """Samples one after the other, as long as there are cues: one place of a call's window."""
        for cue in cues:
            self.stats.running += 1
            try:
                await self._say(cue, items)
            except Exception as e:
                items.put_nowait(e)
                return
            finally:
                self.stats.running -= 1

    async def _say(self, cue: Cue, items: asyncio.Queue[_Item]) -> None:
        await asyncio.sleep(self._latency)
        said = self._script(cue)
        sample = self._sample(said if isinstance(said, str) else await said, cue)
        for piece in _PIECES.findall(sample.text) if cue.plan.stream else ():
            await asyncio.sleep(self._token_delay * len(piece.encode()))
            items.put_nowait(Delta(cue.index, piece))
        if self._token_delay and not cue.plan.stream:
            await asyncio.sleep(self._token_delay * len(sample.token_ids))
        items.put_nowait(sample)

    def _cue(self, prompt: Prompt, plan: Sampling, index: int, soft: str) -> Cue:
        return Cue(prompt, plan, index, sample_seed(plan.seed, index), soft)

    def _sample(self, said: str, cue: Cue) -> Sample:
        """What is left of a script's text under the plan's stop strings and token limit."""
        plan = cue.plan
        room = min(plan.max_tokens, self._model.context - len(cue.prompt.token_ids))
        raw = said.encode(errors="replace")
        text, reason = said, "stop"
        if len(raw) > room:
            raw, reason = raw[:room], "length"
            text = raw.decode(errors="ignore")
        ends = [(at, len(stop)) for stop in plan.stop if stop and (at := text.find(stop)) >= 0]
        if ends:
            at, length = min(ends)
            raw, text, reason = text[: at + length].encode(), text[:at], "stop"
        self.stats.tokens += len(raw)
        self.stats.steps += 1
        surprise = (zlib.crc32(raw) % 1_000) / 1_000
        return Sample(cue.index, tuple(raw), text, reason, -0.05 - 0.5 * surprise if raw else 0.0)


def _expire(items: asyncio.Queue[_Item], deadline: float | None) -> asyncio.TimerHandle | None:
    if deadline is None:
        return None
    return asyncio.get_running_loop().call_later(deadline - time.monotonic(), items.put_nowait, _late())


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before all samples were finished")
