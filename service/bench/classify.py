"""Measures the classifier: accuracy per set, rejection of out-of-domain requests, confusion, latency, build time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import InvalidRequest
from service.tasks.catalogue import GENERAL, Catalogue, load_catalogue
from service.tasks.classify import Classifier

TARGETS = {"set_accuracy": 0.95, "average": 0.98, "ood_rejected": 0.90, "p50_ms": 0.5, "build_s": 2.0}
_COLD_BUILD = (
    "import sys, time; start = time.perf_counter(); from service.tasks.catalogue import load_catalogue; "
    "from service.tasks.classify import Classifier; Classifier.build(load_catalogue(sys.argv[1] or None)); "
    "print(time.perf_counter() - start)"
)


def bench_classifier(
    files: Sequence[Path], ood_file: Path | None = None, *, catalogue_file: Path | None = None, last: int = 200
) -> dict[str, Any]:
    """Classify the last `last` questions of each file, and every out-of-domain request.

    Args:
        files: question sets, JSON lines with `question` and `task`; the name of a set is its file's stem.
        ood_file: requests that belong to `general`, JSON lines with `question` and, optionally, `split`.
        catalogue_file: the catalogue to build from, the shipped one by default.
        last: questions at the end of each file; what comes before them is free for development.

    Returns:
        JSON-ready figures: `sets` (name -> questions, accuracy), `average` over the sets, `ood` (requests, rejected as
        a share, and per split), `confusion` (true task -> predicted task -> count), `p50_ms` and `p99_ms` of one
        call, `build_s` in a fresh interpreter with all imports (least of three), `ok` against TARGETS.

    Raises:
        InvalidRequest: a file holds no questions, or a line lacks a field or names an unknown task.
    """
    catalogue = load_catalogue(catalogue_file)
    classifier = Classifier.build(catalogue)
    tally = _Tally(classifier, catalogue)
    sets = {file.stem: tally.run(_read(file, catalogue)[-last:]) for file in files}
    report: dict[str, Any] = {
        "sets": {name: {"questions": len(hits), "accuracy": _mean(hits)} for name, hits in sets.items()},
        "average": round(float(np.mean([np.mean(hits) for hits in sets.values()])), 4) if sets else None,
    }
    if ood_file:
        rows = [{**row, "task": GENERAL} for row in _read(ood_file, None)]
        hits = tally.run(rows)
        splits = sorted({str(row["split"]) for row in rows if "split" in row})
        report["ood"] = {"requests": len(rows), "rejected": _mean(hits)} | {
            split: _mean([hit for hit, row in zip(hits, rows, strict=True) if row.get("split") == split])
            for split in splits
        }
    report["confusion"] = tally.confusion
    report["p50_ms"], report["p99_ms"] = (round(float(np.percentile(tally.times_ms, q)), 3) for q in (50, 99))
    report["build_s"] = _cold_build_seconds(catalogue_file)
    return report | {"ok": _meets_targets(report)}


def confusion_table(confusion: dict[str, dict[str, int]]) -> str:
    """A confusion matrix as a Markdown table, rows true, columns predicted."""
    tasks = list(confusion)
    lines = [f"| true \\ predicted | {' | '.join(tasks)} |", f"|---|{'---:|' * len(tasks)}"]
    lines += [f"| {true} | {' | '.join(str(row.get(task, 0)) for task in tasks)} |" for true, row in confusion.items()]
    return "\n".join(lines)


class _Tally:
    """Counts and times over a whole run."""

    def __init__(self, classifier: Classifier, catalogue: Catalogue) -> None:
        self.classifier = classifier
        self.confusion = {true: dict.fromkeys(catalogue.tasks, 0) for true in catalogue.tasks}
        self.times_ms: list[float] = []
        classifier.classify("warm up")

    def run(self, rows: Iterable[dict[str, Any]]) -> list[bool]:
        """Whether each row was classified right."""
        hits = []
        for row in rows:
            start = time.perf_counter()
            found = self.classifier.classify(row["question"])
            self.times_ms.append((time.perf_counter() - start) * 1e3)
            self.confusion[row["task"]][found.task] += 1
            hits.append(found.task == row["task"])
        return hits


def _read(file: Path, catalogue: Catalogue | None) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InvalidRequest(f"{file.name}, line {number}: not JSON: {e.msg}") from e
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise InvalidRequest(f"{file.name}, line {number}: field question is missing or not a text")
        if catalogue and row.get("task") not in catalogue.tasks:
            raise InvalidRequest(f"{file.name}, line {number}: field task: there is no task {row.get('task')!r}")
        rows.append(row)
    if not rows:
        raise InvalidRequest(f"{file.name} holds no questions")
    return rows


def _mean(hits: list[bool]) -> float:
    return round(float(np.mean(hits)), 4)


def _cold_build_seconds(catalogue_file: Path | None) -> float:
    """Seconds from the first import to a fitted classifier; the least of three, for the machine may be busy."""
    command = [sys.executable, "-c", _COLD_BUILD, str(catalogue_file or "")]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return round(min(float(seconds) for seconds in runs), 3)


def _meets_targets(report: dict[str, Any]) -> bool:
    return (
        all(s["accuracy"] >= TARGETS["set_accuracy"] for s in report["sets"].values())
        and (report["average"] is None or report["average"] >= TARGETS["average"])
        and report.get("ood", {"rejected": 1.0})["rejected"] >= TARGETS["ood_rejected"]
        and report["p50_ms"] < TARGETS["p50_ms"]
        and report["build_s"] < TARGETS["build_s"]
    )
