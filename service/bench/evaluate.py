"""`detot eval`: asks a running service a set of questions with known answers.

The champion is asked, not the control arm, and outcomes are not recorded: measuring leaves no trace in the store, and
questions with known answers never become training material.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.bench.summary import Record, by_task, paired, show, summarise
from service.client import Client
from service.core.answers import same
from service.core.types import AnswerSpec, AnswerType
from service.engine.base import sample_seed
from service.errors import InvalidRequest

COMPARE: dict[str, dict[str, Any]] = {"control": {"arm": "control"}, "greedy": {"samples": 1, "temperature": 0}}
_RETRY = (429, 503)
_LINES_EVERY = 10.0  # seconds between plain lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Question:
    """A line of a question set; `task` is None where the file names none. A line without `id` is called by number."""

    id: str
    question: str
    answer: str
    task: str | None = None


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file of JSON lines, all by default.

    Raises:
        InvalidRequest: names file, line and field; or the file cannot be read or holds no questions.
    """
    found: dict[str, Question] = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(found) == limit:
                    break
                if line.strip():
                    question = _parse(line, f"{file.name}, line {number}", number)
                    if question.id in found:
                        raise InvalidRequest(f"{file.name}, line {number}: field id: {question.id!r} was there before")
                    found[question.id] = question
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"{file}: {getattr(e, 'strerror', None) or e}") from e
    if not found:
        raise InvalidRequest(f"{file.name} holds no questions")
    return list(found.values())


def _parse(line: str, where: str, number: int) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"{where}: not JSON: {e.msg} (column {e.colno})") from e
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where}: not an object but {line.strip()[:40]!r}")
    row = {"id": number} | row
    for name in ("id", "answer"):
        if type(row.get(name)) in (int, float):
            row[name] = str(row[name])
    for name in ("id", "question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InvalidRequest(f"{where}: field {name} is missing or not a text")
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise InvalidRequest(f"{where}: field task is not a text but {task!r}")
    return Question(row["id"], row["question"], row["answer"], task)


def run_eval(
    file: Path,
    *,
    url: str,
    key: str | None = None,
    limit: int | None = None,
    samples: int | None = None,
    concurrency: int = 4,
    seed: int | None = None,
    compare: str | None = None,
    json_out: Path | None = None,
    deadline: float = 900.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask all questions, print tables, return the figures (see `summary.summarise`), with `tasks` and `compare`.

    Args:
        samples: fixed number of samples a vote; None: the task's plan.
        seed: question `i` is asked with a seed derived from it, the same for both sides of a comparison.
        compare: ask each question of this too: "control" (zero offset) or "greedy" (one sample, temperature 0).
        json_out: gets the figures, the settings and every request's record.
        deadline: seconds a question may take, waiting for a turn (429, 503) included.

    A failed request counts as wrong in `accuracy` and is left out of `accuracy_answered`. Ctrl-C ends the run early;
    the figures then cover what was answered, and say `interrupted`.

    Raises:
        InvalidRequest: the file or an argument is malformed.
        Unavailable: nothing answers at `url`.
    """
    if compare is not None and compare not in COMPARE:
        raise InvalidRequest(f"compare is {compare!r}; it must be one of {', '.join(COMPARE)}")
    if concurrency < 1:
        raise InvalidRequest(f"concurrency is {concurrency}; it must be at least 1")
    questions = read_questions(file, limit)
    if json_out is not None:
        _write(json_out, {})  # a path that cannot be written is known before the work, not after
    model, specs = _service(url, key)
    options: dict[str, Any] = {"arm": "champion", "record": False} | ({"samples": samples} if samples else {})
    run = _Run(questions, specs, options, compare, seed, concurrency, deadline, console or Console(stderr=True))
    head, started = {"file": file.name, "model": model, "interrupted": False}, time.monotonic()
    try:
        asyncio.run(run.run(url, key))
    except KeyboardInterrupt:
        head["interrupted"] = True
    figures = _figures(run, head, time.monotonic() - started)
    show(figures, Console())
    if json_out is not None:
        settings = {"url": url, "limit": limit, "samples": samples, "concurrency": concurrency, "seed": seed}
        records = {"records": _plain(run.first), "compare_records": _plain(run.second)}
        _write(json_out, figures | {"settings": settings} | records)
    return figures


def _figures(run: _Run, head: dict[str, Any], seconds: float) -> dict[str, Any]:
    figures = head | summarise(list(run.first.values())) | {"seconds": round(seconds, 1)}
    if run.compare:
        pairs = [(r, run.second[i]) for i, r in run.first.items() if i in run.second]
        figures["compare"] = {"with": run.compare} | paired(pairs) | summarise(list(run.second.values()))
    return figures | {"tasks": by_task(run.first.values())}


def _plain(records: dict[int, Record]) -> list[dict[str, Any]]:
    return [asdict(records[i]) for i in sorted(records)]


def _service(url: str, key: str | None) -> tuple[str, dict[str, AnswerSpec]]:
    """The served model, and how each task's answers are read."""
    client = Client(url, key)
    model = client.json("GET", "/v1/models")["data"][0]["id"]
    names = [task["id"] for task in client.json("GET", "/v1/tasks")["tasks"]]
    return model, {name: _spec(client.json("GET", f"/v1/tasks/{name}")["answer"]) for name in names}


def _spec(answer: dict[str, Any]) -> AnswerSpec:
    aliases = tuple((s.lower(), label) for label, spellings in answer.get("aliases", {}).items() for s in spellings)
    return AnswerSpec(AnswerType(answer["type"]), tuple(answer.get("labels", ())), aliases)


@dataclass(slots=True)
class _Run:
    """One run: what to ask, and the records so far by the question's position."""

    questions: Sequence[Question]
    specs: dict[str, AnswerSpec]
    options: dict[str, Any]
    compare: str | None
    seed: int | None
    concurrency: int
    deadline: float
    console: Console
    first: dict[int, Record] = field(default_factory=dict)
    second: dict[int, Record] = field(default_factory=dict)

    async def run(self, url: str, key: str | None) -> None:
        """Ask everything. Cancelled, it keeps the records that it has."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        todo = iter(enumerate(self.questions))
        with _progress(len(self.questions), self.console) as report:
            async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None) as http:
                await asyncio.gather(*(self._work(http, todo, report) for _ in range(self.concurrency)))

    async def _work(self, http: httpx.AsyncClient, todo: Iterator[tuple[int, Question]], report: Report) -> None:
        for index, question in todo:
            sides = [(self.first, self.options)]
            if self.compare:
                sides.append((self.second, self.options | COMPARE[self.compare]))
            for records, options in sides if index % 2 == 0 else reversed(sides):  # neither side is always the warm one
                records[index] = await self._ask(http, index, question, options)
            report(self.first.values())

    async def _ask(self, http: httpx.AsyncClient, index: int, q: Question, options: dict[str, Any]) -> Record:
        body = {"model": "default", "messages": [{"role": "user", "content": q.question}], "detot": options}
        if self.seed is not None:
            body["seed"] = sample_seed(self.seed, index)
        record = {"question": q.id, "expected": q.task, "gold": q.answer}
        until, retries = time.monotonic() + self.deadline, 0
        while True:
            started = time.monotonic()
            try:
                async with asyncio.timeout(until - started):
                    response = await http.post("/v1/chat/completions", json=body)
            except TimeoutError:
                return Record(**record, error="timeout", detail=f"no answer in {self.deadline:g} s", retries=retries)
            except httpx.HTTPError as e:
                return Record(**record, error="connection", detail=f"{type(e).__name__}: {e}", retries=retries)
            took, pause = time.monotonic() - started, _pause(response, retries)
            if response.status_code not in _RETRY or time.monotonic() + pause > until:
                return self._record(record, q, response, took, retries)
            retries += 1
            await asyncio.sleep(pause)

    def _record(self, head: dict[str, Any], q: Question, response: httpx.Response, took: float, retries: int) -> Record:
        """What a response says; one that is not an answer of this service is a failure too."""
        head = head | {"latency_s": round(took, 4), "retries": retries}
        try:
            body = response.json()
            if not response.is_success:
                return Record(**head, error=str(body["error"]["code"]), detail=str(body["error"]["message"]))
            report, usage = body["detot"], body["usage"]
            return Record(
                **head,
                task=report["task"],
                answer=report["answer"],
                correct=self._correct(q, report),
                samples=report["samples"],
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                report=report,
            )
        except (ValueError, KeyError, TypeError):
            return Record(**head, error=f"http {response.status_code}", detail=response.text[:200])

    def _correct(self, q: Question, report: dict[str, Any]) -> bool:
        """Judged as the file's task reads answers, because the right answer was written for it. The vote's key counts
        too: computer algebra may have found it where plain rules cannot read the answer."""
        spec = self.specs.get(q.task or report["task"]) or self.specs[report["task"]]
        given = (report["answer"], report["key"])
        return any(text is not None and same(text, q.answer, spec, q.question) for text in given)


def _pause(response: httpx.Response, retries: int) -> float:
    """Seconds before the next attempt: what the server asks for, else 0.5 s doubling to 8; up to a tenth more."""
    try:
        asked = max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        asked = min(0.5 * 2.0**retries, 8.0)
    return asked * random.uniform(1.0, 1.1)


class Report:
    """Shows how far a run is: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, total: int, console: Console, progress: Progress | None) -> None:
        self._total, self._console, self._progress, self._said = total, console, progress, time.monotonic()
        self._bar = progress.add_task("asking", total=total) if progress else None

    def __call__(self, records: Any) -> None:
        done, right = len(records), sum(r.correct for r in records)
        text = f"accuracy {right / done:.1%}, failed {sum(r.error is not None for r in records)}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=done, description=text)
        elif done == self._total or time.monotonic() - self._said >= _LINES_EVERY:
            self._said = time.monotonic()
            self._console.print(f"{done}/{self._total} {text}", highlight=False)


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Report]:
    if not console.is_terminal:
        yield Report(total, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield Report(total, console, progress)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as e:
        raise InvalidRequest(f"--json {path}: {e.strerror}") from e
