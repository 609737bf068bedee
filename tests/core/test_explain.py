from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from service.core.artifact import Artifact
from service.core.explain import explain, nearest

V, K, D = 500, 3, 16
TABLE = np.random.default_rng(0).normal(0, 0.5, (V, D)).astype(np.float32)
IDS = (7, 42, 7)


def chunks(size: int = 64):
    return (TABLE[i : i + size] for i in range(0, V, size))


def made(offset: np.ndarray, version: int = 1, parent: int = 0, **changes) -> Artifact:
    artifact = Artifact(
        "math", version, parent, "m", "r", "t", "a b a", IDS, offset.astype(np.float32), TABLE[list(IDS)]
    )
    return replace(artifact, **changes)


@pytest.mark.parametrize("size", [1, 3, 64, V, 10 * V])
def test_nearest_is_brute_force_whatever_the_chunks(size):
    queries = np.random.default_rng(1).normal(0, 1, (6, D)).astype(np.float32)
    norm = np.linalg.norm(queries, axis=1, keepdims=True) * np.linalg.norm(TABLE, axis=1)
    cosines = queries @ TABLE.T / norm
    found = nearest(queries, chunks(size), 4)
    assert [[i for i, _ in row] for row in found] == np.argsort(-cosines, axis=1)[:, :4].tolist()
    assert [c for _, c in found[0]] == pytest.approx(np.sort(cosines[0])[::-1][:4].tolist(), abs=1e-5)


def test_a_row_without_a_direction_has_no_neighbours():
    queries = np.zeros((2, D), np.float32)
    queries[1] = TABLE[9]
    assert nearest(queries, chunks(), 3)[0] == []
    assert nearest(queries, chunks(), 3)[1][0] == (9, pytest.approx(1.0))
    assert len(nearest(queries[1:], iter([TABLE[:2]]), 3)[0]) == 2, "a table smaller than count"


def test_the_zero_offset_is_its_own_anchor():
    found = explain(made(np.zeros((K, D)), version=0), None, chunks(), str)
    assert [row["soft"][0]["id"] for row in found["rows"]] == list(IDS)
    assert all(row["norm"] == row["ratio"] == row["change"] == 0 for row in found["rows"])
    assert all(row["cosine"] is None and row["offset"] == [] for row in found["rows"])


def test_a_row_turned_to_another_token_says_so():
    offset = np.zeros((K, D))
    offset[1] = TABLE[99] - TABLE[42]
    found = explain(made(offset), None, chunks(), lambda i: f"tok{i}")
    row = found["rows"][1]
    assert (row["token"], row["soft"][0]["token"]) == ("tok42", "tok99")
    assert row["soft"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert row["norm"] == pytest.approx(np.linalg.norm(offset[1]), rel=1e-5)
    assert row["ratio"] == pytest.approx(np.linalg.norm(offset[1]) / np.linalg.norm(TABLE[42]), rel=1e-5)
    assert row["cosine"] < 0
    assert found["change"]["change_norm"] == pytest.approx(row["norm"], rel=1e-5)


def test_what_changed_against_the_parent():
    rng = np.random.default_rng(2)
    old = rng.normal(0, 0.1, (K, D))
    new = old.copy()
    new[2] += 0.3
    found = explain(made(new, 2, 1), made(old), chunks(), str)
    assert [row["change"] for row in found["rows"]] == pytest.approx([0, 0, 0.3 * D**0.5], abs=1e-5)
    assert 0 < found["change"]["cosine"] < 1
    other = explain(made(new, 2, 1), made(old, anchor_ids=(1, 2, 3)), chunks(), str)
    missing = explain(made(new, 2, 1), None, chunks(), str)
    for incomparable in (other, missing):
        assert not incomparable["change"]["comparable"]
        assert [row["change"] for row in incomparable["rows"]] == [None] * K


def test_evidence_and_cost_are_passed_on():
    evidence = {"e_value": 40.0, "cost": {"samples": 960, "seconds": 31.5}}
    found = explain(made(np.ones((K, D)), evidence=evidence), None, chunks(), str)
    assert (found["evidence"], found["cost"]) == (evidence, {"samples": 960, "seconds": 31.5})
    assert explain(made(np.ones((K, D)), evidence={"cost": "much"}), None, chunks(), str)["cost"] == {}
