"""Rows of a model's input embedding table, read lazily from its safetensors files without PyTorch."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import ModelError

_NAMES = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_HEADER_LIMIT = 100_000_000  # the safetensors library's own bound
_SAMPLED_ROWS = 1_024


class EmbeddingTable:
    """The table of one model; holds a memory map, reads only the rows that are asked for.

    Attributes:
        name: the tensor's name.
        vocab_size, hidden_size: shape `(v, d)`.
    """

    def __init__(self, file: Path, name: str, entry: dict[str, Any], start: int) -> None:
        begin, end = entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelError(f"{file}: {name} is {entry['dtype']}; readable are {', '.join(_DTYPES)}")
        self.name = name
        self.vocab_size, self.hidden_size = entry["shape"]
        if end - begin != self.vocab_size * self.hidden_size * dtype.itemsize or start + end > file.stat().st_size:
            raise ModelError(f"{file}: {name} is truncated")
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        count = self.vocab_size * self.hidden_size
        self._values = np.frombuffer(mapped, dtype, count, start + begin).reshape(self.vocab_size, self.hidden_size)

    @classmethod
    def open(cls, folder: Path) -> EmbeddingTable:
        """Finds the input embeddings in a model folder, whole or in shards.

        Raises:
            ModelError: no safetensors, no such tensor, or a type or shape that cannot be read.
        """
        try:
            files = _tensor_files(folder)
            name = _table_name(files, folder)
            header, start = _header(files[name])
            return cls(files[name], name, header[name], start)
        except OSError as e:
            raise ModelError(f"{e.filename or folder}: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, struct.error) as e:
            raise ModelError(f"{folder}: the embedding table cannot be read: {e}") from e

    @cached_property
    def rms(self) -> float:
        """Root mean square of a value of the table, from about a thousand rows spread over the vocabulary."""
        sampled = self._read(np.arange(0, self.vocab_size, max(1, self.vocab_size // _SAMPLED_ROWS)))
        return float(np.sqrt(np.mean(np.square(sampled), dtype=np.float64)))

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of token ids, float32 `(len(ids), d)`, equal to the stored values.

        Raises:
            ModelError: an id outside the table.
        """
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ModelError(f"token id {wrong} is outside the embedding table of {self.vocab_size} rows")
        return self._read(np.asarray(ids, dtype=np.int64))

    def chunks(self, size: int = 4_096) -> Iterator[np.ndarray]:
        """The whole table in order, float32 `(size, d)` at a time, the last one what is left."""
        for start in range(0, self.vocab_size, size):
            yield self._read(np.arange(start, min(start + size, self.vocab_size)))

    def _read(self, ids: np.ndarray) -> np.ndarray:
        rows = self._values[ids]
        if rows.dtype == np.dtype("<u2"):  # bfloat16 is the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"{folder} holds no model.safetensors")
    return dict.fromkeys(_header(single)[0], single)


def _table_name(files: dict[str, Path], folder: Path) -> str:
    """The usual names first, then endings, then the only `(vocab_size, hidden_size)` tensor that is no output head."""
    for name in (*_NAMES, *(n for n in files if n.endswith(_ENDINGS))):
        if name in files:
            return name
    config = json.loads((folder / "config.json").read_bytes())
    shape = [config["vocab_size"], config["hidden_size"]]
    found = [
        name
        for file in sorted(set(files.values()))
        for name, entry in _header(file)[0].items()
        if entry["shape"] == shape and "head" not in name and "output" not in name
    ]
    if len(found) != 1:
        raise ModelError(f"{folder}: {len(found)} tensors look like the input embeddings of shape {shape}, not one")
    return found[0]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of contents, and where its data starts."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > _HEADER_LIMIT:
            raise ModelError(f"{file}: header of {length} bytes; not a safetensors file")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
