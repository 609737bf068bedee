"""Tallies and the stopping rule, against brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc

from service.core.types import Ballot, Sampling
from service.core.vote import decided, lead_confidence, tally

keys = st.sampled_from(["18", "20", "7", None])
logprobs = st.floats(-5, 0, allow_nan=False)


def ballot(index: int, key: str | None, logprob: float = -1.0) -> Ballot:
    return Ballot(index, key, None if key is None else f"${key}", logprob)


@st.composite
def ballot_lists(draw: st.DrawFn, max_size: int = 16) -> list[Ballot]:
    return [ballot(i, k, p) for i, (k, p) in enumerate(draw(st.lists(st.tuples(keys, logprobs), max_size=max_size)))]


def votes(text: str) -> list[Ballot]:
    """ "aab-" -> two votes for a, one for b, one unparseable."""
    return [ballot(i, None if c == "-" else c) for i, c in enumerate(text)]


def test_the_leader_is_shown_as_its_likeliest_sample_wrote_it():
    vote = tally(
        [
            Ballot(0, "18", "18.00", -0.9),
            Ballot(1, "20", "20", -0.1),
            Ballot(2, "18", "$18", -0.3),
            Ballot(3, None, None, -0.2),
        ]
    )
    assert (vote.answer, vote.key, vote.best) == ("$18", "18", 2)
    assert vote.counts == {"18": 2, "20": 1}
    assert (vote.samples, vote.unparseable, vote.share, vote.tie) == (4, 1, 0.5, False)
    assert vote.confidence == lead_confidence(2, 1)


def test_a_tie_goes_to_the_answer_with_the_higher_mean_logprob():
    vote = tally([ballot(0, "a", -0.1), ballot(1, "a", -2.0), ballot(2, "b", -0.5), ballot(3, "b", -0.6)])
    assert (vote.key, vote.tie, vote.best, vote.confidence) == ("b", True, 2, 0.5)


@pytest.mark.parametrize("text", ["", "-", "---"])
def test_nothing_parsed_leaves_no_leader(text: str):
    vote = tally(votes(text))
    assert (vote.answer, vote.key, vote.best, vote.counts) == (None, None, None, {})
    assert (vote.share, vote.confidence, vote.tie) == (0.0, 0.0, False)
    assert vote.samples == vote.unparseable == len(text)


def test_logprobs_that_are_not_finite_lose_ties():
    for bad in (math.nan, -math.inf, math.inf):
        for order in itertools.permutations([ballot(0, "a", bad), ballot(1, "b", -9.0), ballot(2, None, bad)]):
            assert tally(order).key == "b"


@given(ballot_lists(), st.randoms(use_true_random=False))
def test_order_does_not_matter(ballots: list[Ballot], rng: random.Random):
    shuffled = ballots[:]
    rng.shuffle(shuffled)
    assert tally(shuffled) == tally(ballots)
    assert list(tally(shuffled).counts) == list(tally(ballots).counts)
    assert decided(shuffled, Sampling()) == decided(ballots, Sampling())


@given(ballot_lists())
def test_a_tally_adds_up(ballots: list[Ballot]):
    vote = tally(ballots)
    counts = Counter(b.key for b in ballots if b.key is not None)
    assert vote.counts == counts
    assert vote.unparseable + sum(counts.values()) == vote.samples == len(ballots)
    assert list(vote.counts.values()) == sorted(counts.values(), reverse=True)
    if counts:
        top = max(counts.values())
        assert counts[str(vote.key)] == top
        assert vote.tie == (list(counts.values()).count(top) > 1)
        assert 0.5 <= vote.confidence < 1
        assert ballots[vote.best or 0].key == vote.key


@given(ballot_lists(max_size=12))
def test_one_more_vote_for_the_leader_keeps_it_and_raises_confidence(ballots: list[Ballot]):
    before = tally(ballots)
    if before.key is not None:
        after = tally([*ballots, ballot(99, before.key, -3.0)])
        assert after.key == before.key
        assert after.confidence > before.confidence
        assert after.share >= before.share


@pytest.mark.parametrize(("v1", "v2"), [*itertools.product(range(13), range(13)), (40, 24), (700, 650), (3000, 1)])
def test_confidence_is_the_beta_posterior(v1: int, v2: int):
    assert lead_confidence(v1, v2) == pytest.approx(1 - betainc(v1 + 1, v2 + 1, 0.5), abs=1e-12)


@pytest.mark.parametrize(("v1", "v2"), [(0, 0), (3, 0), (4, 0), (5, 2), (7, 7)])
def test_confidence_against_numeric_integration(v1: int, v2: int):
    steps = 20_000
    grid = [(i + 0.5) / steps for i in range(steps)]
    mass = [p**v1 * (1 - p) ** v2 for p in grid]
    assert lead_confidence(v1, v2) == pytest.approx(sum(mass[steps // 2 :]) / sum(mass), abs=1e-6)


@given(st.integers(0, 24), st.integers(0, 24))
def test_confidence_is_symmetric_and_monotone(v1: int, v2: int):
    assert lead_confidence(v1, v2) + lead_confidence(v2, v1) == pytest.approx(1)
    assert lead_confidence(v1 + 1, v2) > lead_confidence(v1, v2) > lead_confidence(v1, v2 + 1)


def test_negative_votes_are_refused():
    with pytest.raises(ValueError, match="-1"):
        lead_confidence(-1, 0)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("aaa", False),  # 15/16 is below .95
        ("aaaa", True),  # 31/32
        ("aaab", False),
        ("aaaaab", False),  # 120/128 is just below .95
        ("aaaaaab", True),  # 247/256
        ("aa", False),  # fewer than min_samples
        ("----", False),
        ("aaa-", False),
        ("aaaa---", True),
        ("aabb", False),
    ],
)
def test_when_to_stop(text: str, stop: bool):
    assert decided(votes(text), Sampling(min_samples=3, max_samples=16, confidence=0.95)) is stop


@pytest.mark.parametrize(
    ("text", "stop"),
    [("aaa", False), ("aaaa", True), ("aaab", False), ("aaaab", True), ("-----", False), ("-------", True)],
)
def test_a_lead_that_cannot_be_caught_ends_the_vote(text: str, stop: bool):
    """With seven samples at most; certainty of the posterior alone is never reached here."""
    assert decided(votes(text), Sampling(min_samples=1, max_samples=7, confidence=1.0)) is stop


def test_minimum_and_maximum():
    unanimous = Sampling(min_samples=6, max_samples=8, confidence=0.5)
    assert [decided(votes("a" * n), unanimous) for n in (0, 5, 6)] == [False, False, True]
    assert decided(votes("abababab"), unanimous)
    assert decided(votes("a"), Sampling(min_samples=1, max_samples=1))
    assert not decided(votes("ab"), Sampling(min_samples=1, max_samples=8, confidence=0.5)), "a tie is no lead"


@given(ballot_lists(max_size=15), st.integers(1, 8), st.floats(0.5, 0.999))
def test_stopping_early_means_a_strict_lead(ballots: list[Ballot], least: int, confidence: float):
    plan = Sampling(min_samples=least, max_samples=16, confidence=confidence)
    if decided(ballots, plan):
        vote = tally(ballots)
        assert len(ballots) >= least
        assert not vote.tie
        second = [*vote.counts.values(), 0][1]
        certain = vote.counts[str(vote.key)] - second > 16 - len(ballots)
        assert vote.confidence >= confidence or certain


@given(ballot_lists(max_size=6))
def test_an_uncatchable_lead_is_found_exactly_when_every_continuation_agrees(ballots: list[Ballot]):
    plan = Sampling(min_samples=0, max_samples=6, confidence=1.0)
    left = 6 - len(ballots)
    seen = {b.key for b in ballots}
    more = [*(k for k in seen if k is not None), "new", "newer", None]
    ends = [
        tally([*ballots, *(ballot(10 + i, k) for i, k in enumerate(tail))])
        for tail in itertools.combinations_with_replacement(more, left)
    ]
    settled = all(not e.tie and e.key is not None for e in ends) and len({e.key for e in ends}) == 1
    assert decided(ballots, plan) == (settled or left == 0)
