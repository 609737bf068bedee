"""`detot bench gateway`: what the service itself costs, with the engine that takes no time.

The real server runs in a process of its own on one core; the load generator and a real embedded Valkey run on the
others. Each request is classified, three samples are put to the vote, and the outcome goes to the store. Two figures:
requests per second when every connection sends as fast as it is answered (closed loop), and, at half that rate with
constant arrivals (open loop), the latency from the scheduled sending of a request to the end of its answer. All of it
is added latency, for the samples themselves take none. What the generator measures on a server that does nothing is
reported next to it as `floor`, never subtracted.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

from redis import Redis
from rich.console import Console

from service.bench.load import MAX_REQUESTS, Load, LoadResult
from service.bench.pinned import PinnedServer, cores_apart, cpu_model, on_core, start_server
from service.bench.stats import percentile
from service.errors import InvalidRequest, Unavailable
from service.store import keys
from service.store.embedded import EmbeddedValkey

TARGET_PER_SECOND, TARGET_P99_MS = 1_000.0, 5.0
WARM_UP = 3.0  # seconds
_MOST_PER_SECOND = 4_000  # requests are built beforehand; a faster server ends a round early, which changes no figure
_PACKAGES = ("detot", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "pydantic", "redis", "orjson")


def bench_gateway(
    *,
    seconds: float = 5.0,
    rounds: int = 3,
    connections: int = 32,
    profile: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, and return JSON-ready figures; `target_met` says whether they meet the target.

    Args:
        seconds: length of each round, at most 60.
        rounds: rounds of each kind, in [1, 100]. Throughput is their median; latencies of all rounds are pooled.
        connections: kept alive, in [1, 512].
        profile: run the server under cProfile and write its statistics here; the other figures then say little.

    The server runs with default settings, except those given as `DETOT_BENCH_...` in place of `DETOT_...`.

    Raises:
        InvalidRequest: an argument is out of bounds.
        Unavailable: the server does not start, or a load generator fails.
    """
    if not 1 <= rounds <= 100:
        raise InvalidRequest(f"rounds is {rounds}; it must lie in [1, 100]")
    Load(port=1, connections=connections, seconds=seconds).check()
    say = console or Console(stderr=True)
    with cores_apart() as cores, tempfile.TemporaryDirectory(prefix="detot-bench-") as name:
        folder = Path(name)
        with EmbeddedValkey(folder / "valkey") as valkey, Redis.from_url(valkey.url) as redis:
            with start_server(folder, valkey.url, cores[0], connections, profile) as server:
                bench = _Bench(server, seconds, connections, say)
                figures = bench.saturate(rounds)
                with _trivial_server(cores[0], bench, figures["server_cpu_ms_per_request"]) as same_work:
                    figures |= bench.added_latency(rounds, figures["requests_per_second"] / 2, same_work)
                figures["outcomes"] = bench.outcomes(redis)
            figures["floor"] = _floor(cores[0], bench, figures["rate"])
            figures["valkey"] = redis.info("server").get("valkey_version", "unknown")  # type: ignore[union-attr]
    figures |= {"errors": sum(bench.errors.values()), "error_kinds": dict(bench.errors)}
    figures["target_met"] = _target_met(figures)
    figures |= {"connections": connections, "rounds": rounds, "seconds": seconds, "cpu": cpu_model(), "cores": cores}
    return figures | {
        "profile": str(profile) if profile else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _target_met(figures: dict[str, Any]) -> bool:
    return bool(
        figures["requests_per_second"] >= TARGET_PER_SECOND
        and (figures["p99_ms"] or math.inf) < TARGET_P99_MS
        and figures["errors"] == 0
        and figures["outcomes"]["complete"]
        and figures["samples_per_request"] == 3
    )


class _Bench:
    """The measurements on one running server; counts every good answer and every error."""

    def __init__(self, server: PinnedServer, seconds: float, connections: int, console: Console) -> None:
        self.server, self.seconds, self.connections, self.console = server, seconds, connections, console
        self.ok, self.body_bytes, self._seed = 0, 0.0, 0
        self.errors: dict[str, int] = defaultdict(int)

    def load(self, seconds: float, rate: float | None = None, port: int | None = None) -> LoadResult:
        """One round in a process of its own, with questions of its own; on this server unless `port` says otherwise."""
        self._seed += 1
        count = min(int((rate or _MOST_PER_SECOND) * seconds) + self.connections, MAX_REQUESTS)
        load = Load(port or self.server.port, self.connections, seconds, rate, self._seed, count)
        command = [sys.executable, "-m", "service.bench.load", json.dumps(asdict(load))]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=on_core(None))
        if done.returncode != 0:
            raise Unavailable(f"the load generator failed: {done.stderr.strip()[-300:]}")
        result = LoadResult(**json.loads(done.stdout))
        if port is None:
            self.ok, self.body_bytes = self.ok + result.ok, result.body_bytes
            for kind, number in result.errors.items():
                self.errors[kind] += number
        return result

    def saturate(self, rounds: int) -> dict[str, Any]:
        """Closed loop: requests per second, and what the server's core was busy with."""
        self.console.print(f"warming up for {WARM_UP:g} s", highlight=False)
        self.load(WARM_UP)
        before, results = self.server.cpu_times(), []
        for i in range(rounds):
            results.append(self.load(self.seconds))
            self.console.print(f"saturation, round {i + 1}: {results[-1].per_second:,.0f} requests/s", highlight=False)
        busy, served = (b - a for a, b in zip(before, self.server.cpu_times(), strict=True))
        answered = sum(r.ok for r in results)
        others = max(0.0, 1 - served / busy) if busy else 0.0
        if others > 0.1:
            self.console.print(f"other processes took {others:.0%} of the server's core: not a quiet machine")
        return {
            "requests_per_second": round(median(r.per_second for r in results), 1),
            "requests_per_second_rounds": [round(r.per_second, 1) for r in results],
            "server_cpu_ms_per_request": round(1e3 * served / max(answered, 1), 3),
            "core_share_of_others": round(others, 3),
            "generator_us_per_request": round(mean(r.cpu_us for r in results), 1),
        }

    def added_latency(self, rounds: int, rate: float, same_work: int) -> dict[str, Any]:
        """Open loop at a constant rate: latency from the scheduled sending, and the mean of each stage.

        Each round is followed by one on the server at port `same_work`.
        """
        rate = max(1.0, round(rate, 1))
        before, results, others = self.server.metrics(), [], []
        for i in range(rounds):
            results.append(self.load(self.seconds, rate))
            others.append(self.load(self.seconds, rate, same_work))
            seen, other = _latency(results[-1:]), _latency(others[-1:])
            said = f"{rate:,.0f} requests/s, round {i + 1}: p50 {seen['p50_ms']} ms, p99 {seen['p99_ms']} ms"
            said += f" (same work: {other['p50_ms']} and {other['p99_ms']})"
            self.console.print(said, highlight=False)
        after = self.server.metrics()
        spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
        answered = sum(r.ok for r in results)
        stages = _stages(spent, answered)
        latencies = [x for r in results for x in r.latencies_ms]
        return {
            **_latency(results),
            "p99_ms_rounds": _p99_of_each(results),
            "same_work": _latency(others) | {"p99_ms_rounds": _p99_of_each(others)},
            "rate": rate,
            "stages_ms": stages | {"http_and_queue": round(mean(latencies or [0.0]) - sum(stages.values()), 3)},
            "samples_per_request": round(_total(spent, "detot_samples_per_answer_sum") / max(answered, 1), 3),
        }

    def outcomes(self, redis: Redis) -> dict[str, Any]:
        """Whether every answered request is in the store, counted by the service and by the store."""
        give_up = time.monotonic() + 20
        while _total(seen := self.server.metrics(), "detot_outcomes_pending") and time.monotonic() < give_up:
            time.sleep(0.05)
        streams = list(redis.scan_iter(match=keys.outcomes("*").replace("{*}", "*")))
        stored = sum(redis.xinfo_stream(name)["entries-added"] for name in streams)  # type: ignore[index]
        written, dropped = (int(_total(seen, f"detot_outcomes_{x}_total")) for x in ("written", "dropped"))
        complete = self.ok == written == stored and dropped == 0
        return {"answered": self.ok, "written": written, "dropped": dropped, "stored": stored, "complete": complete}


def _latency(results: Sequence[LoadResult]) -> dict[str, float | None]:
    values = [x for r in results for x in r.latencies_ms]
    lags = [x for r in results for x in r.lag_ms]
    if not values:
        return {"p50_ms": None, "p99_ms": None, "max_ms": None, "generator_lag_p99_ms": None}
    figures = {"p50_ms": percentile(values, 50), "p99_ms": percentile(values, 99), "max_ms": max(values)}
    return {name: round(x, 3) for name, x in (figures | {"generator_lag_p99_ms": percentile(lags, 99)}).items()}


def _p99_of_each(results: Sequence[LoadResult]) -> list[float | None]:
    return [_latency([r])["p99_ms"] for r in results]


@contextmanager
def _trivial_server(core: int, bench: _Bench, milliseconds: float = 0.0) -> Iterator[int]:
    """The port of a server that only works for so long on each request."""
    command = [sys.executable, "-m", "service.bench.floor", str(round(bench.body_bytes)), str(milliseconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=on_core(core)) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            bench.load(1.0, port=port)
            yield port
        finally:
            process.kill()


def _floor(core: int, bench: _Bench, rate: float) -> dict[str, Any]:
    """The same load on a server that does nothing: what generator and machine add by themselves."""
    with _trivial_server(core, bench) as port:
        closed, opened = bench.load(bench.seconds, port=port), bench.load(bench.seconds, rate, port=port)
    return {"requests_per_second": round(closed.per_second, 1), **_latency([opened])}


def _stages(spent: dict[str, float], answered: int) -> dict[str, float]:
    """Mean milliseconds a request spent in each stage of the pipeline."""
    name = "detot_stage_seconds_sum"
    sums = {key.split('"')[1]: value for key, value in spent.items() if key.startswith(name)}
    return {stage: round(1e3 * seconds / max(answered, 1), 4) for stage, seconds in sums.items()}


def _total(metrics: dict[str, float], name: str) -> float:
    """A metric summed over its labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)
