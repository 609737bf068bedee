"""What an evaluation found: figures of its records, the paired comparison, and tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from service.bench.stats import bootstrap_mean, mcnemar_exact, paired_difference, percentile, wilson

_TASK_FIGURES = (
    *("questions", "correct", "accuracy", "accuracy_interval", "misclassified", "no_answer"),
    *("mean_samples", "completion_tokens", "p50_s", "p95_s"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """One question asked once.

    Attributes:
        question: id of the question.
        expected: the file's task, None if it names none; `task`: the server's, None if the request failed.
        gold, answer: the right answer and the voted one (None: no vote, or nothing could be parsed).
        correct: False for a failed request.
        samples, prompt_tokens, completion_tokens: as reported; completion tokens over all samples.
        latency_s: of the answered attempt.
        retries: attempts before it.
        error: kind of failure, None if answered; `detail`: the server's words.
        report: the response's `detot` field.
    """

    question: str
    expected: str | None
    gold: str
    task: str | None = None
    answer: str | None = None
    correct: bool = False
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    retries: int = 0
    error: str | None = None
    detail: str | None = None
    report: dict[str, Any] | None = None

    @property
    def misclassified(self) -> bool:
        return self.error is None and self.expected is not None and self.task != self.expected


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Figures of a run.

    `accuracy` is over all questions, a failed request counts as wrong, so that failures cannot raise it;
    `accuracy_answered` leaves them out. Intervals are 95%: Wilson's for shares, bootstrap for means.
    """
    good = [r for r in records if r.error is None]
    right = sum(r.correct for r in good)
    return {
        "questions": len(records),
        "answered": len(good),
        "failed": len(records) - len(good),
        "correct": right,
        **_share("accuracy", right, len(records)),
        **_share("accuracy_answered", right, len(good)),
        "no_answer": sum(r.answer is None for r in good),
        "misclassified": sum(r.misclassified for r in good),
        "mean_samples": _mean([r.samples for r in good]),
        "mean_samples_interval": _rounded(bootstrap_mean([r.samples for r in good])) if good else None,
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "completion_tokens": sum(r.completion_tokens for r in good),
        "p50_s": _percentile(good, 50),
        "p95_s": _percentile(good, 95),
        "retries": sum(r.retries for r in records),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
    }


def by_task(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Figures by the task that the server chose; failed requests are in none."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        if r.task is not None:
            groups.setdefault(r.task, []).append(r)
    summaries = {task: summarise(groups[task]) for task in sorted(groups)}
    return {task: {name: row[name] for name in _TASK_FIGURES} for task, row in summaries.items()}


def paired(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    """First against second over the questions that both answered; p is McNemar's, exact."""
    both = [(a.correct, b.correct) for a, b in pairs if a.error is None and b.error is None]
    cells = [both.count(c) for c in ((True, True), (True, False), (False, True), (False, False))]
    out: dict[str, Any] = dict(zip(("both", "only_first", "only_second", "neither"), cells, strict=True))
    out |= {"pairs": len(both), "unpaired": len(pairs) - len(both), "p": round(mcnemar_exact(cells[1], cells[2]), 6)}
    if both:
        difference, interval = paired_difference(*cells)
        out |= {"difference": round(difference, 4), "difference_interval": _rounded(interval)}
    return out


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the tables of a run's figures: overall, by task, errors, comparison."""
    other = figures.get("compare")
    overall = _table("")
    overall.add_row("vote", *_row(figures))
    if other:
        overall.add_row(other["with"], *_row(other))
    console.print(overall)
    tasks = _table("task as served", "misfiled")
    for task, row in figures["tasks"].items():
        tasks.add_row(task, *_row(row), str(row["misclassified"]))
    console.print(tasks)
    if figures["misclassified"]:
        console.print(
            f"{figures['misclassified']} served as another task than the file names (misfiled)", highlight=False
        )
    if figures["failed"]:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in figures["errors"].items())
        console.print(f"{figures['failed']} failed, counted as wrong: {kinds}", style="red", highlight=False)
        if figures["answered"]:
            console.print(f"accuracy of those answered: {figures['accuracy_answered']:.1%}", highlight=False)
    if other and other["pairs"]:
        low, high = other["difference_interval"]
        console.print(
            f"both right {other['both']}, only the vote {other['only_first']}, only {other['with']} "
            f"{other['only_second']}, neither {other['neither']}; difference {100 * other['difference']:+.1f} points "
            f"(95%: {100 * low:+.1f} to {100 * high:+.1f}), McNemar p = {other['p']:.3g}",
            highlight=False,
        )


def _table(first: str, *more: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column(first, no_wrap=True)
    for name in ("right", "accuracy (95%)", "samples", "tokens", "p50 s", "p95 s", *more):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(row: dict[str, Any]) -> list[str]:
    if row["mean_samples"] is None:
        return [f"{row['correct']}/{row['questions']}", "-", "-", "-", "-", "-"]
    low, high = row["accuracy_interval"]
    return [
        f"{row['correct']}/{row['questions']}",
        f"{row['accuracy']:.1%} ({100 * low:.0f}-{100 * high:.0f})",
        f"{row['mean_samples']:.2f}",
        f"{row['completion_tokens']:,}",
        f"{row['p50_s']:.2f}",
        f"{row['p95_s']:.2f}",
    ]


def _share(name: str, right: int, of: int) -> dict[str, Any]:
    return {name: round(right / of, 4) if of else None, f"{name}_interval": _rounded(wilson(right, of))}


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _percentile(records: Sequence[Record], q: float) -> float | None:
    return round(percentile([r.latency_s for r in records], q), 3) if records else None


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(x, 4) for x in interval]
