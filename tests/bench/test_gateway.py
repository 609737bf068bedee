"""The gateway benchmark end to end, short: its counts must be exact, its times are not looked at."""

from __future__ import annotations

import sys

import pytest

from service.bench import gateway
from service.bench.gateway import bench_gateway
from service.errors import InvalidRequest


@pytest.mark.skipif(sys.platform != "linux", reason="pins processes to cores")
def test_every_request_is_answered_voted_on_and_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(gateway, "WARM_UP", 0.5)
    figures = bench_gateway(seconds=1, rounds=1, connections=8, profile=tmp_path / "profile")
    assert (figures["errors"], figures["error_kinds"], figures["samples_per_request"]) == (0, {}, 3.0)
    outcomes = figures["outcomes"]
    assert outcomes["complete"] and outcomes["answered"] == outcomes["stored"] > 50
    assert set(figures["stages_ms"]) >= {"classify", "compose", "generate", "vote", "record", "http_and_queue"}
    assert figures["requests_per_second"] > 0 and figures["p99_ms"] >= figures["p50_ms"] > 0
    assert figures["same_work"]["p99_ms"] > 0 and len(figures["same_work"]["p99_ms_rounds"]) == 1
    assert figures["floor"]["p99_ms"] > 0 and isinstance(figures["target_met"], bool)
    assert (tmp_path / "profile").stat().st_size > 1_000


@pytest.mark.parametrize("change", [{"seconds": 0}, {"seconds": 61}, {"rounds": 0}, {"connections": 0}])
def test_arguments_out_of_bounds_are_refused(change):
    with pytest.raises(InvalidRequest, match=f"{next(iter(change))} is {next(iter(change.values()))}"):
        bench_gateway(**change)
