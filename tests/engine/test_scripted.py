"""The shipped fake: the conformance suite, and what only it can do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.core.prompt import compose
from service.core.types import Sampling
from service.engine.base import Engine, collect
from service.engine.scripted import Cue, ScriptedEngine, babble
from service.errors import EngineUnavailable
from tests.engine.conformance import GREEDY, WARM, Conformance, Subject, until


@pytest.fixture
async def subject() -> AsyncIterator[Subject]:
    engine, slow = ScriptedEngine(babble, context=2_000), ScriptedEngine(babble, latency=0.02, context=2_000)
    yield Subject(engine, slow, engine.chat, engine.rows, lambda: slow.stats.running)
    await engine.aclose()
    await slow.aclose()


class TestScripted(Conformance):
    pass


def ask(engine: ScriptedEngine, question: str = "What is 6 times 7?"):
    return compose(engine.chat, [{"role": "user", "content": question}], "Solve it.")


async def test_it_says_what_it_is_told():
    engine = ScriptedEngine()
    assert isinstance(engine, Engine)
    samples = await collect(engine, ask(engine), Sampling(max_samples=3))
    assert [s.text for s in samples] == ["The answer is 42."] * 3
    assert engine.stats.running == 0
    assert engine.stats.tokens == 3 * len("The answer is 42.")


async def test_a_script_sees_prompt_index_and_seed():
    def script(cue: Cue) -> str:
        assert cue.text.startswith("<|im_start|>system\nSolve it.<|im_end|>\n<|im_start|>user\nWhat is 6 times 7?")
        return f"{cue.index} {cue.seed} {cue.soft}"

    engine = ScriptedEngine(script)
    texts = [s.text for s in await collect(engine, ask(engine), Sampling(max_samples=3, seed=5))]
    assert len(set(texts)) == 3
    assert texts[2].startswith("2 ")


async def test_a_message_cannot_hold_control_tokens():
    engine = ScriptedEngine()
    assert engine.chat.mask("a\udc01b") == "a?b"


@pytest.mark.parametrize("latency", [0.0, 0.001])
async def test_injected_failure(latency: float):
    def script(cue: Cue) -> str:
        if cue.index == 1:
            raise EngineUnavailable("injected")
        return "fine"

    engine = ScriptedEngine(script, latency=latency)
    stream = engine.generate(ask(engine), Sampling(max_samples=3, in_flight=1))
    assert await anext(stream)
    with pytest.raises(EngineUnavailable, match="injected"):
        await anext(stream)
    assert engine.stats.running == 0


async def test_a_hanging_script_ends_with_the_engine():
    async def script(cue: Cue) -> str:
        await asyncio.Event().wait()
        return ""

    engine = ScriptedEngine(script)
    task = asyncio.create_task(collect(engine, ask(engine), WARM))
    await until(lambda: engine.stats.running == 4)
    await engine.aclose()
    with pytest.raises(EngineUnavailable, match="closed"):
        await task
    with pytest.raises(EngineUnavailable):
        await collect(engine, ask(engine), GREEDY)
    with pytest.raises(EngineUnavailable):
        await engine.health()
    await until(lambda: engine.stats.running == 0)
