"""vLLM in this process: the conformance suite, what only this engine promises, and its known traps by issue number."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service.core.prompt import compose
from service.core.types import Prompt, Sample, Sampling
from service.engine.base import Engine, Priority, collect
from service.engine.embeddings import EmbeddingTable
from service.engine.text import ChatText
from service.errors import ConfigError, EngineUnavailable, InvalidRequest, ModelError
from tests.engine.conformance import ANCHOR, GREEDY, WARM, Conformance, Subject, alike, until
from tests.tiny import tiny_folder

pytest.importorskip("vllm", reason="vLLM is not installed here; `make conformance` runs these tests")
import torch
from vllm.v1.metrics.reader import get_metrics_snapshot  # pyright: ignore[reportMissingImports]

from service.engine.vllm import VllmEngine
from service.engine.vllm_core import Options, engine_prompt, mixed, sampling_params
from service.engine.vllm_versions import check_version

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

BLOCK = 128  # tokens of a prefix-cache block on CPU
SMALL = Options(context=1_024, dtype="float32", max_num_seqs=64, kv_cache_gib=1.0, enforce_eager=True)
TINY = Options(context=256, dtype="float32", max_num_seqs=200, kv_cache_gib=1 / 16, enforce_eager=True)


def subject_of(engine: VllmEngine, folder: Path) -> Subject:
    return Subject(
        engine, engine, ChatText.open(folder), EmbeddingTable.open(folder).rows, lambda: engine.stats.running
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(small_model_folder: Path) -> AsyncIterator[Subject]:
    engine = await VllmEngine.open(small_model_folder, model_id="small", options=SMALL)
    yield subject_of(engine, small_model_folder)
    await engine.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    """A Llama of a few kilobytes, with random weights: quick, and as easily poisoned as any other."""
    folder = tiny_llama(tmp_path_factory.mktemp("tiny") / "model")
    engine = await VllmEngine.open(folder, model_id="tiny", options=TINY, probe_interval=1.0)
    yield subject_of(engine, folder)
    await engine.aclose()


def tiny_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_folder(folder, hidden_size=64)
    config = json.loads((folder / "config.json").read_bytes())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=2,
            initializer_range=0.5,
        )
    )
    with torch.no_grad():  # one dimension stays constant and keeps special tokens from being drawn: samples run on
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0  # type: ignore[index,attr-defined,union-attr]
            layer.mlp.down_proj.weight[0] = 0  # type: ignore[index,attr-defined,union-attr]
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[:3, 0] = -400.0
    model.save_pretrained(folder)
    # #57719: penalties crash the engine when embeddings come along, and models ask for them here
    generation = {"eos_token_id": [2, 0], "repetition_penalty": 1.3, "presence_penalty": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def figure(name: str) -> float:
    """Sum of one of vLLM's own metrics."""
    return sum(m.value for m in get_metrics_snapshot() if m.name == f"vllm:{name}")  # type: ignore[attr-defined]


def engine_of(subject: Subject) -> Any:
    return subject.engine


class TestVllm(Conformance):
    def same(self, one: list[Sample], other: list[Sample]) -> bool:
        return alike(one, other)


async def test_it_is_an_engine(subject: Subject):
    assert isinstance(subject.engine, Engine)
    assert subject.engine.model.hidden_size == 576
    assert subject.engine.model.context == 1_024


# --- what is shared, and what is not ------------------------------------------------------------------------------


def long_prompt(subject: Subject, soft: Prompt | None = None, words: int = 300) -> Prompt:
    """More than two blocks; the anchor stands in the first one."""
    question = " ".join(f"Item {i} costs {i % 7} dollars." for i in range(words // 8)) + " What do the first two cost?"
    prompt = compose(subject.chat, [{"role": "user", "content": question}], ANCHOR)
    assert len(prompt.token_ids) > 2 * BLOCK + 1
    return prompt if soft is None else replace(prompt, soft=soft.soft)


@pytest.mark.parametrize("offset", [None, 5])
async def test_the_samples_of_a_request_share_one_prefill(subject: Subject, offset: int | None):
    await engine_of(subject)._llm.reset_prefix_cache()
    prompt = long_prompt(subject, None if offset is None else subject.shifted(offset))
    before = figure("prefix_cache_hits"), figure("prefix_cache_queries")
    await collect(subject.engine, prompt, WARM.but(max_samples=8, in_flight=8, max_tokens=4))
    cached = (len(prompt.token_ids) - 1) // BLOCK * BLOCK
    assert figure("prefix_cache_queries") - before[1] == 8 * len(prompt.token_ids)
    assert figure("prefix_cache_hits") - before[0] == 7 * cached


async def test_offsets_never_mix_although_the_prefix_cache_is_hit(subject: Subject):
    plan = GREEDY.but(max_tokens=8)
    prompts = [long_prompt(subject), *(long_prompt(subject, subject.shifted(i, norm=2)) for i in (1, 2))]
    alone = [await collect(subject.engine, p, plan) for p in prompts]
    assert not any(alike(alone[i], alone[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    hits, places = figure("prefix_cache_hits"), asyncio.Semaphore(16)

    async def ask(which: int) -> None:
        async with places:
            assert alike(await collect(subject.engine, prompts[which], plan), alone[which])

    turns = [i % 3 for i in range(100)]
    random.Random(0).shuffle(turns)
    await asyncio.gather(*(ask(which) for which in turns))
    assert figure("prefix_cache_hits") - hits >= 100 * 2 * BLOCK


async def test_the_mask_is_part_of_the_prefix_cache_key_issue_56655(subject: Subject):
    """Same ids, same embeddings, other places: vLLM's key alone cannot tell them apart."""
    ids = list(long_prompt(subject).token_ids)
    ids[3] = ids[7] = 0
    zero = np.zeros((1, subject.engine.model.hidden_size), np.float32)
    one, other = (Prompt(tuple(ids), (at, at + 1), zero) for at in (3, 7))
    plan = GREEDY.but(max_tokens=1)
    alone = []
    for prompt in (one, other):
        await engine_of(subject)._llm.reset_prefix_cache()
        alone.append(await collect(subject.engine, prompt, plan))
    assert alone[0] != alone[1]
    hits = figure("prefix_cache_hits")
    assert await collect(subject.engine, one, plan) == alone[0]  # `other` is cached, and of no use
    assert figure("prefix_cache_hits") == hits
    assert await collect(subject.engine, one, plan) == alone[0]
    assert figure("prefix_cache_hits") == hits + len(ids) // BLOCK * BLOCK


async def test_ignored_rows_differ_from_every_embedded_row_issue_56655():
    soft = np.array([[0.0, -0.0], [-1e-30, 1.0]], np.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        signs = torch.signbit(mixed([5, 6, 7, 8], (1, 3), soft, dtype)["prompt_embeds"])
        assert signs[[0, 3]].all()
        assert not signs[1].any()
    assert mixed([5, 6, 7, 8], (1, 3), soft, torch.float32)["prompt_is_token_ids"] == [True, False, False, True]


async def test_the_plain_prompt_is_sent_as_token_ids_only(subject: Subject):
    assert engine_prompt(subject.prompt(), torch.float32) == {"prompt_token_ids": list(subject.prompt().token_ids)}


# --- agreement ------------------------------------------------------------------------------------------------------


async def test_it_agrees_with_the_local_engine(subject: Subject, small_model_folder: Path):
    from service.engine.local import LocalEngine

    local = await LocalEngine.open(small_model_folder, model_id="small", quantize=False, device="cpu", context=1_024)
    soft, plan = subject.shifted(3, norm=0.5).soft, GREEDY
    prompts = [replace(subject.prompt(f"What is {3 * i + 4} times {i + 2}, minus {i}?"), soft=soft) for i in range(20)]

    async def ask(engine: Engine, tokens: int) -> list[Sample]:
        runs = await asyncio.gather(*(collect(engine, prompt, plan.but(max_tokens=tokens)) for prompt in prompts))
        return [samples[0] for samples in runs]

    ours, theirs = await ask(subject.engine, 32), await ask(local, 32)
    first, second = await ask(subject.engine, 1), await ask(local, 1)
    await local.aclose()
    same = sum(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True))
    gaps = [abs(a.mean_logprob - b.mean_logprob) for a, b in zip(first, second, strict=True)]
    print(f"same {same} of {len(prompts)}, first log-probability differs by {statistics.mean(gaps):.2e}")
    assert same >= 18
    assert statistics.mean(gaps) < 1e-3


# --- load -----------------------------------------------------------------------------------------------------------


async def test_live_calls_go_first(tiny: Subject):
    order: list[str] = []

    async def call(name: str, count: int, tokens: int, priority: Priority) -> None:
        plan = WARM.but(max_samples=count, in_flight=count, max_tokens=tokens)
        await collect(tiny.engine, tiny.prompt(f"Who is {name}?"), plan, priority=priority)
        order.append(name)

    stats = lambda: engine_of(tiny).stats  # noqa: E731
    running = [asyncio.create_task(call("filler", 200, 100, Priority.LIVE))]
    await until(lambda: stats().running == 200, within=120)
    running.append(asyncio.create_task(call("idle", 200, 8, Priority.IDLE)))
    await until(lambda: stats().waiting >= 100, within=120)
    running.append(asyncio.create_task(call("live", 200, 8, Priority.LIVE)))
    await asyncio.gather(*running)
    assert order.index("live") < order.index("idle")


async def test_cancelling_100_of_200_running_requests_frees_their_work(tiny: Subject):
    plan = WARM.but(max_samples=1, in_flight=1, max_tokens=120)
    tasks = [
        asyncio.create_task(collect(tiny.engine, tiny.prompt(f"{i}?"), plan.but(seed=i), priority=Priority.IDLE))
        for i in range(200)
    ]
    await until(lambda: figure("num_requests_running") >= 200, within=120)
    for task in tasks[::2]:
        task.cancel()
    await until(lambda: figure("num_requests_running") <= 101)  # a probe may be among them
    assert figure("num_requests_running") > 0
    kept = await asyncio.gather(*tasks[1::2])
    assert [len(samples) for samples in kept] == [1] * 100
    await until(lambda: figure("num_requests_running") == 0)


async def test_no_memory_is_kept_over_2000_requests_with_offsets_issue_57974(tiny: Subject):
    places = asyncio.Semaphore(50)

    async def ask(i: int) -> None:
        async with places:
            await collect(tiny.engine, tiny.shifted(i, norm=0.5), GREEDY.but(max_tokens=2))

    async def ask_all(numbers: range) -> int:
        await asyncio.gather(*(ask(i) for i in numbers))
        return resident_bytes()

    warm = await ask_all(range(500))
    half = await ask_all(range(500, 1_500)) - warm
    grown = await ask_all(range(1_500, 2_500)) - warm
    mib = 2**20
    print(f"resident {warm / mib:.0f} MiB, {half / mib:+.1f} after 1,000 requests, {grown / mib:+.1f} after 2,000")
    assert grown < 32 * 2**20  # what 2,000 prompts' embeddings alone would take is 50 MiB


def resident_bytes() -> int:
    """Of this process and all that descend from it."""
    import multiprocessing
    import os

    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    mine, left = {os.getpid()}, True
    while left:
        left = {pid for pid, parent in parents.items() if parent in mine} - mine
        mine |= left
    assert len(mine) > len(multiprocessing.active_children())
    pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in mine if Path(f"/proc/{pid}").exists()]
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def _parent(process: Path) -> int:
    try:
        return int(process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


# --- poisoned, dead, back again -------------------------------------------------------------------------------------


async def back(engine: VllmEngine) -> None:
    """Wait until the engine is well again."""
    for _ in range(3_000):
        try:
            return await engine.health()
        except EngineUnavailable:
            await asyncio.sleep(0.1)
    pytest.fail("the engine did not come back")


async def gone(engine: VllmEngine, reason: str) -> None:
    """Wait until the engine says that it is unwell."""
    for _ in range(600):
        try:
            await engine.health()
        except EngineUnavailable as e:
            assert reason in e.message
            with pytest.raises(EngineUnavailable):
                await collect(engine, Prompt((65,)), GREEDY)
            return
        await asyncio.sleep(0.1)
    pytest.fail("the engine went on as if nothing were wrong")


def holed(tiny: Subject) -> dict[str, Any]:
    """A prompt of two blocks whose embeddings are NaN."""
    ids = list(tiny.prompt("word " * 30).token_ids)[:200]
    embeds = torch.full((len(ids), tiny.engine.model.hidden_size), math.nan)
    return {"prompt_token_ids": ids, "prompt_embeds": embeds, "prompt_is_token_ids": [False] * len(ids)}


async def poison(tiny: Subject) -> None:
    """NaN past all checks, until it is in every block of keys and values; nobody looks at the answers."""
    bare, prompt = engine_of(tiny)._llm, holed(tiny)
    params = sampling_params(GREEDY, 0, max_tokens=1, eos=())

    async def push(i: int) -> None:
        async for _ in bare.generate(prompt, params, f"poison-{i}"):
            pass

    await asyncio.gather(*(push(i) for i in range(600)), return_exceptions=True)


async def test_a_poisoned_engine_is_noticed_while_idle_and_comes_back(tiny: Subject):
    engine = engine_of(tiny)
    before = await collect(engine, tiny.prompt(), GREEDY)
    restarts, failures = engine.restarts, engine.probe_failures["in-process"]
    await poison(tiny)
    await gone(engine, "")
    await back(engine)
    assert engine.restarts > restarts
    assert engine.probe_failures["in-process"] > failures
    assert alike(await collect(engine, tiny.prompt(), GREEDY), before)


async def test_a_log_probability_that_is_not_finite_is_enough(tiny: Subject, monkeypatch: pytest.MonkeyPatch):
    """Even where the probe would get a clean block: nobody gets the sample, and the model is started again."""
    engine, prompt = engine_of(tiny), holed(tiny)
    restarts = engine.restarts
    monkeypatch.setattr("service.engine.vllm.engine_prompt", lambda *_: prompt)
    with pytest.raises(EngineUnavailable, match="not finite"):
        await collect(engine, tiny.prompt(), GREEDY)
    monkeypatch.undo()
    await gone(engine, "not finite")
    await back(engine)
    assert engine.restarts == restarts + 1
    assert await collect(engine, tiny.prompt(), GREEDY)


async def test_a_dead_engine_is_an_error_of_its_own_and_comes_back(tiny: Subject):
    engine = engine_of(tiny)
    restarts = engine.restarts
    task = asyncio.create_task(collect(engine, tiny.prompt(), WARM.but(max_samples=50, max_tokens=120)))
    await until(lambda: engine.stats.running > 0)
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        process.kill()
    with pytest.raises(EngineUnavailable):
        await task
    await gone(engine, "died")
    await back(engine)
    assert engine.restarts == restarts + 1
    assert await collect(engine, tiny.prompt(), GREEDY)


async def test_a_request_that_is_refused_leaves_the_engine_alone(tiny: Subject):
    restarts = engine_of(tiny).restarts
    with pytest.raises(InvalidRequest):
        await collect(tiny.engine, Prompt((65, 10**6)), GREEDY)
    with pytest.raises(InvalidRequest, match="vLLM refuses"):
        async for _ in engine_of(tiny)._run(Prompt((10**6,)), GREEDY, Priority.LIVE, None):
            pass
    await tiny.engine.health()
    assert engine_of(tiny).restarts == restarts


# --- the guarded path -----------------------------------------------------------------------------------------------


async def test_penalties_are_never_set_issue_57719(tiny: Subject):
    params = sampling_params(WARM, 0, max_tokens=5, eos=(2,))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
    assert not params.logit_bias
    assert not params.bad_words
    assert params.min_tokens == 0
    assert await collect(tiny.engine, tiny.shifted(1), WARM)  # generation_config.json asks for penalties
    await tiny.engine.health()


async def test_prompt_log_probabilities_are_never_asked_for(tiny: Subject):
    assert sampling_params(WARM, 0, max_tokens=5, eos=(2,)).prompt_logprobs is None
    assert engine_of(tiny)._llm.model_config.logprobs_mode == "raw_logprobs"


async def test_nothing_is_on_that_breaks_with_embeddings_issues_51121_and_42119(tiny: Subject):
    config = engine_of(tiny)._llm.vllm_config
    assert config.lora_config is None
    assert config.speculative_config is None
    assert config.kv_transfer_config is None
    assert config.scheduler_config.policy == "priority"
    assert config.cache_config.enable_prefix_caching


async def test_offsets_that_overflow_the_models_type_are_refused():
    prompt = Prompt((5, 6), (0, 1), np.full((1, 4), 1e6, np.float32))
    with pytest.raises(InvalidRequest, match="float16"):
        engine_prompt(prompt, torch.float16)
    assert engine_prompt(prompt, torch.bfloat16)


async def test_log_probabilities_are_those_before_temperature(subject: Subject):
    greedy = (await collect(subject.engine, subject.prompt(), GREEDY.but(max_tokens=1)))[0]
    cold = (await collect(subject.engine, subject.prompt(), GREEDY.but(max_tokens=1, temperature=0.05)))[0]
    assert greedy.token_ids == cold.token_ids
    assert greedy.mean_logprob == pytest.approx(cold.mean_logprob, abs=1e-4)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.0+cpu", "0.33.1", "v0.30.1.dev3"])
async def test_supported_versions(version: str):
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0.0", "dev"])
async def test_other_versions_are_refused_by_name(version: str):
    with pytest.raises(ConfigError, match=version):
        check_version(version)


async def test_what_cannot_be_run_says_why(small_model_folder: Path, tmp_path: Path):
    with pytest.raises(ModelError):
        await VllmEngine.open(tmp_path, model_id="none")
    with pytest.raises(ModelError, match=r"float31|dtype"):
        await VllmEngine.open(small_model_folder, model_id="small", options=replace(SMALL, dtype="float31"))


async def test_the_end_of_sequence_token_is_not_part_of_a_sample(subject: Subject):
    plan = GREEDY.but(max_tokens=200)
    (sample,) = await collect(subject.engine, subject.prompt("Say hello."), plan)
    assert isinstance(sample, Sample)
    assert sample.finish_reason == "stop"
    assert not set(sample.token_ids) & set(subject.chat.eos_ids)  # type: ignore[attr-defined]


async def test_vllms_metrics_stand_beside_ours(tiny: Subject):
    from prometheus_client import generate_latest

    from service import metrics

    with metrics.passed_on("vllm:"):
        assert b"vllm:num_requests_running{" in generate_latest(metrics.REGISTRY)
    assert b"vllm:" not in generate_latest(metrics.REGISTRY)
    plan = Sampling(max_samples=2, in_flight=2, max_tokens=3)
    before = engine_of(tiny).stats
    await collect(tiny.engine, tiny.prompt(), plan)
    assert engine_of(tiny).stats.tokens > before.tokens
    assert engine_of(tiny).stats.steps > before.steps
