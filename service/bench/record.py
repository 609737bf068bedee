"""Records pools of samples from an engine, for `replay`. Interrupted recordings are continued."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from service.core.answers import extract, key_of
from service.core.types import AnswerSpec, Prompt, Sample, Sampling
from service.engine.base import Engine, collect, sample_seed
from service.errors import InvalidRequest

Question = Mapping[str, Any]
Canonical = Callable[[str], Awaitable[str | None]]


async def record_pool(
    engine: Engine,
    questions: Iterable[Question],
    make_prompt: Callable[[Question], Prompt],
    spec: Callable[[Question], AnswerSpec],
    plan: Sampling,
    path: Path,
    *,
    concurrency: int = 1,
    canonical: Canonical | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Draw `plan.max_samples` samples for every question and append them to a pool file, a line a question.

    Each question has its own seed, derived from `plan.seed` and its id, so that a recording is repeatable. Questions
    already in the file are skipped; a last line cut short by an interruption is dropped and asked again.

    Args:
        engine: draws the samples.
        questions: mappings with `id`, `question` and `answer` (gold), and optionally `task`.
        make_prompt: the composed prompt of a question.
        spec: how a question's answer is read.
        plan: sampling; all of `max_samples` are drawn.
        path: pool file, made with its folder if need be.
        concurrency: questions at once.
        canonical: normalises symbolic answers (`SymbolicPool.canonical`).
        progress: told (questions done, questions in all) at the start and after each.

    Returns:
        `questions` in the file of those asked for, `recorded` now, `skipped`.

    Raises:
        InvalidRequest: a gold answer cannot be read as its answer type, a field is missing, or a bound is out of range.
        EngineUnavailable, PromptTooLong: from the engine; what was recorded before stays.
    """
    if concurrency < 1:
        raise InvalidRequest(f"concurrency is {concurrency}; it must be at least 1", param="concurrency")
    wanted = {str(_field(q, "id")): q for q in questions}
    gold = {name: _gold(q, spec(q)) for name, q in wanted.items()}
    done = _recorded(path) & wanted.keys()
    todo = iter([name for name in wanted if name not in done])
    left = len(wanted) - len(done)
    if progress:
        progress(len(done), len(wanted))

    async def work() -> None:
        for name in todo:
            question = wanted[name]
            mine = plan.but(min_samples=plan.max_samples, seed=sample_seed(plan.seed, zlib.crc32(name.encode())))
            samples = await collect(engine, make_prompt(question), mine.but(stream=False))
            rows = [await _row(s, spec(question), str(question["question"]), gold[name], canonical) for s in samples]
            line = {"id": name, "gold_key": gold[name], "task": str(question.get("task", "")), "samples": rows}
            _append(path, line)
            done.add(name)
            if progress:
                progress(len(done), len(wanted))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, left)):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {"questions": len(done), "recorded": left, "skipped": len(wanted) - left}


async def _row(
    sample: Sample, spec: AnswerSpec, question: str, gold: str, canonical: Canonical | None
) -> dict[str, Any]:
    reading = extract(sample.text, spec, question, finished=sample.finish_reason == "stop")
    key = reading.key if reading else None
    if reading and reading.symbolic and canonical:
        key = await canonical(reading.symbolic) or key
    return {
        "key": key,
        "answer": reading.answer if reading else None,
        "mean_logprob": round(sample.mean_logprob, 5),
        "tokens": len(sample.token_ids),
        "correct": key is not None and key == gold,
    }


def _gold(question: Question, spec: AnswerSpec) -> str:
    answer = str(_field(question, "answer"))
    key = key_of(answer, spec, str(_field(question, "question")))
    if key is None:
        raise InvalidRequest(f"question {question['id']}: gold answer {answer!r} is no {spec.type.value}")
    return key


def _field(question: Question, name: str) -> Any:
    if name not in question:
        raise InvalidRequest(f"question {question.get('id', '?')}: field {name} is missing")
    return question[name]


def _recorded(path: Path) -> set[str]:
    """Ids in a pool file, which is cut back to its last complete line. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    try:
        return {str(json.loads(line)["id"]) for line in whole.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidRequest(f"pool {path}: holds a line that is not a pool question ({e})") from e


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
