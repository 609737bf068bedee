"""What every engine must do, run on each of them: subclass `Conformance` and give it a `subject` fixture."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
import pytest

from service.core.prompt import ChatFormat, compose
from service.core.types import Delta, Prompt, Sample, Sampling
from service.engine.base import Engine, Priority, collect
from service.errors import DeadlineExceeded, InvalidRequest, PromptTooLong

ANCHOR = "Solve the problem step by step. End with: The answer is <number>."
QUESTION = "A baker made 24 rolls and sold them in bags of 3 for 2 dollars each. How much did he earn?"
GREEDY = Sampling(min_samples=1, max_samples=1, in_flight=1, temperature=0, max_tokens=24)
WARM = Sampling(max_samples=4, in_flight=4, temperature=1.0, top_p=1.0, max_tokens=16, seed=7)


@dataclass(frozen=True)
class Subject:
    """An engine under test. `slow` is the same engine, or one of its kind, whose samples take a while.

    `rows` gives embeddings of token ids, `running` the number of samples being generated.
    """

    engine: Engine
    slow: Engine
    chat: ChatFormat
    rows: Callable[[tuple[int, ...]], np.ndarray]
    running: Callable[[], int]

    def prompt(self, question: str = QUESTION) -> Prompt:
        return compose(self.chat, [{"role": "user", "content": question}], ANCHOR)

    def anchored(self, prompt: Prompt) -> np.ndarray:
        return self.rows(prompt.token_ids[slice(*prompt.span)])

    def shifted(self, seed: int, norm: float = 1.0) -> Prompt:
        """The prompt with a random offset; every row's norm is `norm` times that of its anchor row."""
        prompt = self.prompt()
        anchor = self.anchored(prompt)
        noise = np.random.default_rng(seed).normal(size=anchor.shape)
        noise *= norm * np.linalg.norm(anchor, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        return replace(prompt, soft=(anchor + noise).astype(np.float32))


def alike(one: list[Sample], other: list[Sample]) -> bool:
    """The same tokens and text, and log-probabilities within 1e-4.

    For engines whose float products depend on what else is in the batch: there the last bits cannot be equal.
    """
    flat = [replace(s, mean_logprob=0.0) for s in one] == [replace(s, mean_logprob=0.0) for s in other]
    return flat and all(abs(a.mean_logprob - b.mean_logprob) < 1e-4 for a, b in zip(one, other, strict=True))


async def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    for _ in range(round(within / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen in time")


class Conformance:
    def same(self, one: list[Sample], other: list[Sample]) -> bool:
        """Whether two runs are the same samples, here to the last bit of their log-probability."""
        return one == other

    async def test_zero_offset_is_the_plain_prompt(self, subject: Subject):
        for question in (QUESTION, "What is 17 + 25?", "Name a colour."):
            plain = subject.prompt(question)
            zero = replace(plain, soft=subject.anchored(plain) + np.float32(0))
            one, other = await collect(subject.engine, plain, GREEDY), await collect(subject.engine, zero, GREEDY)
            assert self.same(one, other)
            assert one[0].token_ids

    async def test_offsets_of_equal_shape_give_different_and_repeatable_text(self, subject: Subject):
        prompts = [subject.prompt(), subject.shifted(1), subject.shifted(2)]
        alone = [(await collect(subject.engine, p, GREEDY))[0].text for p in prompts]
        assert len(set(alone)) == 3
        together = await asyncio.gather(*(collect(subject.engine, p, GREEDY) for p in prompts * 3))
        assert [samples[0].text for samples in together] == alone * 3

    async def test_same_seed_same_samples_whatever_else_is_running(self, subject: Subject):
        first = await collect(subject.engine, subject.prompt(), WARM)
        others = [collect(subject.engine, subject.prompt(f"What is {i} + {i}?"), WARM.but(seed=i)) for i in range(4)]
        again, *_ = await asyncio.gather(collect(subject.engine, subject.prompt(), WARM), *others)
        assert self.same(first, again)

    async def test_the_window_does_not_change_samples(self, subject: Subject):
        wide = await collect(subject.engine, subject.prompt(), WARM)
        narrow = await collect(subject.engine, subject.prompt(), WARM.but(in_flight=1))
        fewer = await collect(subject.engine, subject.prompt(), WARM.but(max_samples=2))
        assert self.same(wide, narrow)
        assert self.same(wide[:2], fewer)

    async def test_seeds_and_samples_differ_at_temperature_one(self, subject: Subject):
        one = await collect(subject.engine, subject.prompt(), WARM)
        other = await collect(subject.engine, subject.prompt(), WARM.but(seed=8))
        assert len({s.token_ids for s in one}) > 1
        assert [s.token_ids for s in one] != [s.token_ids for s in other]

    async def test_at_most_in_flight_samples_run_and_every_index_comes_once(self, subject: Subject):
        most, indexes = 0, []
        plan = WARM.but(max_samples=5, in_flight=2)
        async with aclosing(subject.slow.generate(subject.prompt(), plan)) as stream:  # type: ignore[type-var]
            task = asyncio.ensure_future(anext(stream))
            while True:
                await asyncio.wait([task], timeout=0.002)
                most = max(most, subject.running())
                if not task.done():
                    continue
                try:
                    indexes.append(task.result().index)
                except StopAsyncIteration:
                    break
                task = asyncio.ensure_future(anext(stream))
        assert 0 < most <= 2
        assert sorted(indexes) == [0, 1, 2, 3, 4]

    async def test_closing_the_iterator_frees_the_work(self, subject: Subject):
        async with aclosing(subject.slow.generate(subject.prompt(), WARM.but(max_tokens=400))) as stream:  # type: ignore[type-var]
            task = asyncio.ensure_future(anext(stream))
            await until(lambda: subject.running() > 0)
            task.cancel()
            await asyncio.wait([task])
        await until(lambda: subject.running() == 0)

    async def test_half_of_forty_requests_cancelled(self, subject: Subject):
        plan = WARM.but(max_samples=2, in_flight=2, max_tokens=6)
        tasks = [
            asyncio.create_task(collect(subject.slow, subject.prompt(f"What is {i} + 1?"), plan.but(seed=i)))
            for i in range(40)
        ]
        await until(lambda: subject.running() > 0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) or len(r) == 2 for r in results[::2])  # type: ignore[arg-type]
        assert all(isinstance(r, list) and len(r) == 2 for r in results[1::2])
        await until(lambda: subject.running() == 0)
        again = await collect(subject.slow, subject.prompt("What is 39 + 1?"), plan.but(seed=39))
        assert self.same(again, results[39])  # type: ignore[arg-type]

    async def test_overlong_prompt_is_a_clear_error(self, subject: Subject):
        context = subject.engine.model.context
        with pytest.raises(PromptTooLong, match=str(context)):
            await collect(subject.engine, Prompt((65,) * context), GREEDY)

    async def test_bad_offsets_never_reach_the_model(self, subject: Subject):
        good = subject.shifted(1)
        assert good.soft is not None
        before = await collect(subject.engine, subject.prompt(), GREEDY)
        holed, endless = good.soft.copy(), good.soft.copy()
        holed[0, 0], endless[-1, -1] = np.nan, np.inf
        bad = [holed, endless, good.soft[1:], good.soft[:, 1:], good.soft.astype(np.float64), good.soft.ravel()]
        for soft in bad:
            with pytest.raises(InvalidRequest):
                await collect(subject.engine, replace(good, soft=soft), GREEDY)
        for prompt in (Prompt(()), Prompt((65, 66), (1, 5)), Prompt((65, -1)), Prompt((65, 10**9))):
            with pytest.raises(InvalidRequest):
                await collect(subject.engine, prompt, GREEDY)
        assert self.same(await collect(subject.engine, subject.prompt(), GREEDY), before)
        await subject.engine.health()

    async def test_plans_that_make_no_sense_are_refused(self, subject: Subject):
        wrong = [{"max_samples": 0}, {"in_flight": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}]
        for changes in wrong:
            with pytest.raises(InvalidRequest, match=next(iter(changes))):
                await collect(subject.engine, subject.prompt(), GREEDY.but(**changes))

    async def test_huge_finite_offsets_harm_nobody_else(self, subject: Subject):
        good = subject.shifted(1)
        assert good.soft is not None
        alone = await collect(subject.engine, subject.prompt(), GREEDY)
        huge = [replace(good, soft=np.full_like(good.soft, v)) for v in (1e20, 3e38)]
        mine, *_ = await asyncio.gather(
            collect(subject.engine, subject.prompt(), GREEDY),
            *(collect(subject.engine, p, GREEDY) for p in huge),
            return_exceptions=True,
        )
        assert self.same(mine, alone)  # type: ignore[arg-type]
        assert self.same(await collect(subject.engine, subject.prompt(), GREEDY), alone)
        await subject.engine.health()

    async def test_deadline(self, subject: Subject):
        for deadline in (time.monotonic() - 1, time.monotonic() + 0.02):
            with pytest.raises(DeadlineExceeded):
                await collect(
                    subject.slow, subject.prompt(), WARM.but(max_samples=64, max_tokens=400), deadline=deadline
                )
        await until(lambda: subject.running() == 0)
        assert await collect(subject.engine, subject.prompt(), GREEDY, deadline=time.monotonic() + 60)

    async def test_stop_strings_end_the_text_before_them(self, subject: Subject):
        plan = GREEDY.but(max_tokens=48)
        free = (await collect(subject.engine, subject.prompt(), plan))[0].text
        middle = free[len(free) // 2 :][:6]
        cut = (await collect(subject.engine, subject.prompt(), plan.but(stop=("never said", middle))))[0]
        assert cut.text == free[: free.index(middle)]
        assert cut.finish_reason == "stop"

    async def test_max_tokens(self, subject: Subject):
        for sample in await collect(subject.engine, subject.prompt(), WARM.but(max_tokens=3)):
            assert len(sample.token_ids) == 3
            assert sample.finish_reason == "length"

    async def test_streamed_pieces_make_up_the_text(self, subject: Subject):
        plan = GREEDY.but(max_tokens=48)
        whole = (await collect(subject.engine, subject.prompt(), plan))[0]
        for stop in ((), (whole.text[20:24],)):
            pieces, samples = [], []
            streamed = plan.but(stream=True, stop=stop)
            async for item in subject.engine.generate(subject.prompt(), streamed):
                pieces.append(item.text) if isinstance(item, Delta) else samples.append(item)
            assert "".join(pieces) == samples[0].text
            assert len(pieces) > 1
            if not stop:
                assert self.same(samples, [whole])

    async def test_log_probabilities(self, subject: Subject):
        for sample in await collect(subject.engine, subject.prompt(), WARM):
            assert isinstance(sample, Sample)
            assert math.isfinite(sample.mean_logprob)
            assert sample.mean_logprob <= 0

    async def test_idle_work_is_done_too(self, subject: Subject):
        live, idle = await asyncio.gather(
            collect(subject.engine, subject.prompt(), WARM),
            collect(subject.engine, subject.prompt(), WARM, priority=Priority.IDLE),
        )
        assert self.same(live, idle)
