"""Self-consistency voting (2203.11171) with early stopping (adaptive-consistency, 2305.11860)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

from service.core.types import Ballot, Sampling, Vote


def tally(ballots: Sequence[Ballot]) -> Vote:
    """Count ballots. The result does not depend on their order.

    Answers with equally many votes are ordered by the mean log-probability of *all* samples that gave them (then by
    key, so that the order is total); `tie` says that this decided. Unparseable ballots vote for nothing, but count in
    `samples` and therefore in `share`. When nothing could be parsed, answer, key and best are None and share and
    confidence are 0.
    """
    groups: dict[str, list[Ballot]] = defaultdict(list)
    for ballot in ballots:
        if ballot.key is not None:
            groups[ballot.key].append(ballot)
    samples, votes = len(ballots), sum(map(len, groups.values()))
    if not groups:
        return Vote(None, None, {}, 0.0, 0.0, samples, samples, tie=False, best=None)
    if len(groups) == 1:
        ranking = list(groups)
    else:
        ranking = sorted(groups, key=lambda key: (-len(groups[key]), -_mean_logprob(groups[key]), key))
    leader = groups[ranking[0]]
    second = len(groups[ranking[1]]) if len(ranking) > 1 else 0
    best = max(leader, key=lambda b: (_finite(b.mean_logprob), -b.index))
    return Vote(
        answer=best.answer,
        key=ranking[0],
        counts={key: len(groups[key]) for key in ranking},
        share=len(leader) / samples,
        confidence=lead_confidence(len(leader), second),
        samples=samples,
        unparseable=samples - votes,
        tie=len(leader) == second,
        best=best.index,
    )


@lru_cache(maxsize=4096)
def lead_confidence(v1: int, v2: int) -> float:
    """Posterior probability that an answer with `v1` votes beats one with `v2`, in [0, 1] (2305.11860, Beta rule).

    With a uniform prior on the share p of the two that goes to the first, p is Beta(v1 + 1, v2 + 1) and
    P(p > 1/2) = 1 - I_0.5(v1 + 1, v2 + 1) = P(Binomial(v1 + v2 + 1, 1/2) <= v1), which is an exact sum of integers.

    Raises:
        ValueError: a count is negative.
    """
    if v1 < 0 or v2 < 0:
        raise ValueError(f"votes must be at least 0, not {v1} and {v2}")
    tosses = v1 + v2 + 1
    return sum(math.comb(tosses, heads) for heads in range(v1 + 1)) / (1 << tosses)


def decided(ballots: Sequence[Ballot], plan: Sampling) -> bool:
    """Whether more samples are pointless.

    True once `plan.max_samples` ballots are in; and, from `plan.min_samples` on, as soon as one answer leads the
    runner-up with a posterior probability of at least `plan.confidence`, or by more votes than there are samples left,
    so that it can be neither overtaken nor tied.
    """
    drawn = len(ballots)
    if drawn >= plan.max_samples or drawn < plan.min_samples:
        return drawn >= plan.max_samples
    counts = Counter(b.key for b in ballots if b.key is not None)
    (_, first), (_, second) = [*counts.most_common(2), (None, 0), (None, 0)][:2]
    if first == second:
        return False
    return first - second > plan.max_samples - drawn or lead_confidence(first, second) >= plan.confidence


def _mean_logprob(group: Sequence[Ballot]) -> float:
    return math.fsum(_finite(b.mean_logprob) for b in group) / len(group)


def _finite(logprob: float) -> float:
    """An order needs numbers: what is not finite comes last."""
    return logprob if math.isfinite(logprob) else -1e300
