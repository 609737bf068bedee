"""A pytest plugin (`-p tests.figures`): the last line of a run is its figures as JSON."""

from __future__ import annotations

import json
import time

import pytest

_started = time.monotonic()
OUTCOMES = ("passed", "failed", "error", "skipped", "deselected")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    counts = {name: len(reporter.stats.get(name, ())) for name in OUTCOMES}
    print(json.dumps(counts | {"seconds": round(time.monotonic() - _started, 1)}), flush=True)
