"""The engine thread: decodes one token per step for every running sample of every call (continuous batching).

Samples join and leave between steps. Calls are served by (priority, arrival); a call's prompt is read once, for all
its samples, when the first of them gets a place.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from service.core.types import Delta, Prompt, Sample, Sampling
from service.engine.base import Stats, sample_seed
from service.engine.detokenize import Text, stepper
from service.engine.local_model import LanguageModel, Prefix, RowCache
from service.engine.local_sampling import Draw, choose
from service.errors import DetotError, EngineUnavailable, InvalidRequest

log = logging.getLogger(__name__)

Item = Sample | Delta | DetotError | None  # None: all samples are through


@dataclass(slots=True, eq=False)
class Call:
    """One `generate`.

    Attributes:
        order: (priority, arrival); smaller goes first.
        deliver: takes what the call's consumer gets, from any thread.
        max_tokens: longest completion, clipped to the context.
        over: nobody waits for it any more, because the consumer has left or it has failed.
    """

    prompt: Prompt
    plan: Sampling
    order: tuple[int, int]
    deliver: Callable[[Item], None]
    max_tokens: int
    over: bool = False
    prefix: Prefix | None = None
    started: int = 0
    running: int = 0

    @property
    def startable(self) -> int:
        """Samples that may start now."""
        if self.over:
            return 0
        return max(0, min(self.plan.in_flight - self.running, self.plan.max_samples - self.started))


@dataclass(slots=True, eq=False)
class Row:
    """One running sample; `logprob` is the sum over its tokens."""

    call: Call
    index: int
    cache: RowCache
    random: random.Random
    text: Text
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    done: bool = False


class Loop:
    """Owns the model and the thread that alone touches it."""

    def __init__(
        self, load: Callable[[], LanguageModel], tokenizer: Tokenizer, eos: frozenset[int], *, max_batch: int
    ) -> None:
        self.stats = Stats()
        self.failure: str | None = None
        self.loaded: queue.SimpleQueue[LanguageModel | Exception] = queue.SimpleQueue()
        self._load, self._tokenizer, self._eos, self._places = load, tokenizer, eos, max_batch
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._rows: list[Row] = []
        self._thread = threading.Thread(target=self._run, name="detot-engine", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Hand over a call.

        Raises:
            EngineUnavailable: the loop has ended.
        """
        with self._lock:
            if self.failure is not None:
                raise EngineUnavailable(self.failure)
            self._inbox.put(call)

    def close(self) -> None:
        """End after the step that is running, and wait for the thread."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self._model = self._load()
        except Exception as e:
            self._end("the engine could not start")
            self.loaded.put(e)
            return
        self.loaded.put(self._model)
        reason = "the engine is closed"
        try:
            while self._receive():
                self._step()
        except BaseException as e:
            log.exception("the engine thread has died")
            reason = f"the engine thread has died: {type(e).__name__}: {e}"
        self._end(reason)

    def _end(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
        while not self._inbox.empty():
            if call := self._inbox.get():
                self._calls.append(call)
        for call in self._calls:
            call.deliver(EngineUnavailable(reason))
        self._calls, self._rows = [], []
        self._count()

    def _receive(self) -> bool:
        """Take in new calls, waiting for one if there is nothing to do; False when asked to end."""
        while True:
            self._drop_abandoned()
            try:
                call = self._inbox.get(block=not self._calls)
            except queue.Empty:
                return True
            if call is None:
                return False
            insort(self._calls, call, key=lambda c: c.order)

    def _drop_abandoned(self) -> None:
        self._rows = [row for row in self._rows if not row.call.over]
        self._calls = [call for call in self._calls if not call.over]
        self._count()

    def _step(self) -> None:
        """Decode one token for all rows, then let new rows in; at most one prompt is read in between."""
        if self._rows:
            logits = self._model.decode([r.cache for r in self._rows], [r.tokens[-1] for r in self._rows])
            self.stats.steps += 1
            self._extend(self._rows, logits)
        reads = 0
        for call in self._calls:
            if call.startable and call.prefix is None and len(self._rows) < self._places:
                if reads:
                    break
                reads += 1
                self._read(call)
            while call.prefix is not None and call.startable and len(self._rows) < self._places:
                self._start(call, call.prefix)
        self._calls = [c for c in self._calls if c.running or c.startable]
        self._count()

    def _read(self, call: Call) -> None:
        prompt = call.prompt
        try:
            call.prefix = self._model.prefill(prompt.token_ids, prompt.span, prompt.soft)
        except (RuntimeError, MemoryError) as e:
            log.exception("a prompt of %d tokens could not be read", len(prompt.token_ids))
            self._fail(call, EngineUnavailable(f"the prompt could not be read: {e}"))
        self.stats.prefill_tokens += len(prompt.token_ids)

    def _start(self, call: Call, prefix: Prefix) -> None:
        row = Row(
            call,
            index=call.started,
            cache=RowCache.start(prefix, prefix.length + call.max_tokens),
            random=random.Random(sample_seed(call.plan.seed, call.started)),
            text=Text(stepper(self._tokenizer), call.plan.stop),
        )
        call.started += 1
        call.running += 1
        if call.started == call.plan.max_samples:
            call.prefix = None
        self._rows.append(row)
        self._extend([row], prefix.logits[None])

    def _extend(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose each row's next token; rows that end with it leave."""
        draws = [Draw(r.call.plan.temperature, r.call.plan.top_p, r.random.random()) for r in rows]
        for row, (token, logprob) in zip(list(rows), choose(logits, draws), strict=True):
            if row.call.over:
                continue
            if math.isnan(logprob):
                self._fail(row.call, InvalidRequest("the model's output for this prompt is not finite"))
                continue
            self.stats.tokens += 1
            if reason := self._accept(row, token, logprob):
                self._finish(row, reason)
        self._rows = [row for row in self._rows if not row.done and not row.call.over]

    def _accept(self, row: Row, token: int, logprob: float) -> str | None:
        """Add a token; the finish reason if it was the last."""
        if token in self._eos:
            return "stop"
        row.tokens.append(token)
        row.logprob += logprob
        plan = row.call.plan
        if plan.stream or plan.stop:
            self._emit(row, row.text.push(token))
            if row.text.stopped:
                return "stop"
        return "length" if len(row.tokens) >= row.call.max_tokens else None

    def _emit(self, row: Row, piece: str) -> None:
        if piece and row.call.plan.stream:
            row.call.deliver(Delta(row.index, piece))

    def _finish(self, row: Row, reason: str) -> None:
        self._emit(row, row.text.finish(self._tokenizer.decode(row.tokens, skip_special_tokens=True)))
        mean = row.logprob / max(1, len(row.tokens))
        call = row.call
        call.deliver(Sample(row.index, tuple(row.tokens), row.text.text, reason, min(0.0, mean)))
        row.done = True
        call.running -= 1
        if not call.running and call.started == call.plan.max_samples:
            call.deliver(None)

    def _fail(self, call: Call, error: DetotError) -> None:
        call.over = True
        call.deliver(error)

    def _count(self) -> None:
        self.stats.running = len(self._rows)
        self.stats.waiting = sum(call.startable for call in self._calls)
