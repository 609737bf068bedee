"""Every Prometheus metric of the service, prefix `detot_`, base units, bounded labels.

`task` is bounded by the catalogue (run-time tasks are capped), `arm`, `stage`, `status`, `reason` by the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

REGISTRY = CollectorRegistry()
M = TypeVar("M", Counter, Gauge, Histogram)

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

REQUESTS = Counter(
    "detot_requests", "Chat requests by task, arm and HTTP status", ["task", "arm", "status"], registry=REGISTRY
)
REQUEST_SECONDS = Histogram(
    "detot_request_seconds", "Time from admission to the answer", ["task"], buckets=_FAST, registry=REGISTRY
)
STAGE_SECONDS = Histogram(
    "detot_stage_seconds", "Time spent in one stage of a request", ["stage"], buckets=_FAST, registry=REGISTRY
)
IN_FLIGHT = Gauge("detot_requests_in_flight", "Requests holding an admission permit", registry=REGISTRY)
REJECTED = Counter("detot_requests_rejected", "Requests turned away before work", ["reason"], registry=REGISTRY)
SAMPLES = Histogram(
    "detot_samples_per_answer",
    "Samples drawn for one voted answer",
    ["task"],
    buckets=(1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64),
    registry=REGISTRY,
)
SAVED = Counter("detot_samples_saved", "Samples not drawn because the vote was safe early", ["task"], registry=REGISTRY)
CONSENSUS = Histogram("detot_consensus_share", "Leader's share of a vote", ["task"], buckets=_SHARES, registry=REGISTRY)
CONFIDENCE = Histogram(
    "detot_vote_confidence", "Posterior that the leader leads", ["task"], buckets=_SHARES, registry=REGISTRY
)
UNPARSEABLE = Counter(
    "detot_samples_unparseable", "Samples from which no answer could be read", ["task"], registry=REGISTRY
)
TOKENS = Counter("detot_tokens", "Tokens by kind: prompt, completion", ["kind"], registry=REGISTRY)
FEEDBACK = Counter("detot_feedback", "Feedback accepted, by task", ["task"], registry=REGISTRY)
STORE_ERRORS = Counter("detot_store_errors", "Failed Redis operations, by operation", ["operation"], registry=REGISTRY)
VERSION = Gauge("detot_offset_version", "Version of the offset served, by task", ["task"], registry=REGISTRY)
CHALLENGER = Gauge(
    "detot_challenger_version", "Version of the challenger served, by task; 0: none", ["task"], registry=REGISTRY
)
SHARE = Gauge(
    "detot_challenger_share", "Challenger's share of the requests off the control arm", ["task"], registry=REGISTRY
)
REFUSED = Counter(
    "detot_offsets_refused", "Published offsets that were not served because they failed a check", registry=REGISTRY
)
MONITOR = Gauge(
    "detot_monitor_value", "The worker's monitor of a task over its window", ["task", "name"], registry=REGISTRY
)
BREACH = Gauge("detot_monitor_breach", "1 while a task misses a target threshold", ["task", "name"], registry=REGISTRY)
LAG = Gauge("detot_worker_lag_outcomes", "Outcomes of a task that the worker has not read", ["task"], registry=REGISTRY)


@cache
def of(metric: M, *labels: str) -> M:
    """`metric.labels(*labels)`, found faster. Labels are bounded, and so is the cache."""
    return metric.labels(*labels)


class Reading:
    """A collector that reads plain attributes of live objects when Prometheus scrapes.

    `gauges` and `counters` map a metric name to its help text and a function giving the present value, or
    values by upstream.
    """

    def __init__(
        self,
        gauges: dict[str, tuple[str, Callable[[], float | Mapping[str, float]]]],
        counters: dict[str, tuple[str, Callable[[], float | Mapping[str, float]]]],
    ) -> None:
        self._gauges, self._counters = gauges, counters

    def collect(self):
        for kind, readings in ((GaugeMetricFamily, self._gauges), (CounterMetricFamily, self._counters)):
            for name, (text, read) in readings.items():
                value = read()
                if not isinstance(value, Mapping):
                    yield kind(name, text, value=value)
                    continue
                family = kind(name, text, labels=["upstream"])
                for upstream, count in value.items():
                    family.add_metric([upstream], count)
                yield family

    def __enter__(self) -> Reading:
        REGISTRY.register(self)  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        REGISTRY.unregister(self)  # type: ignore[arg-type]


class _PassedOn:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def collect(self):
        yield from (m for m in prometheus_client.REGISTRY.collect() if m.name.startswith(self._prefix))

    def describe(self):
        return []


@contextmanager
def passed_on(prefix: str) -> Iterator[None]:
    """Exposes, beside ours, what a library has put into Prometheus' default registry under names with this prefix."""
    collector = _PassedOn(prefix)
    REGISTRY.register(collector)  # type: ignore[arg-type]
    try:
        yield
    finally:
        REGISTRY.unregister(collector)  # type: ignore[arg-type]
