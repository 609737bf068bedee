"""One request, from admission to the recorded outcome. Read `answer` from top to bottom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from service import metrics
from service.core.answers import extract
from service.core.prompt import ChatFormat, compose, forwarded
from service.core.types import Ballot, Delta, DrawnSample, Outcome, Prompt, Sample, Vote
from service.core.vote import decided, tally
from service.engine.base import Engine
from service.errors import DeadlineExceeded
from service.serve.admission import Admission
from service.serve.live import Live, Snapshot
from service.serve.routing import Ask, Route, route
from service.serve.symbolic import SymbolicPool
from service.tasks.classify import Classification
from service.tasks.signals import Signals, signals

_LONG_TEXT = 20_000  # characters from which classifying and tokenising leave the event loop


@dataclass(frozen=True, slots=True)
class Progress:
    """One more sample is in: the vote as it stands, None for raw samples. Only streamed requests see these."""

    vote: Vote | None
    sample: Sample


@dataclass(frozen=True, slots=True)
class Answer:
    """The finished request.

    Attributes:
        vote: None for free text and raw samples.
        best: the sample to show: the leader's with the highest mean log-probability, else the likeliest of all.
        stopped: why sampling ended: "decided" (the vote was safe), "complete" (all samples drawn) or "deadline".
        timings: seconds by stage, and "total".
        recorded: whether the outcome was taken for recording.
    """

    route: Route
    vote: Vote | None
    samples: tuple[Sample, ...]
    best: Sample
    prompt_tokens: int
    stopped: str
    timings: dict[str, float]
    recorded: bool

    @property
    def completion_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.samples)


Event = Route | Delta | Progress | Answer


@dataclass(frozen=True, slots=True)
class Server:
    """What answering needs; wired once per process. `record` takes an outcome without waiting, False if dropped."""

    engine: Engine
    chat: ChatFormat
    live: Live
    admission: Admission
    symbolic: SymbolicPool
    record: Callable[[Outcome], bool]
    control_share: float
    deadline: float
    keep_prompts: bool = True


@dataclass(slots=True)
class Stopwatch:
    """Seconds per stage, in order."""

    started: float = field(default_factory=time.perf_counter)
    last: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = seconds = now - (self.last or self.started)
        self.last = now
        metrics.of(metrics.STAGE_SECONDS, stage).observe(seconds)


async def answer(server: Server, ask: Ask) -> AsyncGenerator[Event, None]:
    """Serve one request: yields its Route, then Delta or Progress events, then the Answer.

    Closing the generator aborts every sample of the request.

    Raises:
        Overloaded, Unavailable, UnknownTask, InvalidRequest, PromptTooLong: before any event.
        EngineUnavailable: the engine is dead.
        DeadlineExceeded: not one sample was finished in time.
    """
    with server.admission.permit():
        watch = Stopwatch()
        deadline = time.monotonic() + min(ask.deadline or server.deadline, server.deadline)
        snapshot = server.live.snapshot
        seen, found = await _look(snapshot, ask)
        watch.lap("classify")
        chosen = route(snapshot, ask, seen, found, server.control_share)
        prompt = await _compose(server.chat, ask, chosen)
        watch.lap("compose")
        yield chosen

        samples: list[Sample] = []
        ballots: list[Ballot] = []
        stopped = "complete"
        try:
            async with aclosing(_drawn(server.engine, ask, chosen, prompt, deadline)) as drawn:
                async for item in drawn:
                    if isinstance(item, Delta):
                        yield item
                        continue
                    samples.append(item)
                    if chosen.voted:
                        ballots.append(await _ballot(server.symbolic, chosen, ask, item))
                    if ask.stream:
                        yield Progress(tally(ballots) if chosen.voted else None, item)
                    if chosen.voted and decided(ballots, chosen.plan):
                        stopped = "decided" if len(ballots) < chosen.plan.max_samples else "complete"
                        break
        except DeadlineExceeded:
            if not samples:
                raise
            stopped = "deadline"
        watch.lap("generate")

        vote = tally(ballots) if chosen.voted else None
        watch.lap("vote")
        recorded = ask.recordable and server.record(
            _outcome(server, ask, chosen, vote, samples, ballots, prompt, watch)
        )
        watch.lap("record")
        timings = {**watch.stages, "total": watch.last - watch.started}
        result = Answer(
            chosen, vote, tuple(samples), _best(vote, samples), _read(prompt, samples), stopped, timings, recorded
        )
        _count(result)
        yield result


async def _look(snapshot: Snapshot, ask: Ask) -> tuple[Signals, Classification | None]:
    """The request's metadata, and the classifier's finding unless the caller named the task."""

    def look() -> tuple[Signals, Classification | None]:
        seen = signals(ask.text)
        return seen, None if ask.task else snapshot.classifier.classify(ask.text, seen)

    return await asyncio.to_thread(look) if len(ask.text) > _LONG_TEXT else look()


async def _compose(chat: ChatFormat, ask: Ask, chosen: Route) -> Prompt:
    if ask.forward:
        return forwarded(chat, ask.messages)
    if sum(len(m["content"]) for m in ask.messages) > _LONG_TEXT:
        return await asyncio.to_thread(compose, chat, ask.messages, chosen.anchor_text, chosen.soft)
    return compose(chat, ask.messages, chosen.anchor_text, chosen.soft)


async def _drawn(
    engine: Engine, ask: Ask, chosen: Route, prompt: Prompt, deadline: float
) -> AsyncGenerator[Sample | Delta, None]:
    """The engine's samples: as they finish, or by index when the caller gave a seed, because then the same samples
    must reach the vote in the same order whatever else is running."""
    waiting: dict[int, Sample] = {}
    due = 0
    try:
        async with aclosing(engine.generate(prompt, chosen.plan, deadline=deadline)) as stream:  # type: ignore[type-var]
            async for item in stream:
                if isinstance(item, Delta) or ask.seed is None:
                    yield item
                    continue
                waiting[item.index] = item
                while due in waiting:
                    yield waiting.pop(due)
                    due += 1
    except DeadlineExceeded:
        for index in sorted(waiting):
            yield waiting[index]
        raise


async def _ballot(symbolic: SymbolicPool, chosen: Route, ask: Ask, sample: Sample) -> Ballot:
    """What a sample votes for; an expression that plain rules cannot normalise goes to the symbolic pool."""
    reading = extract(sample.text, chosen.task.answer, ask.text, finished=sample.finish_reason == "stop")
    if reading is None:
        return Ballot(sample.index, None, None, sample.mean_logprob)
    key = reading.key
    if reading.symbolic is not None:
        key = await symbolic.canonical(reading.symbolic) or key
    return Ballot(sample.index, key, reading.answer, sample.mean_logprob)


def _read(prompt: Prompt, samples: list[Sample]) -> int:
    """Prompt tokens: as counted by a server that rendered the conversation, else ours."""
    return (samples[0].raw or {}).get("prompt_tokens") or len(prompt.token_ids)


def _best(vote: Vote | None, samples: list[Sample]) -> Sample:
    if vote is not None and vote.best is not None:
        return next(s for s in samples if s.index == vote.best)
    return max(samples, key=lambda s: s.mean_logprob)


def _outcome(
    server: Server,
    ask: Ask,
    chosen: Route,
    vote: Vote | None,
    samples: list[Sample],
    ballots: list[Ballot],
    prompt: Prompt,
    watch: Stopwatch,
) -> Outcome:
    keys = {b.index: b.key for b in ballots}
    plan = chosen.plan
    return Outcome(
        id=chosen.id,
        task=chosen.task.id,
        version=chosen.version,
        arm=chosen.arm,
        model=server.engine.model.id,
        created=time.time(),
        messages=ask.messages if server.keep_prompts else None,
        answer=vote.answer if vote else None,
        key=vote.key if vote else None,
        counts=vote.counts if vote else {},
        share=vote.share if vote else 0.0,
        confidence=vote.confidence if vote else 0.0,
        unparseable=vote.unparseable if vote else 0,
        tie=vote.tie if vote else False,
        drawn=tuple(DrawnSample(keys.get(s.index), s.token_ids, s.mean_logprob, s.finish_reason) for s in samples),
        anchor=chosen.anchor,
        plan={
            "temperature": plan.temperature,
            "top_p": plan.top_p,
            "max_tokens": plan.max_tokens,
            "min_samples": plan.min_samples,
            "max_samples": plan.max_samples,
            "seed": plan.seed,
        },
        prompt_tokens=len(prompt.token_ids),
        completion_tokens=sum(len(s.token_ids) for s in samples),
        latency_s=watch.last - watch.started,
    )


def _count(result: Answer) -> None:
    task, vote = result.route.task.id, result.vote
    metrics.of(metrics.REQUEST_SECONDS, task).observe(result.timings["total"])
    metrics.of(metrics.TOKENS, "prompt").inc(result.prompt_tokens)
    metrics.of(metrics.TOKENS, "completion").inc(result.completion_tokens)
    if vote is None:
        return
    metrics.of(metrics.SAMPLES, task).observe(vote.samples)
    metrics.of(metrics.SAVED, task).inc(max(0, result.route.plan.max_samples - vote.samples))
    metrics.of(metrics.CONSENSUS, task).observe(vote.share)
    metrics.of(metrics.CONFIDENCE, task).observe(vote.confidence)
    if vote.unparseable:
        metrics.of(metrics.UNPARSEABLE, task).inc(vote.unparseable)
