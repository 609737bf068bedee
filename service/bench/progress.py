"""Progress on a terminal: a bar where there is one, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]


@contextmanager
def download_progress(console: Console) -> Iterator[Report]:
    """Yields `report(stage, done, total)` in bytes; one bar a stage. A total of 0 means unknown."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=None)
            progress.update(bars[stage], completed=done, total=total or None)

        yield report


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._last, self._stage = console, 0.0, ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self._stage and (not total or (now - self._last < 5 and done < total)):
            return
        self._last, self._stage = now, stage
        share = f"{done / total:.0%}" if total else f"{done / 1e6:.0f} MB" if done else ""
        self._console.print(f"{stage} {share}".rstrip(), highlight=False, markup=False)
