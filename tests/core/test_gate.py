"""The gate: false promotions by simulation with a look after every item, power, and what can never promote."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from service.core.eprocess import STAKES, bet_canary, bet_heldout, even, for_promotion, log_e
from service.core.gate import (
    CanaryPair,
    Decision,
    HeldoutPair,
    Pair,
    Road,
    Rules,
    State,
    decide,
    spent_alpha,
    start,
    update,
    verdict,
)
from service.core.power import World, power

NULL_ROUNDS = 2000
RULES = Rules(max_items=400)

# Every way in which a challenger deserves nothing, at the boundary: what the gate must not promote.
NULLS = {
    "equal, 2% discordant": World(0, 0.02),
    "equal, 20% discordant": World(0, 0.2),
    "equal, always discordant": World(0, 1.0),
    "equal, saving nothing on average, +-1": World(0, 0.1, saving_spread=1.0),
    "identical": World(0, 0.0, saving_spread=0.0),
    "exactly the margin worse, saving much": World(-0.03, 0.03, saving=0.4),
    "exactly the margin worse, noisy, saving much": World(-0.03, 0.3, saving=0.4),
    "held-out exactly the margin worse, much better on canaries": World(
        0.3, 0.4, heldout_gain=-0.03, heldout_discordance=0.03
    ),
    "held-out exactly the margin worse, noisy": World(0.3, 0.4, heldout_gain=-0.03, heldout_discordance=0.4),
    "worse": World(-0.1, 0.2),
}


@pytest.mark.parametrize("world", NULLS.values(), ids=NULLS)
def test_false_promotions_stay_under_alpha_with_a_look_after_every_item(world):
    seen = power(world, np.random.default_rng(7), rules=RULES, rounds=NULL_ROUNDS)
    assert seen.promoted <= spent_alpha(RULES.alpha, 1)


def test_false_promotions_stay_under_alpha_when_samples_and_accuracy_are_tied_together():
    """Right answers come with fewer samples, as they do in truth: the two e-processes rise and fall together."""
    rng, wealth, promoted = np.random.default_rng(8), even((NULL_ROUNDS,)), np.zeros(NULL_ROUNDS, bool)
    for _ in range(400):
        gain = rng.choice((-1.0, 0.0, 1.0), NULL_ROUNDS, p=(0.2, 0.6, 0.2))
        wealth = bet_canary(wealth, gain, 0.6 * gain, RULES.margin)
        promoted |= for_promotion(log_e(wealth), heldout=False) >= -math.log(spent_alpha(RULES.alpha, 1))
    assert promoted.mean() <= spent_alpha(RULES.alpha, 1)


def test_false_promotions_stay_under_alpha_when_an_adversary_picks_the_next_item():
    """Whoever sees all evidence may choose how noisy the next item is, not which way it leans."""
    rng, promoted = np.random.default_rng(9), np.zeros(NULL_ROUNDS, bool)
    wealth = bet_heldout(even((NULL_ROUNDS,)), np.zeros(NULL_ROUNDS), RULES.margin)
    bar = -math.log(spent_alpha(RULES.alpha, 1))
    for item in range(500):
        e = for_promotion(log_e(wealth), heldout=False)
        noise = np.where(e < 0, 1.0, np.where(e > bar - 1, 0.9, 0.02 + 0.3 * (item % 2)))  # gamble when behind
        gain = np.where(rng.random(NULL_ROUNDS) < noise, rng.choice((-1.0, 1.0), NULL_ROUNDS), 0.0)
        skewed = np.where(rng.random(NULL_ROUNDS) < 1 / 11, 1.0, -0.1)  # mean zero: rare large savings
        wealth = bet_canary(wealth, gain, skewed, RULES.margin)
        promoted |= for_promotion(log_e(wealth), heldout=False) >= bar
    assert promoted.mean() <= spent_alpha(RULES.alpha, 1)


def test_a_task_that_keeps_sending_equal_challengers_rarely_gets_one_promoted():
    rules, rng = Rules(max_items=150, heldout=False), np.random.default_rng(10)
    shares = [power(World(0, 0.3), rng, rules=rules, number=j, rounds=500).promoted for j in range(1, 21)]
    assert 1 - math.prod(1 - share for share in shares) <= rules.alpha


def test_harmless_challengers_are_rarely_rejected_as_harmful():
    rules = Rules(max_items=500)
    for world in (World(0, 0.2), World(0.0, 1.0, heldout_gain=-0.03, heldout_discordance=0.2)):
        assert power(world, np.random.default_rng(11), rules=rules, rounds=1000).rejected <= rules.harm_alpha


@pytest.mark.parametrize(
    ("world", "most"),
    [
        (World(0.2, 0.3), 200),
        (World(0.1, 0.15), 350),
        (World(0.1, 0.3), 700),
        (World(0.05, 0.1), 900),
        (World(0.02, 0.05, saving=0.2), 700),
    ],
)
def test_a_real_gain_is_promoted_within_this_many_items(world, most):
    seen = power(world, np.random.default_rng(12), rules=Rules(max_items=most), rounds=200)
    assert seen.promoted >= 0.9
    assert seen.rejected <= 0.01


def test_harm_ends_a_round_early():
    seen = power(World(-0.1, 0.2), np.random.default_rng(13), rules=Rules(max_items=400), rounds=200)
    assert seen.rejected >= 0.9


def test_spent_alpha_adds_up_to_alpha():
    assert sum(spent_alpha(0.05, j) for j in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)
    with pytest.raises(ValueError, match="number must be from 1 to inf, not 0"):
        spent_alpha(0.05, 0)


def stream(rng: np.random.Generator, items: int, gain: float = 0.2) -> list[Pair]:
    pairs: list[Pair] = []
    for _ in range(items):
        challenger, champion = bool(rng.random() < 0.6 + gain), bool(rng.random() < 0.6)
        drawn = (int(rng.integers(3, 12)), int(rng.integers(3, 12)))
        pairs += [CanaryPair(challenger, champion, *drawn, max_samples=16), HeldoutPair(True, rng.random() > 0.02)]
    return pairs


def through(pairs: list[Pair], rules: Rules = RULES) -> State:
    state = start(rules, 1)
    for pair in pairs:
        state = update(state, pair)
    return state


def test_on_pairs_that_disagree_the_e_value_is_the_mixture_of_the_coin_bets():
    won, lost, tied = CanaryPair(True, False), CanaryPair(False, True), CanaryPair(True, True)
    pairs: list[Pair] = [*[won] * 9, *[lost] * 2, *[tied] * 30]
    q = (1 + STAKES) / 2
    assert verdict(through(pairs)).e_values["superiority"] == pytest.approx(np.mean((2 * q) ** 9 * (2 * (1 - q)) ** 2))


def test_the_order_of_the_evidence_does_not_matter():
    pairs = stream(np.random.default_rng(1), 60)
    assert verdict(through(pairs)).e_values == pytest.approx(verdict(through(pairs[::-1])).e_values)


def test_state_survives_a_restart():
    pairs = stream(np.random.default_rng(2), 80)
    half = State.from_dict(json.loads(json.dumps(through(pairs[:77]).to_dict())))
    for pair in pairs[77:]:
        half = update(half, pair)
    assert verdict(half) == verdict(through(pairs))
    assert half.rules == RULES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["wealth"].pop("harm"), "gate state has processes"),
        (lambda d: d["wealth"].update(harm=[0.0] * 3), "gate state has processes"),
        (lambda d: d["wealth"].update(harm=[math.inf] * len(STAKES)), "not finite"),
        (lambda d: d["rules"].update(alpha=2), "alpha must be between 0 and 1, not 2"),
        (lambda d: d.update(number=0), "number must be from 1 to inf, not 0"),
    ],
)
def test_a_damaged_state_is_refused(damage, message):
    body = start(RULES, 1).to_dict()
    damage(body)
    with pytest.raises(ValueError, match=message):
        State.from_dict(body)


def test_the_first_look_that_says_so_ends_it():
    seen = decide(stream(np.random.default_rng(3), 600), Rules())
    assert (seen.decision, seen.road) == (Decision.PROMOTE, Road.ACCURACY)
    assert seen.e_value >= seen.threshold
    assert seen.counts.canaries < 600
    assert "more right answers" in seen.reason
    assert str(seen.counts.wins) in seen.reason


def test_the_second_road_not_inferior_and_fewer_samples():
    pairs: list[Pair] = [CanaryPair(True, True, 4, 9, 16), HeldoutPair(True, True)] * 300
    seen = decide(pairs, RULES)
    assert (seen.decision, seen.road) == (Decision.PROMOTE, Road.SAMPLES)
    assert seen.counts.challenger_samples < seen.counts.champion_samples


def test_fewer_samples_do_not_excuse_wrong_answers():
    """A collapse: every vote is unanimous at once, and wrong a little more often."""
    rng = np.random.default_rng(4)
    pairs: list[Pair] = []
    for _ in range(500):
        right = bool(rng.random() < 0.6)
        pairs += [CanaryPair(right and rng.random() > 0.15, right, 3, 12, 16), HeldoutPair(True, True)]
    assert decide(pairs, RULES).decision is Decision.REJECT


def test_held_out_agreement_alone_promotes_nothing():
    seen = verdict(through([HeldoutPair(True, False)] * 5000))
    assert seen.decision is Decision.UNDECIDED
    assert seen.e_value == pytest.approx(1.0)


def test_canaries_alone_do_not_promote_where_held_out_prompts_are_required():
    pairs: list[Pair] = [CanaryPair(True, False, 3, 9, 16)] * 100
    assert decide(pairs, RULES).decision is Decision.UNDECIDED
    assert decide(pairs, Rules(heldout=False)).decision is Decision.PROMOTE


def test_losing_the_anchors_answers_is_harm():
    rng = np.random.default_rng(5)
    pairs: list[Pair] = [HeldoutPair(bool(rng.random() > 0.25), True) for _ in range(400)]
    seen = decide(pairs, RULES)
    assert seen.decision is Decision.REJECT
    assert "worse than the champion" in seen.reason


def test_a_round_without_an_end_is_ended():
    seen = decide([CanaryPair(True, True), HeldoutPair(True, True)] * 40, Rules(max_items=30))
    assert seen.decision is Decision.REJECT
    assert "within 30 canary items" in seen.reason
    assert seen.counts.canaries == 30


def test_shares_of_right_samples_are_evidence_too():
    rng = np.random.default_rng(6)
    pairs: list[Pair] = []
    for _ in range(300):
        p = rng.random() * 0.8
        pairs.append(CanaryPair(rng.binomial(8, p + 0.1) / 8, rng.binomial(8, p) / 8))
    shares = decide(pairs, Rules(heldout=False))
    assert shares.decision is Decision.PROMOTE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CanaryPair(1.5, 0), r"challenger must be from 0 to 1, not 1\.5"),
        (lambda: CanaryPair(1, math.nan), "champion must be from 0 to 1, not nan"),
        (lambda: CanaryPair(1, 1, 17, 3, 16), "challenger_samples must be from 1 to 16, not 17"),
        (lambda: CanaryPair(1, 1, 3, 0, 16), "champion_samples must be from 1 to 16, not 0"),
        (lambda: HeldoutPair(7, True), "challenger must be from 0 to 1, not 7"),  # type: ignore[arg-type]
        (lambda: Rules(alpha=0), "alpha must be between 0 and 1, not 0"),
        (lambda: Rules(margin=1.0), r"margin must be between 0 and 1, not 1\.0"),
        (lambda: Rules(max_items=0), "max_items must be from 1 to inf, not 0"),
        (lambda: World(0.2, 0.1), r"\|gain\| must be at most its spread"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
