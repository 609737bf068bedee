"""The PyTorch engine on a real model: the conformance suite, and what only this engine promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.core.types import Prompt
from service.engine.base import Engine, Priority, collect
from service.engine.embeddings import EmbeddingTable
from service.engine.text import ChatText
from service.errors import ConfigError, EngineUnavailable, InvalidRequest, ModelError
from tests.engine.conformance import GREEDY, WARM, Conformance, Subject, until

local = pytest.importorskip("service.engine.local", exc_type=ImportError)  # before PyTorch: it sets up OpenMP
import torch  # noqa: E402

LocalEngine = local.LocalEngine

pytestmark = pytest.mark.model


def opened(folder: Path, **options) -> Any:
    return asyncio.run(LocalEngine.open(folder, model_id="small", context=1_024, **options))


def subject_of(engine: Any, folder: Path) -> Subject:
    rows = EmbeddingTable.open(folder).rows
    return Subject(engine, engine, ChatText.open(folder), rows, lambda: engine.stats.running)


@pytest.fixture(scope="module")
def subject(small_model_folder: Path) -> Iterator[Subject]:
    """Quantised where the machine can: what is served."""
    engine = opened(small_model_folder)
    yield subject_of(engine, small_model_folder)
    asyncio.run(engine.aclose())


@pytest.fixture(scope="module")
def precise(small_model_folder: Path) -> Iterator[Subject]:
    """Float32."""
    engine = opened(small_model_folder, quantize=False, device="cpu")
    yield subject_of(engine, small_model_folder)
    asyncio.run(engine.aclose())


class TestLocal(Conformance):
    pass


def test_it_is_an_engine(subject: Subject):
    assert isinstance(subject.engine, Engine)
    assert subject.engine.model.hidden_size == 576
    assert subject.engine.model.context == 1_024


async def test_float32_greedy_is_what_transformers_generates(precise: Subject, small_model_folder: Path):
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(small_model_folder, dtype=torch.float32)
    for question in ("What is 17 + 25?", "Name three colours.", "Write a haiku about rain."):
        prompt = precise.prompt(question)
        ids = torch.tensor([prompt.token_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        theirs = tuple(whole[0, ids.shape[1] :].tolist())
        ours = (await collect(precise.engine, prompt, GREEDY))[0].token_ids
        assert ours == theirs[: len(ours)]
        assert len(theirs) - len(ours) <= 1  # the end-of-sequence token


async def test_float32_zero_offset_is_the_plain_prompt(precise: Subject):
    plain = precise.prompt()
    zero = replace(plain, soft=precise.anchored(plain) + np.float32(0))
    assert await collect(precise.engine, plain, GREEDY) == await collect(precise.engine, zero, GREEDY)


@pytest.mark.parametrize("name", ["subject", "precise"])
async def test_a_row_does_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest):
    given: Subject = request.getfixturevalue(name)
    plan = WARM.but(max_samples=1, in_flight=1, max_tokens=32)
    prompts = [given.prompt(f"What is {i} times {i + 3}, and why?" * (1 + i % 3)) for i in range(8)]
    alone = [await collect(given.engine, p, plan.but(seed=i)) for i, p in enumerate(prompts)]
    batch = await asyncio.gather(*(collect(given.engine, p, plan.but(seed=i)) for i, p in enumerate(prompts)))
    ids = [[s[0].token_ids for s in run] for run in (alone, batch)]
    assert ids[0] == ids[1]
    if given is request.getfixturevalue("subject"):  # integer products: not merely the same tokens
        assert alone == batch


async def test_the_context_ends_a_completion(subject: Subject):
    prompt = subject.prompt("word " * 900)
    room = 1_024 - len(prompt.token_ids)
    assert 0 < room < 200
    sample = (await collect(subject.engine, prompt, GREEDY.but(max_tokens=5_000)))[0]
    assert sample.finish_reason == "stop" or len(sample.token_ids) == room
    with pytest.raises(InvalidRequest):
        await collect(subject.engine, Prompt(prompt.token_ids * 2), GREEDY)


async def test_live_calls_go_first(subject: Subject):
    order: list[str] = []

    async def call(name: str, count: int, priority: Priority) -> None:
        plan = WARM.but(max_samples=count, in_flight=count, max_tokens=8)
        await collect(subject.engine, subject.prompt(f"Who is {name}?"), plan, priority=priority)
        order.append(name)

    running = [asyncio.create_task(call("filler", 16, Priority.LIVE))]
    await until(lambda: subject.running() == 16)
    running.append(asyncio.create_task(call("idle", 16, Priority.IDLE)))
    await until(lambda: subject.engine.stats.waiting == 16)  # type: ignore[attr-defined]
    running.append(asyncio.create_task(call("live", 16, Priority.LIVE)))
    await asyncio.gather(*running)
    assert order == ["filler", "live", "idle"]


async def test_unusable_folders_and_options(small_model_folder: Path, tmp_path: Path):
    with pytest.raises(ModelError):
        await LocalEngine.open(tmp_path, model_id="none")
    with pytest.raises(ConfigError):
        await LocalEngine.open(small_model_folder, model_id="small", device="cuda:0", quantize=True)


async def test_closing_and_dying(small_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    engine = await LocalEngine.open(small_model_folder, model_id="small")
    subject = subject_of(engine, small_model_folder)
    task = asyncio.create_task(collect(engine, subject.prompt(), WARM.but(max_tokens=400)))
    await until(lambda: engine.stats.running > 0)
    await engine.aclose()
    for call in (task, collect(engine, subject.prompt(), GREEDY), engine.health()):
        with pytest.raises(EngineUnavailable, match="closed"):
            await call
    assert engine.stats.running == 0

    engine = await LocalEngine.open(small_model_folder, model_id="small")
    task = asyncio.create_task(collect(engine, subject.prompt(), WARM.but(max_tokens=400)))
    await until(lambda: engine.stats.running > 0)
    monkeypatch.setattr(engine._loop._model, "decode", lambda *_: 1 / 0)
    for call in (task, collect(engine, subject.prompt(), GREEDY), engine.health()):
        with pytest.raises(EngineUnavailable, match="ZeroDivisionError"):
            await call
    await engine.aclose()


async def test_a_prompt_that_cannot_be_read_fails_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    model = subject.engine._loop._model  # type: ignore[attr-defined]
    read = model.prefill

    def fails_once(*args):
        monkeypatch.setattr(model, "prefill", read)
        raise MemoryError("no room")

    before = await collect(subject.engine, subject.prompt(), GREEDY)
    monkeypatch.setattr(model, "prefill", fails_once)
    with pytest.raises(EngineUnavailable, match="no room"):
        await collect(subject.engine, subject.prompt(), GREEDY)
    assert await collect(subject.engine, subject.prompt(), GREEDY) == before
