from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from service.core.artifact import MAX_BYTES, Artifact, check, decode, encode, soft_prompt, zero_artifact
from service.core.types import ModelInfo
from service.errors import InvalidArtifact

K, D = 3, 4
MODEL = ModelInfo(id="tiny", revision="abc123", hidden_size=D, tokenizer_hash="f" * 64, context=128)
ROWS = np.linspace(-1, 1, K * D, dtype=np.float32).reshape(K, D)


def _artifact(**changes: Any) -> Artifact:
    artifact = Artifact(
        task="math_word_problem",
        version=3,
        parent=2,
        model_id=MODEL.id,
        model_revision=MODEL.revision,
        tokenizer_hash=MODEL.tokenizer_hash,
        anchor_text="Think – step by step 🙂.",
        anchor_ids=(5, 6, 7),
        offset=np.full((K, D), 0.25, np.float32),
        anchor=ROWS,
        refiner="gradient",
        settings={"lr": 0.05, "steps": 60, "name": "é"},
        evidence={"wins": 12, "losses": 3, "e": [1.5, None]},
        created="2025-11-23T20:42:00Z",
    )
    return replace(artifact, **changes)


def _same(a: Artifact, b: Artifact) -> bool:
    names = [name for name in Artifact.__slots__ if name not in ("offset", "anchor")]
    return (
        all(getattr(a, name) == getattr(b, name) for name in names)
        and a.offset.tobytes() == b.offset.tobytes()
        and a.anchor.tobytes() == b.anchor.tobytes()
        and a.offset.shape == b.offset.shape
    )


def test_round_trip_is_exact():
    artifact = _artifact()
    data = encode(artifact)
    assert _same(decode(data), artifact)
    assert encode(decode(data)) == data


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_json = st.dictionaries(_text, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _text, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    offset=st.integers(1, 9).flatmap(
        lambda k: arrays.arrays(np.float32, (k, 5), elements=st.floats(-(2.0**60), 2.0**60, width=32))
    ),
    version=st.integers(0, 10**17),
    text=_text,
    facts=_json,
)
def test_any_artifact_round_trips(offset: np.ndarray, version: int, text: str, facts: dict[str, Any]):
    artifact = _artifact(
        offset=offset,
        anchor=np.roll(offset, 1),
        anchor_ids=tuple(range(len(offset))),
        version=version,
        anchor_text=text,
        settings=facts,
    )
    assert _same(decode(encode(artifact)), artifact)


def test_decoded_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        decode(encode(_artifact())).offset[0, 0] = 1


def test_every_flipped_bit_is_detected_or_harmless():
    artifact = _artifact()
    data = encode(artifact)
    undetected = 0
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            try:
                assert _same(decode(bytes(damaged)), artifact)
                undetected += 1
            except InvalidArtifact:
                pass
    assert undetected < len(data) // 4  # white space of the header


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutilated_bytes_are_detected_or_harmless(data: st.DataObject):
    artifact = _artifact()
    whole = encode(artifact)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=12)) + whole[stop:]
    try:
        assert _same(decode(damaged), artifact)
    except InvalidArtifact:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_get_a_clear_error(data: bytes):
    with pytest.raises(InvalidArtifact):
        decode(data)


def _forged(meta: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> bytes:
    """An artifact's bytes with metadata changed (None removes) and the checksum left alone."""
    whole = encode(_artifact())
    (length,) = struct.unpack_from("<Q", whole)
    old = json.loads(whole[8 : 8 + length])["__metadata__"]
    new = {k: v for k, v in {**old, **meta}.items() if v is not None}
    return save(tensors or {"anchor": ROWS, "offset": ROWS}, metadata=new)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "safetensors"),
        (encode(_artifact())[:-1], "safetensors"),
        (bytes(MAX_BYTES + 1), str(MAX_BYTES)),
        (_forged({"format": "other"}), "'other'"),
        (_forged({"format": None}), "format"),
        (_forged({"anchor_text": None, "refiner": None}), "lacks anchor_text, refiner"),
        (_forged({}, {"offset": ROWS}), r"tensors \['offset'\]"),
        (_forged({}, {"offset": ROWS, "anchor": ROWS, "more": ROWS}), "more"),
        (_forged({}, {"offset": ROWS, "anchor": ROWS}), "checksum"),
        (_forged({"version": "4"}), "checksum"),
        (save({"anchor": ROWS, "offset": ROWS}), "format"),
        (b"\x02\0\0\0\0\0\0\0{}", "tensors"),
        (struct.pack("<Q", 2**63) + b"{}", "safetensors"),
    ],
)
def test_what_is_wrong_with_bytes_is_said(data: bytes, reason: str):
    with pytest.raises(InvalidArtifact, match=reason):
        decode(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"offset": np.full((K, D), np.nan, np.float32)}, "offset holds a value that is not finite"),
        ({"anchor": np.full((K, D), np.inf, np.float32)}, "anchor holds a value that is not finite"),
        (
            {"offset": np.full((K, D), 3e38, np.float32), "anchor": np.full((K, D), 3e38, np.float32)},
            "anchor plus offset",
        ),
        ({"offset": np.zeros((K, D))}, "float64"),
        ({"offset": np.zeros(D, np.float32)}, r"\(4,\)"),
        ({"offset": np.zeros((0, D), np.float32)}, r"\(0, 4\)"),
        ({"offset": np.zeros((K + 1, D), np.float32)}, "offset has shape"),
        ({"anchor_ids": (1, 2)}, "2 anchor ids for 3 anchor rows"),
        ({"created": "yesterday"}, "'yesterday'"),
        ({"evidence": {"e": float("nan")}}, "metadata"),
        ({"settings": {"x": object()}}, "metadata"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_be_served_is_not_encoded(changes: dict[str, Any], reason: str):
    with pytest.raises(InvalidArtifact, match=reason):
        encode(_artifact(**changes))


def test_fields_are_checked_behind_a_valid_checksum(monkeypatch: pytest.MonkeyPatch):
    import service.core.artifact as module

    monkeypatch.setattr(module, "_check_fields", lambda artifact: None)
    nan = encode(_artifact(offset=np.full((K, D), np.nan, np.float32)))
    late = encode(_artifact(created="2025-11-23"))
    negative = encode(_artifact(version=-1))
    ids = encode(_artifact(anchor_ids=(1, -2, 3)))
    monkeypatch.undo()
    for data, reason in ((nan, "not finite"), (late, "created"), (negative, "version is '-1'"), (ids, "token ids")):
        with pytest.raises(InvalidArtifact, match=reason):
            decode(data)


def test_too_large_to_encode():
    big = np.zeros((2_048, 2_048), np.float32)
    with pytest.raises(InvalidArtifact, match=str(MAX_BYTES)):
        encode(_artifact(offset=big, anchor=big, anchor_ids=tuple(range(2_048))))


def test_check_passes_for_its_own_model():
    check(_artifact(), MODEL)
    check(_artifact(), MODEL, ROWS)
    check(_artifact(), MODEL, ROWS + np.float32(5e-7))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (replace(MODEL, id="other"), "model 'tiny'; this is 'other'"),
        (replace(MODEL, revision="def"), "model revision 'abc123'; this is 'def'"),
        (replace(MODEL, tokenizer_hash="0"), "tokenizer"),
        (replace(MODEL, hidden_size=8), "4 values; the model's have 8"),
    ],
)
def test_check_refuses_another_model(model: ModelInfo, reason: str):
    with pytest.raises(InvalidArtifact, match=reason):
        check(_artifact(), model, ROWS)


def test_check_refuses_other_embedding_rows():
    with pytest.raises(InvalidArtifact, match=r"\(2, 4\)"):
        check(_artifact(), MODEL, ROWS[:2])
    moved = ROWS.copy()
    moved[1, 2] += 0.01
    with pytest.raises(InvalidArtifact, match="row 1 differs"):
        check(_artifact(), MODEL, moved)
    with pytest.raises(InvalidArtifact, match="differs"):
        check(_artifact(), MODEL, np.full_like(ROWS, np.nan))


def test_check_bounds_the_offset_rows():
    offset = np.zeros((K, D), np.float32)
    norm = float(np.sqrt(np.mean(np.sum(ROWS**2, axis=1))))
    offset[2, 0] = 3.9 * norm
    check(_artifact(offset=offset), MODEL, ROWS)
    offset[2, 0] = 4.1 * norm
    with pytest.raises(InvalidArtifact, match=rf"offset row 2 has norm .*; at most {4 * norm:.6g} is allowed"):
        check(_artifact(offset=offset), MODEL, ROWS)
    check(_artifact(offset=offset), MODEL, ROWS, max_row_norm_ratio=5)


def test_zero_offset_is_no_soft_prompt():
    zero = zero_artifact("math_word_problem", MODEL, "Think.", (5, 6, 7), ROWS)
    assert soft_prompt(zero) is None
    check(decode(encode(zero)), MODEL, ROWS)
    assert soft_prompt(_artifact(offset=np.full((K, D), -0.0, np.float32))) is None


def test_soft_prompt_is_anchor_plus_offset():
    soft = soft_prompt(decode(encode(_artifact())))
    assert soft is not None
    assert soft.dtype == np.float32
    assert np.array_equal(soft, ROWS + np.float32(0.25))
