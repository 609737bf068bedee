"""Alarms for the ways in which learning from votes goes wrong: pure checks of summaries against explicit bounds.

A check of measured quantities fires only when a shift is both large (its bound) and beyond chance (`shift.Z` standard
errors, one-sided probability 3e-5), so that noise does not freeze a task, and never on fewer than `shift.MIN_ITEMS`
items. Each returns an `Alarm` or None; what a caller does with it, freeze and roll back, is not decided here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from service.core.shift import Mean, shares, shift, z_of_many


class Signature(StrEnum):
    """The failure signatures."""

    COLLAPSE = "collapse"
    OSCILLATION = "oscillation"
    INSTABILITY = "instability"
    OVERFITTING = "overfitting"
    BROKEN_COMMUNICATION = "broken_communication"


@dataclass(frozen=True, slots=True)
class Alarm:
    """A failure signature that showed.

    Attributes:
        check: name of the function that fired.
        reason: one sentence for people, naming each value and the bound it broke.
        values: what was compared, by name, for metrics and the record.
    """

    signature: Signature
    check: str
    reason: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Window:
    """One version of a task over some requests on distinct questions; every mean has one value per request.

    Attributes:
        consensus: share of the samples that voted for the leader, in [0, 1].
        agreement: 1 where the leader is the frozen anchor's voted answer, else 0.
        answers: leading key -> number of questions that got it.
        entropy: nats per generated token (minus the mean log-probability of a request's samples).
        length: generated tokens per sample.
        unparseable: share of the samples that no answer could be read from, in [0, 1].
    """

    consensus: Mean
    agreement: Mean
    answers: Mapping[str, int]
    entropy: Mean
    length: Mean
    unparseable: Mean


# --- collapse --------------------------------------------------------------------------------------------------------


def collapse(base: Window, now: Window) -> list[Alarm]:
    """Every sign of collapse in a version's window against the zero offset's, with the default bounds."""
    checks = (consensus_without_agreement, one_answer, low_entropy, length_drift, parse_failures)
    return [alarm for check in checks if (alarm := check(base, now)) is not None]


def consensus_without_agreement(base: Window, now: Window, *, rise: float = 0.05, fall: float = 0.05) -> Alarm | None:
    """Samples agree more with each other and less with the frozen anchor: the vote chases itself (2603.08660)."""
    up = shift(base.consensus, now.consensus, rise)
    down = shift(now.agreement, base.agreement, fall)
    if up is None or down is None:
        return None
    reason = f"consensus rose by {up:.3f} (bound {rise}) while agreement with the anchor fell by {down:.3f}"
    values = {"consensus_rise": up, "agreement_fall": down}
    return Alarm(Signature.COLLAPSE, "consensus_without_agreement", f"{reason} (bound {fall})", values)


def one_answer(base: Window, now: Window, *, rise: float = 0.25) -> Alarm | None:
    """One answer leads on a much larger share of distinct questions than under the zero offset.

    The bound in standard errors grows with the number of answers, of which the most frequent is picked.
    """
    asked, before = sum(now.answers.values()), sum(base.answers.values())
    if not asked or not before:
        return None
    key = max(now.answers, key=lambda k: (now.answers[k], k))
    was, share = shares((base.answers.get(key, 0), before), (now.answers[key], asked))
    up = shift(was, share, rise, z=z_of_many(len(base.answers.keys() | now.answers.keys())))
    if up is None:
        return None
    reason = f"answer {key!r} leads on {share.mean:.0%} of {asked} questions, {up:.2f} above the zero offset's share"
    values = {"share": share.mean, "base_share": was.mean}
    return Alarm(Signature.COLLAPSE, "one_answer", f"{reason} (bound {rise})", values)


def low_entropy(base: Window, now: Window, *, factor: float = 0.25) -> Alarm | None:
    """Entropy per token is under `factor` of the zero offset's: sampling has nothing left to choose from."""
    return _ratio("low_entropy", "entropy per token", base.entropy, now.entropy, factor, math.inf)


def length_drift(base: Window, now: Window, *, low: float = 0.5, high: float = 2.0) -> Alarm | None:
    """Completions are less than `low` or more than `high` times as long as under the zero offset."""
    return _ratio("length_drift", "tokens per sample", base.length, now.length, low, high)


def parse_failures(base: Window, now: Window, *, rise: float = 0.1) -> Alarm | None:
    """The share of samples without a readable answer is up by more than `rise`."""
    up = shift(base.unparseable, now.unparseable, rise)
    if up is None:
        return None
    values = {"unparseable": now.unparseable.mean, "base_unparseable": base.unparseable.mean}
    reason = f"samples without a readable answer rose by {up:.3f} to {now.unparseable.mean:.3f} (bound {rise})"
    return Alarm(Signature.COLLAPSE, "parse_failures", reason, values)


def constant_template(
    answered: Mapping[str, Sequence[tuple[str | None, str]]], *, share: float = 0.9, excess: float = 0.3
) -> Alarm | None:
    """A template always gets one answer although its right answers vary.

    Args:
        answered: template -> (key given, right key) of its canary items; a key of None is no answer.
        share: bound on the given answer's share of the items.
        excess: how far that share must lie above the share of items for which that answer is right.
    """
    for template, pairs in answered.items():
        given = Counter(key for key, _ in pairs if key is not None).most_common(1)
        if not given or given[0][1] < share * len(pairs):
            continue
        key, most = given[0]
        right = sum(truth == key for _, truth in pairs)
        up = shift(*shares((right, len(pairs)), (most, len(pairs))), excess)
        if up is not None:
            reason = f"template {template!r} got {key!r} for {most} of {len(pairs)} items, right for {up:.0%} fewer"
            values = {"share": most / len(pairs), "excess": up}
            return Alarm(
                Signature.COLLAPSE, "constant_template", f"{reason} (bounds {share:.0%}, {excess:.0%})", values
            )
    return None


# --- oscillation -----------------------------------------------------------------------------------------------------


def flips(champions: Sequence[int], *, changes: int = 8, returns: int = 3) -> Alarm | None:
    """The champion went back to an earlier one `returns` times within the last `changes` changes.

    Args:
        champions: version after each change of the pointer, oldest first.
    """
    recent = champions[-changes - 1 :]
    back = sum(version in recent[:i] for i, version in enumerate(recent))
    if back < returns:
        return None
    reason = f"the champion returned to an earlier version {back} times in {len(recent) - 1} changes (bound {returns})"
    return Alarm(Signature.OSCILLATION, "flips", reason, {"returns": float(back)})


def alternation(metric: Sequence[Mean], *, step: float = 0.02, run: int = 4) -> Alarm | None:
    """A metric of successive versions goes up and down in turn, the last `run` times by more than `step` and chance."""
    if len(metric) <= run:
        return None
    last = list(pairwise(metric[-run - 1 :]))
    signs = [(shift(a, b, step) is not None) - (shift(b, a, step) is not None) for a, b in last]
    if 0 in signs or any(s == t for s, t in pairwise(signs)):
        return None
    least = min(abs(b.mean - a.mean) for a, b in last)
    reason = f"the last {run} versions changed the metric up and down in turn, by {least:.3f} or more (bound {step})"
    return Alarm(Signature.OSCILLATION, "alternation", reason, {"least_step": least})


def zigzag(cosines: Sequence[float], *, bound: float = -0.5, run: int = 4) -> Alarm | None:
    """Each of the last `run` updates of the offset undid the one before: cosine below `bound`.

    Args:
        cosines: of each update of the offset with the update before it, oldest first. Unrelated directions have a
            cosine near 0 in many dimensions, with standard deviation (k d) ** -0.5.
    """
    last = cosines[-run:]
    if len(last) < run or not all(c < bound for c in last):
        return None
    reason = f"each of the last {run} updates undid the one before: cosines up to {max(last):.2f} (bound {bound})"
    return Alarm(Signature.OSCILLATION, "zigzag", reason, {"cosine": max(last)})


# --- instability after publishing ------------------------------------------------------------------------------------


def fall_after_publish(before: Mean, after: Mean, *, fall: float = 0.05) -> Alarm | None:
    """A metric where more is better (accuracy, consensus, agreement) is down right after a new version is served."""
    down = shift(after, before, fall)
    if down is None:
        return None
    reason = f"the metric fell from {before.mean:.3f} to {after.mean:.3f} after publishing (bound {fall})"
    return Alarm(Signature.INSTABILITY, "fall_after_publish", reason, {"before": before.mean, "after": after.mean})


def replicas_differ(metric: Mapping[str, Mean], *, gap: float = 0.1) -> Alarm | None:
    """Replicas that serve the same version measure differently: one of them does not serve what it says.

    Args:
        metric: replica -> the metric over its requests. The two furthest apart are compared; the bound in standard
            errors grows with the number of pairs, so that many replicas are no reason to fire.
    """
    if len(metric) < 2:
        return None
    low, high = (pick(metric, key=lambda name: metric[name].mean) for pick in (min, max))
    apart = shift(metric[low], metric[high], gap, z=z_of_many(len(metric) * (len(metric) - 1) // 2))
    if apart is None:
        return None
    reason = f"replicas {low!r} and {high!r} differ by {apart:.3f} on the same version (bound {gap})"
    values = {"low": metric[low].mean, "high": metric[high].mean}
    return Alarm(Signature.INSTABILITY, "replicas_differ", reason, values)


# --- overfitting -----------------------------------------------------------------------------------------------------


def overfitting(train_gain: Mean, gate_gain: Mean, *, gap: float = 0.1) -> Alarm | None:
    """The challenger gains on the prompts it was trained on, and by more than `gap` less on those of the gate.

    Args:
        train_gain, gate_gain: paired differences between challenger and champion, per prompt, of the same measure.
    """
    apart = shift(gate_gain, train_gain, gap)
    if apart is None or train_gain.mean <= 0:
        return None
    reason = f"gained {train_gain.mean:+.3f} in training and {gate_gain.mean:+.3f} at the gate, a gap of {apart:.3f}"
    values = {"train_gain": train_gain.mean, "gate_gain": gate_gain.mean}
    return Alarm(Signature.OVERFITTING, "overfitting", f"{reason} (bound {gap})", values)


# --- broken communication --------------------------------------------------------------------------------------------


def stale_offsets(head: int, age_s: float, served: Mapping[str, int], *, limit_s: float = 30.0) -> Alarm | None:
    """A replica serves another version than the head although the head has been published for longer than `limit_s`.

    Args:
        age_s: seconds since the head was published.
        served: replica -> version in its snapshot.
    """
    behind = sorted(replica for replica, version in served.items() if version != head)
    if not behind or age_s <= limit_s:
        return None
    names = ", ".join(f"{r!r} serves {served[r]}" for r in behind[:5])
    reason = f"version {head} was published {age_s:.0f} s ago (bound {limit_s:.0f} s), yet {names}"
    values = {"age_s": age_s, "behind": float(len(behind))}
    return Alarm(Signature.BROKEN_COMMUNICATION, "stale_offsets", reason, values)


def worker_lag(oldest_s: float, pending: int, *, limit_s: float = 900.0, limit: int = 5000) -> Alarm | None:
    """Outcomes are not picked up: the oldest unread one is older than `limit_s`, or more than `limit` are unread."""
    late, many = pending > 0 and oldest_s > limit_s, pending > limit
    if not late and not many:
        return None
    reason = f"{pending} outcomes are unread (bound {limit}), the oldest for {oldest_s:.0f} s (bound {limit_s:.0f} s)"
    values = {"oldest_s": oldest_s, "pending": float(pending)}
    return Alarm(Signature.BROKEN_COMMUNICATION, "worker_lag", reason, values)


def _ratio(check: str, what: str, base: Mean, now: Mean, low: float, high: float) -> Alarm | None:
    """Alarm if a positive quantity left `[low, high]` times its base and the shift is beyond chance."""
    unit = abs(base.mean)
    down = shift(now, base, (1 - low) * unit, unit=unit)
    up = shift(base, now, (high - 1) * unit, unit=unit) if unit else None
    if down is None and up is None:
        return None
    reason = f"{what} went from {base.mean:.3g} to {now.mean:.3g} (bounds {low:g} and {high:g} times)"
    return Alarm(Signature.COLLAPSE, check, reason, {"base": base.mean, "now": now.mean})
