"""The engine in this process: PyTorch and transformers, int8 on CPU, many samples decoded together."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from service.core.types import Delta, ModelInfo, Prompt, Sample, Sampling
from service.engine import local_int8
from service.engine.base import Priority, Stats, check_plan, check_prompt
from service.engine.local_loop import Call, Item, Loop
from service.engine.local_model import LanguageModel, RowCache
from service.engine.text import eos_ids, tokenizer_hash
from service.engine.weights import revision
from service.errors import ConfigError, DeadlineExceeded, DetotError, EngineUnavailable, InvalidRequest, ModelError


class LocalEngine:
    """See `service.engine.base.Engine`; make one with `await LocalEngine.open(folder, ...)`."""

    def __init__(self, loop: Loop, model: ModelInfo, vocab_size: int) -> None:
        self._loop, self._model, self._vocab_size = loop, model, vocab_size
        self._arrivals = itertools.count()

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        model_id: str,
        quantize: bool | Literal["auto"] = "auto",
        device: str = "auto",
        max_batch: int = 16,
        context: int | None = None,
        threads: int | None = None,
    ) -> LocalEngine:
        """Load a Hugging Face model folder and start the engine thread.

        Args:
            model_id: public id, as in `ModelInfo.id`.
            quantize: int8 weights; "auto" does so on CPU where the kernels exist. Without, CPU computes in float32.
            device: "cpu", "cuda", "cuda:N", or "auto" for CUDA when there is one.
            max_batch: samples decoded together; memory is bounded by this many contexts of keys and values.
            context: longest prompt plus completion in tokens; None for the model's own.
            threads: PyTorch threads; None for all cores.

        Raises:
            ModelError: the folder cannot be read, or holds a kind of model that is not supported.
            ConfigError: int8 or CUDA asked for where it cannot be had.
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        int8 = _int8(quantize, device)
        tokenizer, digest, eos = await asyncio.to_thread(_read_tokenizer, folder)
        load = partial(_load, folder, device=device, quantize=int8, threads=threads)
        loop = Loop(load, tokenizer, frozenset(eos), max_batch=max_batch)
        loaded = await asyncio.to_thread(loop.loaded.get)
        if isinstance(loaded, Exception):
            raise loaded
        info = ModelInfo(
            id=model_id,
            revision=revision(folder),
            hidden_size=loaded.hidden_size,
            tokenizer_hash=digest,
            context=min(loaded.positions, context or loaded.positions),
        )
        return cls(loop, info, loaded.vocab_size)

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def honours(self) -> frozenset[str]:
        return frozenset()

    @property
    def stats(self) -> Stats:
        return self._loop.stats

    async def generate(
        self, prompt: Prompt, plan: Sampling, *, priority: Priority = Priority.LIVE, deadline: float | None = None
    ) -> AsyncGenerator[Sample | Delta, None]:
        """See `Engine.generate`."""
        check_plan(plan)
        check_prompt(prompt, self._model)
        if (wrong := max(prompt.token_ids)) >= self._vocab_size or (wrong := min(prompt.token_ids)) < 0:
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {self._vocab_size}")
        events = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()
        room = self._model.context - len(prompt.token_ids)
        call = Call(
            prompt,
            plan,
            order=(priority, next(self._arrivals)),
            deliver=partial(_deliver, events, items),
            max_tokens=min(plan.max_tokens, room),
        )
        timer = None if deadline is None else events.call_later(deadline - time.monotonic(), items.put_nowait, _late())
        self._loop.submit(call)
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, DetotError):
                    raise item
                yield item
        finally:
            call.over = True
            if timer:
                timer.cancel()

    async def health(self) -> None:
        """Raises EngineUnavailable with the reason when the engine thread has ended."""
        if self._loop.failure is not None:
            raise EngineUnavailable(self._loop.failure)

    async def aclose(self) -> None:
        """End after the running step; calls still waiting get EngineUnavailable."""
        await asyncio.to_thread(self._loop.close)


def _load(folder: Path, *, device: str, quantize: bool, threads: int | None) -> LanguageModel:
    """Load, and run three tokens through both calls, so that what does not fit together shows now."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = LanguageModel(folder, device=device, quantize=quantize)
    try:
        prefix = model.prefill([0, 1, 2], (0, 0), None)
        model.decode([RowCache.start(prefix, 4)] * 1, [3])
    except (RuntimeError, TypeError, AttributeError) as e:
        raise ModelError(f"{folder}: this kind of model does not run on the local engine: {e}") from e
    return model


def _int8(quantize: bool | Literal["auto"], device: str) -> bool:
    possible = device == "cpu" and local_int8.supported()
    if quantize is True and not possible:
        raise ConfigError(f"int8 is for x86 processors, not for {device} here; set quantize to auto or no")
    return possible if quantize == "auto" else quantize


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, str, tuple[int, ...]]:
    digest, eos = tokenizer_hash(folder), eos_ids(folder)
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json")), digest, eos
    except Exception as e:  # the tokenizers library raises bare Exception
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {e}") from e


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before all samples were finished")


def _deliver(events: asyncio.AbstractEventLoop, items: asyncio.Queue[Item], item: Item) -> None:
    try:
        events.call_soon_threadsafe(items.put_nowait, item)
    except RuntimeError:  # the consumer's event loop is closed; nobody waits
        pass
