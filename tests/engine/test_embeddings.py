from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.engine.embeddings import EmbeddingTable
from service.errors import ModelError
from tests.tiny import tiny_folder

V, D = 50, 8
TABLE = np.random.default_rng(1).normal(0, 0.5, (V, D)).astype(np.float32)


def _folder(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"vocab_size": V, "hidden_size": D}))
    return folder


def _write_raw(path: Path, dtype: str, data: bytes) -> None:
    entry = {"dtype": dtype, "shape": [V, D], "data_offsets": [0, len(data)]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_rows_of_float32(tmp_path: Path):
    table = EmbeddingTable.open(_folder(tmp_path, {"model.embed_tokens.weight": TABLE, "a": TABLE[:1]}))
    assert (table.vocab_size, table.hidden_size) == (V, D)
    rows = table.rows([3, 0, 3, V - 1])
    assert rows.dtype == np.float32
    assert np.array_equal(rows, TABLE[[3, 0, 3, V - 1]])
    rows[0] = 0  # a copy
    assert np.array_equal(table.rows((3,)), TABLE[[3]])
    assert table.rows([]).shape == (0, D)


def test_rows_of_float16(tmp_path: Path):
    half = TABLE.astype(np.float16)
    table = EmbeddingTable.open(_folder(tmp_path, {"model.embed_tokens.weight": half}))
    assert np.array_equal(table.rows(range(V)), half.astype(np.float32))


def test_rows_of_bfloat16(tmp_path: Path):
    upper = (TABLE.view(np.uint32) >> 16).astype("<u2")
    _write_raw(tmp_path / "model.safetensors", "BF16", upper.tobytes())
    rows = EmbeddingTable.open(tmp_path).rows(range(V))
    assert np.array_equal(rows, (upper.astype(np.uint32) << 16).view(np.float32))
    assert np.abs(rows - TABLE).max() < 0.02


def test_shards(tmp_path: Path):
    save_file({"a": TABLE[:1]}, tmp_path / "one.safetensors")
    save_file({"model.embed_tokens.weight": TABLE}, tmp_path / "two.safetensors")
    where = {"a": "one.safetensors", "model.embed_tokens.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert np.array_equal(EmbeddingTable.open(tmp_path).rows([7]), TABLE[[7]])


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "model.language_model.embed_tokens.weight", "strange.table"]
)
def test_other_names(tmp_path: Path, name: str):
    tensors = {name: TABLE, "lm_head.weight": TABLE + 1, "x": TABLE[:1]}
    table = EmbeddingTable.open(_folder(tmp_path, tensors))
    assert table.name == name
    assert np.array_equal(table.rows([7]), TABLE[[7]])


def test_rms(tmp_path: Path):
    table = EmbeddingTable.open(tiny_folder(tmp_path, hidden_size=64))
    assert table.rms == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("wrong", [-1, V])
def test_id_outside_the_table(tmp_path: Path, wrong: int):
    table = EmbeddingTable.open(_folder(tmp_path, {"model.embed_tokens.weight": TABLE}))
    with pytest.raises(ModelError, match=f"{wrong} is outside the embedding table of {V} rows"):
        table.rows([0, wrong])


def test_what_cannot_be_read(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        EmbeddingTable.open(tmp_path)
    _folder(tmp_path, {"x": TABLE, "y": TABLE})
    with pytest.raises(ModelError, match="2 tensors look like"):
        EmbeddingTable.open(tmp_path)
    _write_raw(tmp_path / "model.safetensors", "F8_E4M3", bytes(V * D))
    with pytest.raises(ModelError, match="F8_E4M3"):
        EmbeddingTable.open(tmp_path)
    for data in (b"", b"12345678", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 9) + b"not json."):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError):
            EmbeddingTable.open(tmp_path)
    _folder(tmp_path, {"model.embed_tokens.weight": TABLE})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="truncated"):
        EmbeddingTable.open(tmp_path)


@pytest.mark.model
@pytest.mark.parametrize("fixture", ["small_model_folder", "model_folder"])
def test_rows_equal_what_safetensors_reads(fixture: str, request: pytest.FixtureRequest):
    pytest.importorskip("torch")
    from safetensors import safe_open

    folder = request.getfixturevalue(fixture)
    table = EmbeddingTable.open(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        theirs = file.get_slice(table.name)[1_000:1_100].float().numpy()
    assert np.array_equal(table.rows(range(1_000, 1_100)), theirs)


def test_chunks_are_the_whole_table_in_order(tmp_path):
    table = EmbeddingTable.open(tiny_folder(tmp_path))
    pieces = list(table.chunks(300))
    assert {len(piece) for piece in pieces[:-1]} == {300}
    assert np.array_equal(np.concatenate(pieces), table.rows(range(table.vocab_size)))
    assert pieces[0].dtype == np.float32
