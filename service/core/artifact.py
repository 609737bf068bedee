"""The offset artifact: immutable safetensors bytes with an offset, its anchor, and where it came from."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from service.core.types import ModelInfo
from service.errors import InvalidArtifact

FORMAT = "detot-offset-1"
MAX_BYTES = 16 * 1024 * 1024
MAX_ROW_NORM_RATIO = 4.0
ROW_TOLERANCE = 1e-6  # anchor rows are copies of the table's, so only the last bit may differ

_TEXT = ("task", "model_id", "model_revision", "tokenizer_hash", "anchor_text", "refiner", "created")
_NUMBERS = ("version", "parent")
_ARRAYS = ("anchor", "offset")
_JSON = ("anchor_ids", "settings", "evidence")
_CREATED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|\+00:00)")


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """One version of a task's offset.

    Attributes:
        task, version, parent: which version this is, and from which it was made.
        model_id, model_revision, tokenizer_hash: the only model it is valid for.
        anchor_text, anchor_ids: the anchor, and its `k` token ids.
        offset: float32 `(k, d)`, added to the anchor's embeddings.
        anchor: float32 `(k, d)`, the anchor's embeddings as in the model's table.
        refiner, settings, evidence: what made it, how, and what the gate saw.
        created: ISO-8601, UTC.
    """

    task: str
    version: int
    parent: int
    model_id: str
    model_revision: str
    tokenizer_hash: str
    anchor_text: str
    anchor_ids: tuple[int, ...]
    offset: np.ndarray
    anchor: np.ndarray
    refiner: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    created: str = "1970-01-01T00:00:00Z"


def zero_artifact(task: str, model: ModelInfo, anchor_text: str, ids: tuple[int, ...], rows: np.ndarray) -> Artifact:
    """Version 0 of a task: the zero offset on an anchor, whose embeddings `rows` are float32 `(k, d)`."""
    return Artifact(
        task=task,
        version=0,
        parent=0,
        model_id=model.id,
        model_revision=model.revision,
        tokenizer_hash=model.tokenizer_hash,
        anchor_text=anchor_text,
        anchor_ids=tuple(ids),
        offset=np.zeros_like(rows),
        anchor=rows,
    )


def encode(artifact: Artifact) -> bytes:
    """The artifact as safetensors bytes; `decode` gives back an equal one.

    Raises:
        InvalidArtifact: it would not decode: not finite, wrong shape or type, too large.
    """
    _check_fields(artifact)
    arrays = {name: np.ascontiguousarray(getattr(artifact, name), "<f4") for name in _ARRAYS}
    try:
        meta = _metadata(artifact)
        meta["checksum"] = _checksum(meta, {name: (array.shape, array.tobytes()) for name, array in arrays.items()})
        data = _safetensors(arrays, meta)
    except (TypeError, ValueError) as e:
        raise InvalidArtifact(f"the artifact's metadata cannot be written: {e}") from e
    if len(data) > MAX_BYTES:
        raise InvalidArtifact(f"the artifact has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    return data


def decode(data: bytes) -> Artifact:
    """The artifact in `data`, its arrays read-only.

    Raises:
        InvalidArtifact: with the reason: too large, truncated, no safetensors, a missing or malformed field, wrong
            type or shape, a value that is not finite, or a checksum that does not match.
    """
    if len(data) > MAX_BYTES:
        raise InvalidArtifact(f"the artifact has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    meta, tensors = _read(data)
    if set(tensors) != set(_ARRAYS):
        raise InvalidArtifact(f"the artifact holds tensors {sorted(tensors)}, not {sorted(_ARRAYS)}")
    if meta.get("format") != FORMAT:
        raise InvalidArtifact(f"format is {meta.get('format')!r}, not {FORMAT!r}")
    missing = [name for name in (*_TEXT, *_NUMBERS, *_JSON, "checksum") if name not in meta]
    if missing:
        raise InvalidArtifact(f"the artifact lacks {', '.join(missing)}")
    raw = {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in tensors.items()}
    if _checksum(meta, raw) != meta["checksum"]:
        raise InvalidArtifact("the checksum does not match: the artifact is damaged or was altered")
    values: dict[str, Any] = {name: meta[name] for name in _TEXT}
    values |= {name: _whole(name, meta[name]) for name in _NUMBERS}
    values |= {name: _array(name, tensors[name]["dtype"], *raw[name]) for name in _ARRAYS}
    values |= {name: _mapping(name, meta[name]) for name in ("settings", "evidence")}
    artifact = Artifact(**values, anchor_ids=_ids(meta["anchor_ids"]))
    _check_fields(artifact)
    return artifact


def check(
    artifact: Artifact,
    model: ModelInfo,
    anchor_rows: np.ndarray | None = None,
    *,
    max_row_norm_ratio: float = MAX_ROW_NORM_RATIO,
) -> None:
    """Whether `model` may serve the artifact.

    Args:
        anchor_rows: the model's own embeddings of `anchor_ids`, float32 `(k, d)`; None where they are not at hand.
        max_row_norm_ratio: longest offset row, as a multiple of the anchor rows' root mean square norm.

    Raises:
        InvalidArtifact: made for another model, of another shape, for another embedding table, or too large a step.
    """
    for name, theirs, ours in (
        ("model", artifact.model_id, model.id),
        ("model revision", artifact.model_revision, model.revision),
        ("tokenizer", artifact.tokenizer_hash, model.tokenizer_hash),
    ):
        if theirs != ours:
            raise InvalidArtifact(f"the artifact was made for {name} {theirs!r}; this is {ours!r}")
    _check_fields(artifact)
    if artifact.offset.shape[1] != model.hidden_size:
        raise InvalidArtifact(
            f"offset rows have {artifact.offset.shape[1]} values; the model's have {model.hidden_size}"
        )
    if anchor_rows is not None:
        _check_rows(artifact.anchor, anchor_rows)
    anchor_norm = float(np.sqrt(np.mean(np.sum(np.square(artifact.anchor, dtype=np.float64), axis=1))))
    norms = np.sqrt(np.sum(np.square(artifact.offset, dtype=np.float64), axis=1))
    worst, bound = int(np.argmax(norms)), max_row_norm_ratio * anchor_norm
    if norms[worst] > bound:
        raise InvalidArtifact(
            f"offset row {worst} has norm {norms[worst]:.6g}; at most {bound:.6g} is allowed, "
            f"{max_row_norm_ratio:g} times the anchor rows' norm of {anchor_norm:.6g}"
        )


def soft_prompt(artifact: Artifact) -> np.ndarray | None:
    """Anchor plus offset, float32 `(k, d)`; None where the offset is zero, so that zero stays the plain prompt."""
    if not artifact.offset.any():
        return None
    return np.asarray(artifact.anchor + artifact.offset, dtype=np.float32)


def _metadata(artifact: Artifact) -> dict[str, str]:
    meta = {"format": FORMAT} | {name: getattr(artifact, name) for name in _TEXT}
    meta |= {name: str(getattr(artifact, name)) for name in _NUMBERS}
    for name in _JSON:
        value = getattr(artifact, name)
        plain = list(value) if name == "anchor_ids" else dict(value)
        meta[name] = json.dumps(plain, sort_keys=True, allow_nan=False)
    return meta


def _check_fields(artifact: Artifact) -> None:
    if not _CREATED.fullmatch(artifact.created):
        raise InvalidArtifact(f"created is {artifact.created!r}, not an ISO-8601 time in UTC")
    for name, array in (("offset", artifact.offset), ("anchor", artifact.anchor)):
        if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
            raise InvalidArtifact(f"{name} is {array.dtype} {array.shape}, not float32 (k, d)")
        if not np.isfinite(array).all():
            raise InvalidArtifact(f"{name} holds a value that is not finite")
    if artifact.offset.shape != artifact.anchor.shape:
        raise InvalidArtifact(f"offset has shape {artifact.offset.shape}, anchor {artifact.anchor.shape}")
    if len(artifact.anchor_ids) != len(artifact.anchor):
        raise InvalidArtifact(f"{len(artifact.anchor_ids)} anchor ids for {len(artifact.anchor)} anchor rows")
    if not np.isfinite(artifact.anchor + artifact.offset).all():
        raise InvalidArtifact("anchor plus offset is not finite")


def _check_rows(anchor: np.ndarray, rows: np.ndarray) -> None:
    if anchor.shape != rows.shape:
        raise InvalidArtifact(f"anchor has shape {anchor.shape}; the model's rows have {rows.shape}")
    gap = np.abs(anchor - rows).max(axis=1)
    worst = int(np.argmax(gap))
    if not gap[worst] <= ROW_TOLERANCE:
        raise InvalidArtifact(
            f"anchor row {worst} differs from the model's embedding table by {gap[worst]:.6g}; "
            f"at most {ROW_TOLERANCE:g} is allowed"
        )


def _safetensors(arrays: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> bytes:
    """Safetensors bytes of float32 arrays; unlike the library's, the same every time."""
    header: dict[str, Any] = {"__metadata__": meta}
    position = 0
    for name, array in arrays.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(array.tobytes() for array in arrays.values())])


def _read(data: bytes) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Metadata and raw tensors of safetensors bytes."""
    try:
        tensors = dict(deserialize(data))
        (length,) = struct.unpack_from("<Q", data)
        meta = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, struct.error, RecursionError) as e:
        raise InvalidArtifact(f"not a readable safetensors file: {e}") from e
    return meta, tensors


def _checksum(meta: Mapping[str, str], arrays: Mapping[str, tuple[tuple[int, ...], bytes]]) -> str:
    """sha256 (hex) over the metadata without its checksum, then each tensor's name, shape and bytes."""
    known = {name: text for name, text in meta.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name in _ARRAYS:
        shape, raw = arrays[name]
        digest.update(f"{name}{list(shape)}".encode() + raw)
    return digest.hexdigest()


def _array(name: str, dtype: str, shape: tuple[int, ...], raw: bytes) -> np.ndarray:
    if dtype != "F32":
        raise InvalidArtifact(f"{name} is {dtype}, not F32")
    array = np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape)
    array.flags.writeable = False
    return array


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise InvalidArtifact(f"{name} is {text!r}, not a whole number from 0 up")
    return int(text)


def _ids(text: str) -> tuple[int, ...]:
    ids = _parsed("anchor_ids", text)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise InvalidArtifact("anchor_ids is not a list of token ids")
    return tuple(ids)


def _mapping(name: str, text: str) -> dict[str, Any]:
    found = _parsed(name, text)
    if not isinstance(found, dict):
        raise InvalidArtifact(f"{name} is not a JSON object")
    return found


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidArtifact(f"{name} is not JSON: {e}") from e
