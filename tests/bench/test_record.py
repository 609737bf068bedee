"""Recording pools through the scripted engine: complete, repeatable, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.bench.record import record_pool
from service.bench.replay import read_pool, replay
from service.core.types import AnswerSpec, AnswerType, Prompt, Sampling
from service.engine.scripted import Cue, ScriptedEngine
from service.errors import EngineUnavailable, InvalidRequest
from service.serve.symbolic import SymbolicPool

NUMBER = AnswerSpec(AnswerType.NUMBER)
PLAN = Sampling(min_samples=3, max_samples=16, in_flight=4, seed=5)
QUESTIONS = [
    {"id": f"q{i}", "task": "math", "question": f"What is {i} plus {i}?", "answer": f"{2 * i}.0"} for i in range(5)
]


def say(cue: Cue) -> str:
    """Right for two seeds of three, unparseable now and then."""
    number = int(cue.text.split()[2])
    return ("I am lost.", f"The answer is {number}.")[cue.seed % 5 > 0] if cue.seed % 3 == 0 else f"So = {2 * number}"


async def record(path: Path, engine: ScriptedEngine | None = None, questions: Any = QUESTIONS, **kw: Any) -> dict:
    chosen = engine or ScriptedEngine(say)

    def prompt(question: Any) -> Prompt:
        return Prompt(tuple(chosen.chat.encode(question["question"])))

    return await record_pool(chosen, questions, prompt, lambda _: NUMBER, PLAN, path, **kw)


async def test_a_pool_holds_every_sample_in_order(tmp_path: Path):
    path = tmp_path / "new" / "pool.jsonl"
    seen: list[tuple[int, int]] = []
    result = await record(path, concurrency=2, progress=lambda done, all_: seen.append((done, all_)))
    assert result == {"questions": 5, "recorded": 5, "skipped": 0}
    assert seen == [(n, 5) for n in range(6)]
    pool = read_pool(path)
    assert sorted(q.id for q in pool) == [q["id"] for q in QUESTIONS]
    assert all(len(q.samples) == 16 for q in pool)
    third = next(q for q in pool if q.id == "q3")
    assert third.gold_key == "6"
    assert {s.key for s in third.samples} == {"6", "3", None}
    assert all(s.correct == (s.key == "6") for s in third.samples)
    assert all(s.tokens > 0 for s in third.samples)
    assert "plus" not in path.read_text(), "questions are not copied"
    assert replay(pool, PLAN, orders=5)["questions"] == 5


async def test_a_recording_is_repeatable_whatever_the_concurrency(tmp_path: Path):
    files = []
    for concurrency in (1, 4):
        files.append(tmp_path / f"{concurrency}.jsonl")
        await record(files[-1], ScriptedEngine(say, latency=0.001), concurrency=concurrency)
    assert sorted(files[0].read_text().splitlines()) == sorted(files[1].read_text().splitlines())


async def test_an_interrupted_recording_goes_on(tmp_path: Path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "pool.jsonl"
    await record(whole)
    lines = whole.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1] + lines[2][:100])
    engine = ScriptedEngine(say)
    assert await record(path, engine) == {"questions": 5, "recorded": 3, "skipped": 2}
    assert path.read_text() == whole.read_text()
    assert await record(path) == {"questions": 5, "recorded": 0, "skipped": 5}
    assert path.read_text() == whole.read_text()


async def test_what_was_recorded_before_a_failure_stays(tmp_path: Path):
    path = tmp_path / "pool.jsonl"
    asked = 0

    def die(cue: Cue) -> str:
        nonlocal asked
        asked += 1
        if asked > 40:
            raise EngineUnavailable("gone")
        return say(cue)

    with pytest.raises(EngineUnavailable, match="gone"):
        await record(path, ScriptedEngine(die))
    assert [q.id for q in read_pool(path)] == ["q0", "q1"]


async def test_cut_off_samples_do_not_vote_with_a_passing_number(tmp_path: Path):
    """The scripted engine cuts a text at max_tokens bytes, as a model would."""
    path = tmp_path / "pool.jsonl"
    engine = ScriptedEngine("She has 3 + 4 = 7 pears and " + "so on " * 100)
    await record(path, engine)
    assert {s.key for q in read_pool(path) for s in q.samples} == {None}


async def test_symbolic_answers_get_the_pools_keys(tmp_path: Path):
    path = tmp_path / "pool.jsonl"
    questions = [{"id": "s", "question": "What?", "answer": "1024"}]
    symbolic = SymbolicPool()
    await record(path, ScriptedEngine("The answer is 2^10."), questions, canonical=symbolic.canonical)
    await symbolic.aclose()
    assert all(s.correct for s in read_pool(path)[0].samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q | {"answer": "a lot"}, "question q0: gold answer 'a lot' is no number"),
        (lambda q: {k: v for k, v in q.items() if k != "question"}, "question q0: field question is missing"),
        (lambda q: {k: v for k, v in q.items() if k != "id"}, "field id is missing"),
    ],
)
async def test_bad_questions_are_named_before_anything_is_asked(tmp_path: Path, change: Callable, message: str):
    engine = ScriptedEngine(say)
    with pytest.raises(InvalidRequest, match=message):
        await record(tmp_path / "pool.jsonl", engine, [change(QUESTIONS[0])])
    assert engine.stats.prefill_tokens == 0


async def test_bad_bounds_and_files_are_named(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="concurrency is 0"):
        await record(tmp_path / "pool.jsonl", concurrency=0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps([1]) + "\n")
    with pytest.raises(InvalidRequest, match=r"bad\.jsonl"):
        await record(bad)
