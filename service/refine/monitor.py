"""What a task's recent outcomes look like, by arm, against its thresholds. Pure: states in, states out.

Averages forget exponentially with a half-life of 200 outcomes; quantiles come from a histogram of logarithmic buckets
that forgets alike, so a state stays small however much it has seen, and a quantile is right to about 5 percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from service.core.types import Feedback, Outcome

HALF_LIFE = 200  # outcomes
DECAY = 0.5 ** (1 / HALF_LIFE)
RATIO = 1.1  # of neighbouring latency buckets
MIN_OUTCOMES = 20  # before a threshold is judged
MIN_FEEDBACK = 10  # before accuracy is judged
FEEDBACK_KEPT = 200  # latest requests with feedback that count for accuracy
ALL = "all"  # the arms together: what users get

AT_LEAST = ("accuracy", "consensus")
AT_MOST = ("samples_per_answer", "parse_failures", "completion_tokens", "latency_p95_s")

_SUMS = ("outcomes", "voted", "share", "confidence", "samples", "voted_samples", "unparseable", "tokens")


@dataclass(frozen=True, slots=True)
class Recent:
    """Forgetting sums over the outcomes of one arm.

    Attributes:
        count: outcomes ever seen, not forgotten.
        sums: by name of `_SUMS`; averages are ratios of two of them.
        latency: latency bucket -> weight; bucket b holds [RATIO**b, RATIO**(b+1)) seconds.
    """

    count: int = 0
    sums: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    latency: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Monitor:
    """The state of one task's monitor.

    Attributes:
        cursor: last stream entry accounted for.
        updated: Unix time of the newest outcome seen, in seconds.
        arms: by arm, and ALL.
        feedback: request id -> (arm, whether the answer was right), in order of arrival, the last word of each.
        dead: entries put aside as unusable, ever.
    """

    cursor: str = "0-0"
    updated: float = 0.0
    arms: Mapping[str, Recent] = field(default_factory=dict)
    feedback: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    dead: int = 0


def observe(monitor: Monitor, outcome: Outcome) -> Monitor:
    """Accounts for one outcome."""
    arms = dict(monitor.arms)
    for arm in (str(outcome.arm), ALL):
        arms[arm] = _add(arms.get(arm, Recent()), outcome)
    return replace(monitor, arms=arms, updated=max(monitor.updated, outcome.created))


def hear(monitor: Monitor, request_id: str, arm: str, correct: bool) -> Monitor:
    """Accounts for feedback; a later word on the same request replaces the earlier one."""
    said = {k: v for k, v in monitor.feedback.items() if k != request_id} | {request_id: (arm, correct)}
    kept = list(said.items())[-FEEDBACK_KEPT:]
    return replace(monitor, feedback=dict(kept))


def same_text(answer: str, outcome: Outcome) -> bool:
    """Whether a user's answer is the outcome's, as written or as canonical key, ignoring case and outer space."""
    wanted = answer.strip().casefold()
    return wanted in {text.strip().casefold() for text in (outcome.answer, outcome.key) if text is not None}


def judge(feedback: Feedback, outcome: Outcome | None, same: Callable[[str, Outcome], bool] = same_text) -> bool | None:
    """Whether the served answer was right, by the strongest thing said; None if it cannot be told.

    `correct` decides, else `answer` compared with the served one, else `score` >= 0.5.
    """
    if feedback.correct is not None:
        return feedback.correct
    if feedback.answer is not None and outcome is not None:
        return same(feedback.answer, outcome)
    return None if feedback.score is None else feedback.score >= 0.5


def figures(monitor: Monitor, arm: str = ALL) -> dict[str, float | None]:
    """Current figures of an arm; None where nothing is known.

    consensus and confidence are means over voted outcomes, parse_failures is per sample of these, samples_per_answer
    per outcome, completion_tokens per sample, latencies in seconds, accuracy over the latest feedback.
    """
    recent = monitor.arms.get(arm, Recent())
    s = recent.sums
    said = [correct for name, correct in monitor.feedback.values() if arm in (name, ALL)]
    return {
        "consensus": _ratio(s["share"], s["voted"]),
        "confidence": _ratio(s["confidence"], s["voted"]),
        "samples_per_answer": _ratio(s["samples"], s["outcomes"]),
        "parse_failures": _ratio(s["unparseable"], s["voted_samples"]),
        "completion_tokens": _ratio(s["tokens"], s["samples"]),
        "latency_p50_s": _quantile(recent.latency, 0.50),
        "latency_p95_s": _quantile(recent.latency, 0.95),
        "accuracy": _ratio(sum(said), len(said)),
    }


def breaches(monitor: Monitor, thresholds: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Thresholds that the arms together miss: `{"name", "value", "target"}`. Too little evidence is no breach."""
    found = []
    now = figures(monitor)
    enough = monitor.arms.get(ALL, Recent()).count >= MIN_OUTCOMES
    for name, target in thresholds.items():
        value = now.get(name)
        known = len(monitor.feedback) >= MIN_FEEDBACK if name == "accuracy" else enough
        if target is None or value is None or not known:
            continue
        if (name in AT_LEAST and value < target) or (name in AT_MOST and value > target):
            found.append({"name": name, "value": value, "target": target})
    return found


def publish(task: str, monitor: Monitor, thresholds: Mapping[str, float | None]) -> dict[str, Any]:
    """What the API shows, as JSON values, with the state to go on from under `state`."""
    return {
        "task": task,
        "updated": monitor.updated,
        "cursor": monitor.cursor,
        "outcomes": monitor.arms.get(ALL, Recent()).count,
        "feedback": len(monitor.feedback),
        "dead": monitor.dead,
        "arms": {
            arm: {"outcomes": recent.count} | figures(monitor, arm) for arm, recent in sorted(monitor.arms.items())
        },
        "breaches": breaches(monitor, thresholds),
        "state": _to_state(monitor),
    }


def resume(published: Mapping[str, Any] | None) -> Monitor:
    """The monitor of an earlier `publish`; a fresh one if there is none or it is of another format."""
    try:
        return _from_state(published["state"]) if published else Monitor()
    except (KeyError, TypeError, ValueError, AttributeError):
        return Monitor()


def _add(recent: Recent, outcome: Outcome) -> Recent:
    samples, voted = len(outcome.drawn), bool(outcome.counts) or outcome.unparseable > 0
    new = {
        "outcomes": 1,
        "voted": voted,
        "share": outcome.share if voted else 0.0,
        "confidence": outcome.confidence if voted else 0.0,
        "samples": samples,
        "voted_samples": samples if voted else 0,
        "unparseable": outcome.unparseable,
        "tokens": outcome.completion_tokens,
    }
    latency = {b: w * DECAY for b, w in recent.latency.items() if w > 1e-6}
    bucket = _bucket(outcome.latency_s)
    latency[bucket] = latency.get(bucket, 0.0) + 1.0
    sums = {name: recent.sums[name] * DECAY + float(new[name]) for name in _SUMS}
    return Recent(recent.count + 1, sums, latency)


def _bucket(seconds: float) -> int:
    return math.floor(math.log(min(max(seconds, 1e-5), 1e5)) / math.log(RATIO))


def _quantile(latency: Mapping[int, float], q: float) -> float | None:
    left = q * sum(latency.values())
    for bucket in sorted(latency):
        left -= latency[bucket]
        if left <= 1e-9:
            return RATIO ** (bucket + 0.5)
    return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _to_state(monitor: Monitor) -> dict[str, Any]:
    arms = {
        arm: {"count": r.count, "sums": dict(r.sums), "latency": list(r.latency.items())}
        for arm, r in monitor.arms.items()
    }
    return {
        "cursor": monitor.cursor,
        "updated": monitor.updated,
        "arms": arms,
        "feedback": [[request, arm, correct] for request, (arm, correct) in monitor.feedback.items()],
        "dead": monitor.dead,
    }


def _from_state(state: Mapping[str, Any]) -> Monitor:
    arms = {
        arm: Recent(r["count"], {name: float(r["sums"][name]) for name in _SUMS}, {int(b): w for b, w in r["latency"]})
        for arm, r in state["arms"].items()
    }
    feedback = {request: (arm, bool(correct)) for request, arm, correct in state["feedback"]}
    return Monitor(state["cursor"], state["updated"], arms, feedback, state["dead"])
