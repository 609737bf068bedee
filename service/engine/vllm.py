"""The engine on vLLM in this process: `AsyncLLM`, whose model runs in child processes, started again when it is sick.

An engine is sick when its process is dead, when it does not get on, when a log-probability is not finite, or when it
fails its probe (`service.engine.probe`). One value that is not finite stays in the key-value blocks it was written to
and spoils whichever request gets them next, so even a single such log-probability, in anybody's sample, means a
restart. Meanwhile calls get EngineUnavailable, `health` says why, and the rest of the process goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.core.types import Delta, ModelInfo, Prompt, Sample, Sampling
from service.engine.base import Priority, Stats, check_plan, check_prompt
from service.engine.probe import Probe, State, probe_prompt
from service.engine.text import ChatText
from service.engine.vllm_core import (
    DEAD,
    Options,
    engine_prompt,
    launch,
    read_stats,
    sampling_params,
    token_logprobs,
    translated,
)
from service.engine.weights import revision
from service.errors import DeadlineExceeded, DetotError, EngineUnavailable, InvalidRequest, ModelError

log = logging.getLogger(__name__)

_CLOSED = "the engine is closed"
_PROBE_SECONDS = 60.0
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0

_Item = Sample | Delta | DetotError


@dataclass(slots=True, eq=False)
class _Call:
    """One `generate`: what vLLM gets, the tasks that draw its samples, and where results go."""

    prompt: Any
    plan: Sampling
    priority: Priority
    max_tokens: int
    items: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class VllmEngine:
    """See `service.engine.base.Engine`; make one with `await VllmEngine.open(folder, ...)`.

    It belongs to the event loop that it was opened in.

    Attributes:
        restarts: how often the model was started again.
    """

    def __init__(
        self, llm: Any, folder: Path, options: Options, chat: ChatText, model_id: str, interval: float
    ) -> None:
        config = llm.model_config
        self._dtype, self._vocab_size, self._eos = config.dtype, config.get_vocab_size(), tuple(chat.eos_ids)
        self._model = ModelInfo(
            id=model_id,
            revision=revision(folder),
            hidden_size=config.get_hidden_size(),
            tokenizer_hash=chat.hash,
            context=config.max_model_len,
        )
        self._llm: Any = llm  # an AsyncLLM; None while it is being started again
        self._folder, self._options, self._interval = folder, options, interval
        self._probe = Probe(self._probe_sample, probe_prompt(chat))
        self._failure: str | None = None  # why calls are refused
        self._sickness: str | None = None  # seen in a sample, not yet acted on
        self._alarm = asyncio.Event()
        self._calls: set[_Call] = set()
        self._numbers = itertools.count()
        self._failed_probes = 0  # that got no answer, or one whose log-probabilities were not finite
        self.restarts = 0
        self._watcher = asyncio.create_task(self._watch(), name="vllm-watch")

    @classmethod
    async def open(
        cls, folder: Path, *, model_id: str, options: Options | None = None, probe_interval: float = 15.0
    ) -> VllmEngine:
        """Load a Hugging Face model folder, learn the probe's continuation and start to watch.

        Args:
            model_id: public id, as in `ModelInfo.id`.
            probe_interval: seconds between probes.

        Raises:
            ModelError: the model cannot be run, or does not answer a plain prompt.
        """
        chat = await asyncio.to_thread(ChatText.open, folder)
        options = options or Options()
        self = cls(await launch(folder, options), folder, options, chat, model_id, probe_interval)
        if (reason := await self._examine()) is not None:
            await self.aclose()
            raise ModelError(f"vLLM does not run {folder} as it should: {reason}")
        return self

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def honours(self) -> frozenset[str]:
        return frozenset()

    @property
    def stats(self) -> Stats:
        """A fresh reading of vLLM's own metrics."""
        return read_stats()

    @property
    def probe_failures(self) -> dict[str, int]:
        """Probes that did not find the engine well, by upstream."""
        return {"in-process": self._probe.failures + self._failed_probes}

    async def generate(
        self, prompt: Prompt, plan: Sampling, *, priority: Priority = Priority.LIVE, deadline: float | None = None
    ) -> AsyncGenerator[Sample | Delta, None]:
        """See `Engine.generate`."""
        check_plan(plan)
        check_prompt(prompt, self._model)
        if (wrong := max(prompt.token_ids)) >= self._vocab_size or (wrong := min(prompt.token_ids)) < 0:
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {self._vocab_size}")
        if self._failure is not None:
            raise EngineUnavailable(self._failure)
        samples = self._run(prompt, plan, priority, deadline)
        try:
            async for item in samples:
                yield item
        finally:
            await samples.aclose()

    async def health(self) -> None:
        """Raises EngineUnavailable with the reason while the model is dead, sick, or being started again."""
        if self._failure is not None:
            raise EngineUnavailable(self._failure)
        if self._llm is None or self._llm.errored:
            self._alarm.set()
            raise EngineUnavailable(DEAD)

    async def aclose(self) -> None:
        """End the model's processes; calls still waiting get EngineUnavailable."""
        self._watcher.cancel()
        with suppress(asyncio.CancelledError):
            await self._watcher
        self._failure = _CLOSED
        await self._stop(_CLOSED)

    # --- samples ----------------------------------------------------------------------------------------------------

    async def _run(
        self, prompt: Prompt, plan: Sampling, priority: Priority, deadline: float | None
    ) -> AsyncGenerator[Sample | Delta, None]:
        room = self._model.context - len(prompt.token_ids)
        call = _Call(engine_prompt(prompt, self._dtype), plan, priority, min(plan.max_tokens, room))
        indexes = iter(range(plan.max_samples))
        call.tasks = [
            asyncio.create_task(self._draw(call, indexes)) for _ in range(min(plan.in_flight, plan.max_samples))
        ]
        timer = _expire(call.items, deadline)
        self._calls.add(call)
        left = plan.max_samples
        try:
            while left:
                if isinstance(item := await call.items.get(), DetotError):
                    raise item
                left -= isinstance(item, Sample)
                yield item
        finally:
            self._calls.discard(call)
            call.cancel()  # vLLM aborts the request of a cancelled task
            if timer:
                timer.cancel()

    async def _draw(self, call: _Call, indexes: Iterator[int]) -> None:
        """Samples one after the other: one place of a call's window. Each is a request of its own to vLLM."""
        try:
            for index in indexes:
                call.items.put_nowait(await self._sample(call, index))
        except Exception as e:
            error = translated(e)
            if isinstance(error, EngineUnavailable):
                self._alarm.set()
            call.items.put_nowait(error)

    async def _sample(self, call: _Call, index: int) -> Sample:
        if self._llm is None:
            raise EngineUnavailable(self._failure or DEAD)
        params = sampling_params(call.plan, index, max_tokens=call.max_tokens, eos=self._eos)
        name, reason, text = f"detot-{next(self._numbers)}", None, ""
        ids: list[int] = []
        logprobs: list[float] = []
        async for output in self._llm.generate(call.prompt, params, name, priority=int(call.priority)):
            piece = output.outputs[0]
            ids += piece.token_ids
            text += piece.text
            reason = piece.finish_reason
            logprobs += self._finite(token_logprobs(piece))
            if call.plan.stream and piece.text:
                call.items.put_nowait(Delta(index, piece.text))
        if reason not in ("stop", "length"):
            raise EngineUnavailable(f"vLLM ended a sample early: {reason}")
        if reason == "stop" and ids and ids[-1] in self._eos:
            del ids[-1], logprobs[-1]
        if not ids:
            self._alarm.set()  # perhaps nothing but an empty answer; the probe will tell
        mean = math.fsum(logprobs) / max(1, len(logprobs))
        return Sample(index, tuple(ids), text, reason, min(0.0, mean))

    def _finite(self, logprobs: list[float]) -> list[float]:
        if not all(map(math.isfinite, logprobs)):
            self._sickness = "a sample's log-probability is not finite"
            self._alarm.set()
            raise EngineUnavailable(self._sickness)
        return logprobs

    # --- life -------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Examine the engine every so often and whenever there is an alarm; start it again when it is sick."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._alarm.wait()
            self._alarm.clear()
            if (reason := await self._examine()) is not None:
                await self._restart(reason)

    async def _examine(self) -> str | None:
        """Why the engine must be started again, or None."""
        if self._llm is None or self._llm.errored:
            return DEAD
        if self._sickness is not None:
            return self._sickness
        steps = self.stats.steps
        try:
            verdict = await self._probe.run()
            if verdict.state is State.SUSPECT:
                verdict = await self._probe.run()
        except DeadlineExceeded:
            if self.stats.steps > steps:
                return None  # busy, and getting on
            self._failed_probes += 1
            return f"nothing came out for {_PROBE_SECONDS:g} s"
        except DetotError as e:
            self._failed_probes += 1
            return e.message
        return verdict.reason or None

    async def _probe_sample(self, prompt: Prompt, plan: Sampling) -> Sample:
        (sample,) = [item async for item in self._run(prompt, plan, Priority.LIVE, time.monotonic() + _PROBE_SECONDS)]
        assert isinstance(sample, Sample)
        return sample

    async def _restart(self, sickness: str) -> None:
        """Refuse calls, end the running ones, and start the model until it is well."""
        pause, reason = _FIRST_PAUSE, sickness
        while reason is not None:
            log.error("starting the model again: %s", reason)
            self._failure = f"the model is being started again: {reason}"
            await self._stop(self._failure)
            self.restarts += 1
            try:
                self._llm, self._sickness = await launch(self._folder, self._options), None
                reason = await self._examine()
            except ModelError as e:
                reason = e.message
            if reason is not None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
        self._failure = None
        log.info("the model is back")

    async def _stop(self, reason: str) -> None:
        for call in self._calls:
            call.cancel()
            call.items.put_nowait(EngineUnavailable(reason))
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)


def _expire(items: asyncio.Queue[_Item], deadline: float | None) -> asyncio.TimerHandle | None:
    if deadline is None:
        return None
    late = DeadlineExceeded("the deadline passed before all samples were finished")
    return asyncio.get_running_loop().call_later(deadline - time.monotonic(), items.put_nowait, late)
