"""Which server gets a request, and what happens when it fails: real sockets, servers that misbehave on command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service.core.prompt import compose
from service.core.types import Delta, Prompt, Sampling
from service.engine.base import Priority, collect
from service.engine.embeddings import EmbeddingTable
from service.engine.text import ChatText
from service.engine.upstreams import Standing
from service.engine.vllm_server import VllmServerEngine
from service.errors import ConfigError, DeadlineExceeded, EngineUnavailable, ModelError, PromptTooLong
from tests.engine.conformance import until
from tests.engine.peer import Peer
from tests.tiny import tiny_folder

ANCHOR = "Solve the problem step by step."
ONE = Sampling(min_samples=1, max_samples=1, in_flight=1, temperature=0, top_p=1.0, max_tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def chat(folder: Path) -> ChatText:
    return ChatText.open(folder)


@pytest.fixture
def prompt(chat: ChatText) -> Prompt:
    return compose(chat, [{"role": "user", "content": "How many apples?"}], ANCHOR)


class Pool:
    """Engines and peers that end with the test."""

    def __init__(self, stack: AsyncExitStack, folder: Path, chat: ChatText) -> None:
        self.stack, self.folder, self.chat = stack, folder, chat

    async def peer(self) -> Peer:
        return await self.stack.enter_async_context(Peer(self.chat, 16).listening())

    async def engine(self, *peers: Peer, **options: Any) -> VllmServerEngine:
        urls = [p.url for p in peers]
        options = {"interval": 0.05, "probe_interval": 0.1, "read": 1.0, **options}
        engine = await VllmServerEngine.open(self.folder, model_id="tiny", urls=urls, **options)
        self.stack.push_async_callback(engine.aclose)
        for peer in peers:
            peer.seen.clear()
            peer.paths.clear()
            peer.most = 0
        return engine


@pytest_asyncio.fixture
async def pool(folder: Path, chat: ChatText) -> AsyncIterator[Pool]:
    async with AsyncExitStack() as stack:
        yield Pool(stack, folder, chat)


QUIET: dict[str, Any] = {"interval": 60.0, "probe_interval": 60.0}  # nothing but the test's own requests


async def test_a_sample_is_read_from_the_stream(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    (sample,) = await collect(engine, prompt, ONE)
    assert sample.text == peer.text
    assert sample.token_ids == tuple(pool.chat.encode(peer.text)), "without the end-of-sequence token"
    assert (sample.finish_reason, sample.mean_logprob, sample.raw) == ("stop", -0.5, None)
    (short,) = await collect(engine, prompt, ONE.but(max_tokens=2))
    assert (len(short.token_ids), short.finish_reason) == (2, "length")
    assert engine.stats.tokens == len(sample.token_ids) + 2
    assert engine.stats.running == 0


async def test_each_sample_is_a_request_with_its_own_seed(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    samples = await collect(engine, prompt, ONE.but(max_samples=5, in_flight=2, seed=3))
    assert [s.index for s in samples] == [0, 1, 2, 3, 4]
    assert len({body["seed"] for body in peer.seen}) == 5
    assert peer.most <= 2


async def test_the_least_busy_server_gets_the_request(pool: Pool, prompt: Prompt):
    one, other = await pool.peer(), await pool.peer()
    engine = await pool.engine(one, other, **QUIET)
    one.mode = other.mode = "slow"
    task = asyncio.create_task(collect(engine, prompt, ONE.but(max_samples=6, in_flight=6)))
    await until(lambda: one.running + other.running == 6)
    assert (one.running, other.running) == (3, 3)
    one.release.set()
    other.release.set()
    assert len(await task) == 6


@pytest.mark.parametrize("mode", ["drop", "500", "error event"])
async def test_another_server_is_tried_before_the_first_token(pool: Pool, prompt: Prompt, mode: str):
    one, other = await pool.peer(), await pool.peer()
    engine = await pool.engine(one, other, **QUIET)
    one.mode = mode
    for _ in range(4):
        assert (await collect(engine, prompt, ONE))[0].text == other.text
    assert len(other.seen) == 4
    assert engine.failures[one.url] == engine.retries > 0


async def test_the_same_server_is_tried_again_when_it_is_the_only_one(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    peer.mode = "drop once"
    assert await collect(engine, prompt, ONE)
    assert len(peer.seen) == 2
    peer.mode = "500"
    with pytest.raises(EngineUnavailable, match="500: CUDA error"):
        await collect(engine, prompt, ONE)
    assert len(peer.seen) == 4, "once more, not for ever"


async def test_nothing_is_tried_again_after_the_first_token(pool: Pool, prompt: Prompt):
    one, other = await pool.peer(), await pool.peer()
    engine = await pool.engine(one, other, **QUIET)
    one.mode = other.mode = "cut"
    pieces = []
    with pytest.raises(EngineUnavailable):
        async for item in engine.generate(prompt, ONE.but(stream=True)):
            assert isinstance(item, Delta)
            pieces.append(item.text)
    assert len(pieces) == 1
    assert len(one.seen) + len(other.seen) == 1


async def test_a_silent_server_is_given_up(pool: Pool, prompt: Prompt):
    one, other = await pool.peer(), await pool.peer()
    engine = await pool.engine(one, other, **{**QUIET, "read": 0.2})
    one.mode = other.mode = "hang"
    with pytest.raises(EngineUnavailable, match="nothing came"):
        await collect(engine, prompt, ONE)
    assert len(one.seen) + len(other.seen) == 1, "a second wait would be no quick retry"


async def test_the_deadline_ends_the_wait_and_the_work(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET, read=60.0)
    for mode in ("hang", "stall"):
        peer.mode, peer.gone = mode, 0
        with pytest.raises(DeadlineExceeded):
            await collect(engine, prompt, ONE.but(max_samples=3, in_flight=3), deadline=time.monotonic() + 0.2)
        await until(lambda: peer.gone == 3)


async def test_closing_the_iterator_closes_the_connections(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET, read=60.0)
    peer.mode = "stall"
    async with aclosing(engine.generate(prompt, ONE.but(max_samples=4, in_flight=4, stream=True))) as stream:
        await anext(stream)
        await until(lambda: peer.running == 4)
    await until(lambda: peer.gone == 4)
    assert engine.stats.running == 0
    assert engine.upstreams[0].outstanding == 0


async def test_a_dead_server_leaves_at_once_and_comes_back_by_itself(folder: Path, chat: ChatText, prompt: Prompt):
    peer = Peer(chat, 16)
    async with AsyncExitStack() as stack:
        pool = Pool(stack, folder, chat)
        async with peer.listening():
            engine = await pool.engine(peer)
            await collect(engine, prompt, ONE)
        began = time.monotonic()
        with pytest.raises(EngineUnavailable) as caught:
            await collect(engine, prompt, ONE, deadline=time.monotonic() + 20)
        assert time.monotonic() - began < 20
        assert (caught.value.status, caught.value.retry_after) == (503, 1.0)
        with pytest.raises(EngineUnavailable, match=f"{peer.url} is down"):
            await engine.health()
        async with peer.listening():
            await until(lambda: engine.upstreams[0].serving)
            await engine.health()
            assert await collect(engine, prompt, ONE)


async def test_a_server_that_is_down_at_start_joins_when_it_comes(folder: Path, chat: ChatText, prompt: Prompt):
    peer = Peer(chat, 16)
    async with peer.listening():
        pass  # now it has a port that nobody listens at
    async with AsyncExitStack() as stack:
        engine = await Pool(stack, folder, chat).engine(peer)
        with pytest.raises(EngineUnavailable, match="is down"):
            await engine.health()
        assert engine.rotation == {peer.url: 0.0}
        async with peer.listening():
            await until(lambda: engine.upstreams[0].serving)
            assert engine.model.context == 512
            assert await collect(engine, prompt, ONE)


async def test_an_unhealthy_server_gets_no_requests(pool: Pool, prompt: Prompt):
    one, other = await pool.peer(), await pool.peer()
    engine = await pool.engine(one, other)
    one.health = 503
    await until(lambda: not engine.upstreams[0].serving)
    assert "/health answers 503" in engine.upstreams[0].reason
    await engine.health()
    one.seen.clear()
    await collect(engine, prompt, ONE.but(max_samples=4, in_flight=4))
    assert one.seen == []
    one.health = 200
    await until(lambda: engine.upstreams[0].serving)


async def test_a_poisoned_server_leaves_and_comes_back_when_it_makes_sense_again(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer)
    peer.mode = "poisoned"
    await until(lambda: engine.upstreams[0].standing is Standing.POISONED)
    assert engine.probe_failures[peer.url] >= 1
    with pytest.raises(EngineUnavailable, match=r"poisoned.*empty text"):
        await engine.health()
    peer.mode = "well"
    await until(lambda: engine.upstreams[0].serving)
    peer.text = "another continuation"
    await until(lambda: engine.upstreams[0].standing is Standing.POISONED)
    assert "continued with tokens" in engine.upstreams[0].reason


async def test_an_empty_answer_has_the_server_probed_at_once(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    peer.mode = "poisoned"
    assert (await collect(engine, prompt, ONE))[0].text == ""
    await until(lambda: engine.upstreams[0].standing is Standing.POISONED)


async def test_output_that_is_not_finite_is_never_passed_on(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    peer.mode = "nan"
    with pytest.raises(EngineUnavailable, match="not finite"):
        await collect(engine, prompt, ONE)
    await until(lambda: not engine.upstreams[0].serving)


async def test_a_refused_request_is_the_callers_fault(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    peer.mode = "too long"
    with pytest.raises(PromptTooLong, match="maximum context length") as caught:
        await collect(engine, prompt, ONE)
    assert caught.value.param == "messages"
    assert len(peer.seen) == 1
    await engine.health()
    with pytest.raises(PromptTooLong, match="512"):
        await collect(engine, replace(prompt, token_ids=(5,) * 512), ONE)


async def test_priorities_are_sent_where_they_are_taken(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET)
    await collect(engine, prompt, ONE)
    await collect(engine, prompt, ONE, priority=Priority.IDLE)
    assert [body.get("priority") for body in peer.seen] == [None, 1]
    peer.priorities = False
    peer.seen.clear()
    for _ in range(2):
        assert await collect(engine, prompt, ONE, priority=Priority.IDLE)
    assert [body.get("priority") for body in peer.seen] == [1, None, None]


# --- who may join ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.25.4", "0.34.0", "1.0.0"])
async def test_other_versions_are_refused(pool: Pool, version: str):
    peer = await pool.peer()
    peer.version = version
    with pytest.raises(ModelError, match=rf"{peer.url}.*vLLM {version}.*0\.26 to 0\.33"):
        await pool.engine(peer)


@pytest.mark.parametrize("version", ["0.26.0", "0.33.1.dev3+cpu"])
async def test_supported_versions_are_taken(pool: Pool, version: str):
    peer = await pool.peer()
    peer.version = version
    await (await pool.engine(peer)).health()


async def test_a_key_is_asked_for_and_used(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    peer.key = "sesame"
    with pytest.raises(ConfigError, match="DETOT_UPSTREAM__API_KEY"):
        await pool.engine(peer)
    assert await collect(await pool.engine(peer, key="sesame"), prompt, ONE)


async def test_one_misfit_among_several_is_an_error_at_start(pool: Pool):
    good, bad = await pool.peer(), await pool.peer()
    bad.version = "0.9.0"
    with pytest.raises(ModelError, match=bad.url):
        await pool.engine(good, bad)


async def test_a_poisoned_server_at_start_is_not_fatal(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    peer.mode = "poisoned"
    engine = await pool.engine(peer)
    with pytest.raises(EngineUnavailable, match="poisoned"):
        await collect(engine, prompt, ONE)
    peer.mode = "well"
    await until(lambda: engine.upstreams[0].serving)


async def test_something_else_that_speaks_http(pool: Pool):
    peer = await pool.peer()
    peer.version = None  # type: ignore[assignment]
    with pytest.raises(ModelError, match="no vLLM server"):
        await pool.engine(peer)


@pytest.mark.parametrize("joint", ["\n", "", None])
async def test_the_form_of_an_offset_follows_the_servers_template(pool: Pool, folder: Path, joint: str | None):
    """Where it makes other tokens than we do, every token goes as an embedding, and nobody waits for that twice."""
    peer = await pool.peer()
    peer.joint = joint
    engine = await pool.engine(peer, **QUIET)
    assert engine.upstreams[0].joint == joint
    rows = EmbeddingTable.open(folder).rows
    for own in ("", "Be brief."):
        turns = [{"role": "system", "content": own}] if own else []
        plain = compose(pool.chat, [*turns, {"role": "user", "content": "How many apples?"}], ANCHOR)
        soft = replace(plain, soft=rows(plain.token_ids[slice(*plain.span)]) * np.float32(1.5))
        assert (await collect(engine, soft, ONE))[0].text == peer.text
    part, rest = "/v1/chat/completions", "/v1/completions"
    assert peer.paths == [part, rest if joint is None else part]


async def test_calls_after_closing_are_refused(pool: Pool, prompt: Prompt):
    peer = await pool.peer()
    engine = await pool.engine(peer, **QUIET, read=60.0)
    peer.mode = "stall"
    task = asyncio.create_task(collect(engine, prompt, ONE))
    await until(lambda: peer.running == 1)
    await engine.aclose()
    for call in (task, collect(engine, prompt, ONE), engine.health()):
        with pytest.raises(EngineUnavailable):
            await call
