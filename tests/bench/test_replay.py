"""Replays of made-up pools with known figures, and the statistics around them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from service.bench.replay import PoolQuestion, PoolSample, read_pool, replay
from service.core.types import Sampling
from service.errors import InvalidRequest

PLAN = Sampling(min_samples=3, max_samples=16, confidence=0.95)


def question(name: str, keys: str, gold: str = "a", tokens: int = 10) -> PoolQuestion:
    """ "aab-" -> two samples that say a, one b, one unparseable."""
    samples = tuple(PoolSample(None if k == "-" else k, k, -0.1 * i, tokens, k == gold) for i, k in enumerate(keys))
    return PoolQuestion(name, gold, "math", samples)


def mixed_pool(questions: int, seed: int = 0) -> list[PoolQuestion]:
    """Questions of every difficulty, as a small model has them."""
    rng = random.Random(seed)
    pool = []
    for i in range(questions):
        skill = rng.betavariate(2, 1)
        pool.append(
            question(f"q{i}", "".join("a" if rng.random() < skill else rng.choice("bcdef-") for _ in range(16)))
        )
    return pool


def test_unanimous_questions_stop_at_four():
    result = replay([question("q", "a" * 16)], PLAN, orders=20)
    assert result["early"]["samples"]["mean"] == 4
    assert result["early"]["samples_begun"]["mean"] == 4 + PLAN.in_flight - 1
    assert result["early"]["tokens"]["mean"] == 40
    assert result["fixed"] == {
        "accuracy": {"mean": 1.0, "interval": [1.0, 1.0]},
        "samples": {"mean": 16.0, "interval": [16.0, 16.0]},
        "tokens": {"mean": 160.0, "interval": [160.0, 160.0]},
    }
    assert result["ratio"]["samples"] == result["ratio"]["tokens"] == {"mean": 0.25, "interval": [0.25, 0.25]}
    assert (result["agreement"]["mean"], result["difference"]["mean"], result["target_met"]) == (1, 0, True)


def test_hopeless_questions_take_every_sample():
    result = replay([question("q", "-" * 16), question("r", "abcdefghijklmnop")], PLAN, orders=20)
    assert result["early"]["samples"]["mean"] == 16
    assert result["ratio"]["samples"]["mean"] == 1
    assert not result["target_met"]
    assert result["parsed"] == 0.5


def test_single_is_the_share_of_right_samples():
    result = replay([question("q", "aaaabbbbccccdd--")], PLAN, orders=4000)
    assert result["single"]["accuracy"]["mean"] == pytest.approx(0.25, abs=0.03)


def test_early_stopping_saves_samples_at_little_cost():
    result = replay(mixed_pool(60), PLAN, orders=40)
    assert result["ratio"]["samples"]["mean"] < 0.75
    assert result["agreement"]["mean"] > 0.95
    assert abs(result["difference"]["mean"]) < 0.03
    low, high = result["fixed"]["accuracy"]["interval"]
    assert low < result["fixed"]["accuracy"]["mean"] < high


def test_the_table_gets_dearer_and_closer_with_confidence():
    table = replay(mixed_pool(40), PLAN, orders=30)["table"]
    assert [(row["min_samples"], row["confidence"]) for row in table][:5] == [
        *((2, c) for c in (0.8, 0.9, 0.95, 0.99)),
        (3, 0.8),
    ]
    for minimum in (2, 3, 5):
        rows = [row for row in table if row["min_samples"] == minimum]
        samples = [row["samples"] for row in rows]
        assert samples == sorted(samples)
        assert rows[-1]["agreement"] >= rows[0]["agreement"]


def test_a_replay_is_repeatable_and_orders_do_not_depend_on_the_pool():
    pool = mixed_pool(6)
    assert replay(pool, PLAN, orders=10, seed=3) == replay(pool, PLAN, orders=10, seed=3)
    assert replay(pool, PLAN, orders=10, seed=3) != replay(pool, PLAN, orders=10, seed=4)
    alone = replay(pool[2:3], PLAN, orders=10, seed=3)["early"]["samples"]["mean"]
    again = replay([pool[2], pool[2]], PLAN, orders=10, seed=3)["early"]["samples"]["mean"]
    assert alone == again


@pytest.mark.parametrize(
    ("pool", "plan", "options", "message"),
    [
        ([], PLAN, {}, "no questions"),
        ([question("q", "aaa")], PLAN, {}, "question q has 3 samples"),
        ([question("q", "a" * 16)], PLAN, {"orders": 0}, "orders is 0"),
        ([question("q", "a" * 16)], PLAN.but(min_samples=17), {}, r"min_samples is 17; it must be in \[1, 16\]"),
        ([question("q", "a" * 16)], PLAN, {"fixed": 0}, r"\[1, 0\]"),
    ],
)
def test_bad_input_is_named(pool: list[PoolQuestion], plan: Sampling, options: dict, message: str):
    with pytest.raises(InvalidRequest, match=message):
        replay(pool, plan, **options)


def test_the_figures_are_json():
    result = replay(mixed_pool(3), PLAN, orders=3)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no questions"),
        (b"{}\n", "line 1"),
        (b'{"id": "a", "gold_key": "1", "task": "", "samples": []}\n\nnonsense\n', "line 3"),
        (b"\xff\xfe", "pool"),
        (b"[1]\n", "line 1"),
    ],
)
def test_a_bad_pool_file_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        read_pool(path)


def test_a_missing_pool_file_is_named(tmp_path: Path):
    with pytest.raises(InvalidRequest, match=r"nowhere\.jsonl"):
        read_pool(tmp_path / "nowhere.jsonl")
