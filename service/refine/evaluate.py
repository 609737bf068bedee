"""Challenger against champion, item by item: same questions, seeds and stopping rule as serving, idle priority."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from service.core.answers import extract
from service.core.gate import CanaryPair, HeldoutPair, Pair
from service.core.prompt import ChatFormat, compose
from service.core.types import AnswerSpec, Ballot, Sample, Sampling, Vote
from service.core.vote import decided, tally
from service.engine.base import Engine, Priority, sample_seed


@dataclass(frozen=True, slots=True)
class Item:
    """One question for both sides. `key` is the computed answer's, or the one that the frozen votes agree on."""

    messages: tuple[dict[str, str], ...]
    question: str
    key: str
    canary: bool


@dataclass(frozen=True, slots=True)
class Side:
    """A version as it would be served: its anchor, and its soft prompt float32 `(k, d)`, None for the zero offset."""

    anchor: str
    soft: np.ndarray | None = field(default=None, compare=False)


@dataclass(slots=True)
class Spent:
    """What evaluation has cost: samples drawn and tokens generated."""

    samples: int = 0
    tokens: int = 0


async def compare(
    engine: Engine,
    chat: ChatFormat,
    items: Iterable[Item],
    champion: Side,
    challenger: Side,
    plan: Sampling,
    spec: AnswerSpec,
    *,
    seed: int,
    spent: Spent,
    abreast: int = 4,
) -> AsyncIterator[tuple[Item, Pair, Vote, Vote]]:
    """Yields each item's pair with both votes (champion's, challenger's), in the order of the items.

    Closing the iterator stops the work. `abreast` items run at the same time.

    Raises:
        EngineUnavailable, PromptTooLong, InvalidRequest: as the engine does.
    """

    async def one(number: int, item: Item) -> tuple[Item, Pair, Vote, Vote]:
        seeded = plan.but(seed=sample_seed(seed, number))
        sides = (champion, challenger)
        first, second = [await _vote(engine, chat, item, side, seeded, spec, spent) for side in sides]
        return item, _pair(item, first, second, plan.max_samples), first, second

    source = enumerate(items)
    running: list[asyncio.Task[tuple[Item, Pair, Vote, Vote]]] = []
    try:
        while True:
            while len(running) < abreast and (upcoming := next(source, None)) is not None:
                running.append(asyncio.create_task(one(*upcoming)))
            if not running:
                return
            yield await running[0]
            running.pop(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _vote(
    engine: Engine, chat: ChatFormat, item: Item, side: Side, plan: Sampling, spec: AnswerSpec, spent: Spent
) -> Vote:
    """The vote as serving would take it; samples in order of their index, so that a seed repeats it."""
    prompt = compose(chat, item.messages, side.anchor, side.soft)
    waiting: dict[int, Sample] = {}
    ballots: list[Ballot] = []
    async with aclosing(engine.generate(prompt, plan, priority=Priority.IDLE)) as drawn:  # type: ignore[type-var]
        async for sample in drawn:
            if not isinstance(sample, Sample):
                continue
            spent.samples, spent.tokens = spent.samples + 1, spent.tokens + len(sample.token_ids)
            waiting[sample.index] = sample
            while (due := waiting.pop(len(ballots), None)) is not None:
                ballots.append(_ballot(due, spec, item.question))
                if decided(ballots, plan):
                    return tally(ballots)
    return tally(ballots)


def _ballot(sample: Sample, spec: AnswerSpec, question: str) -> Ballot:
    reading = extract(sample.text, spec, question, finished=sample.finish_reason == "stop")
    if reading is None:
        return Ballot(sample.index, None, None, sample.mean_logprob)
    return Ballot(sample.index, reading.key, reading.answer, sample.mean_logprob)


def _pair(item: Item, champion: Vote, challenger: Vote, most: int) -> Pair:
    right, other = challenger.key == item.key, champion.key == item.key
    if not item.canary:
        return HeldoutPair(right, other)
    return CanaryPair(right, other, max(challenger.samples, 1), max(champion.samples, 1), most)
