"""Soft prompts as PROMPT_TUNING adapters of Hugging Face's peft library, both ways (peft `tuners/prompt_tuning`).

An adapter holds the soft prompt itself, `prompt_embeddings (k, d)`; this service keeps the anchor and the offset from
it. The vectors are the same, their place is not: peft puts them before the whole sequence, this service at the end of
the system message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from service.core.artifact import MAX_BYTES, Artifact
from service.errors import InvalidArtifact

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "prompt_embeddings"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def to_peft(artifact: Artifact) -> tuple[bytes, bytes]:
    """Contents of `adapter_config.json` and `adapter_model.safetensors` for a version's soft prompt, float32."""
    k, d = artifact.offset.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": artifact.model_id,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": k,
        "token_dim": d,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
    }
    soft = np.ascontiguousarray(artifact.anchor + artifact.offset, np.float32)
    note = {"task": artifact.task, "version": str(artifact.version), "anchor_text": artifact.anchor_text}
    return json.dumps(config, indent=2).encode(), save({_NAME: soft}, metadata=note)


def from_peft(config: bytes, weights: bytes, base: Artifact) -> Artifact:
    """An artifact whose soft prompt is an adapter's: offset = prompt embeddings - anchor rows.

    Args:
        config, weights: contents of the adapter's two files.
        base: an artifact with the task, model and anchor that the soft prompt is to stand on; its offset is replaced.

    Raises:
        InvalidArtifact: no PROMPT_TUNING adapter, or `(k, d)` is not that of the anchor's embeddings.
    """
    settings = _config(config)
    soft = _embeddings(weights)
    k, d = base.anchor.shape
    if soft.shape[0] != k:
        raise InvalidArtifact(f"the adapter has {soft.shape[0]} virtual tokens; the anchor of {base.task!r} has {k}")
    if soft.shape[1] != d:
        raise InvalidArtifact(
            f"the adapter's embeddings have {soft.shape[1]} values; those of {base.model_id} have {d}"
        )
    known = {name: settings[name] for name in ("base_model_name_or_path", "peft_version") if name in settings}
    return replace(base, offset=soft - base.anchor, refiner="peft", settings=known, evidence={})


def _config(data: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(data)
        kind = config.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as e:
        raise InvalidArtifact(f"{CONFIG} is not a JSON object: {e}") from e
    if kind != "PROMPT_TUNING":
        raise InvalidArtifact(f"{CONFIG}: peft_type is {kind!r}; only 'PROMPT_TUNING' can be imported")
    return config


def _embeddings(data: bytes) -> np.ndarray:
    """The adapter's only tensor of interest, float32 `(k, d)`."""
    if len(data) > MAX_BYTES:
        raise InvalidArtifact(f"{WEIGHTS} has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        tensors = dict(deserialize(data))
    except (SafetensorError, ValueError, struct.error) as e:
        raise InvalidArtifact(f"{WEIGHTS} is not a readable safetensors file: {e}") from e
    if _NAME not in tensors:
        raise InvalidArtifact(f"{WEIGHTS} holds {sorted(tensors)}, not {_NAME!r}")
    tensor = tensors[_NAME]
    if tensor["dtype"] not in _DTYPES or len(tensor["shape"]) != 2:
        raise InvalidArtifact(f"{_NAME} is {tensor['dtype']} {tensor['shape']}; {', '.join(_DTYPES)} (k, d) are read")
    raw = np.frombuffer(bytes(tensor["data"]), _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
