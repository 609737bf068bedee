"""`detot bench record`: a pool of samples from the configured engine, prompted just as the service would."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from service.bench.evaluate import read_questions
from service.bench.record import Question, record_pool
from service.core.prompt import compose
from service.core.types import Prompt
from service.errors import InvalidRequest
from service.serve.symbolic import SymbolicPool
from service.settings import Settings
from service.tasks.catalogue import load_catalogue
from service.tasks.signals import signals
from service.wiring import open_engine


async def record_questions(
    settings: Settings, file: Path, pool: Path, limit: int, samples: int, concurrency: int, seed: int, console: Console
) -> dict[str, Any]:
    """Record `samples` of each question with its task's anchor and sampling plan, at the zero offset.

    Raises:
        InvalidRequest: a question is malformed or names a task that the catalogue does not have.
    """
    questions = [asdict(q) for q in read_questions(file, limit)]
    catalogue = load_catalogue(settings.tasks)
    if unknown := {q.get("task") for q in questions} - set(catalogue.tasks):
        raise InvalidRequest(f"{file}: unknown task {sorted(map(str, unknown))[0]!r}")
    engine, chat, _ = await open_engine(settings)
    symbolic = SymbolicPool()

    def prompt(question: Question) -> Prompt:
        plan = catalogue.tasks[question["task"]].plan(signals(question["question"]))
        return compose(chat, [{"role": "user", "content": question["question"]}], plan.anchor_text)

    def progress(done: int, total: int) -> None:
        console.print(f"recorded {done} of {total} questions", highlight=False)

    try:
        first = catalogue.tasks[questions[0]["task"]].sampling
        plan = first.but(max_samples=samples, min_samples=samples, in_flight=samples, seed=seed)
        counts = await record_pool(
            engine,
            questions,
            prompt,
            lambda q: catalogue.tasks[q["task"]].answer,
            plan,
            pool,
            concurrency=concurrency,
            canonical=symbolic.canonical,
            progress=progress,
        )
    finally:
        await symbolic.aclose()
        await engine.aclose()
    return {**counts, "pool": str(pool), "samples": samples, "model": engine.model.id, "seed": seed}
