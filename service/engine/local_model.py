"""A causal language model of transformers behind two calls: prefill one prompt, decode one token for many rows.

Every row has its own key-value buffer and attends to it alone, so there is no padding, nothing to compact when rows
leave, and a row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from service.engine import local_int8
from service.errors import ModelError

_ATTENTION = "detot_rows"


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt that has been read: what its samples start from.

    Attributes:
        kv: keys and values, `(layers, 2, 1, kv heads, n, head dim)`.
        logits: float32 `(vocabulary,)` of the token after the prompt.
    """

    kv: torch.Tensor
    logits: torch.Tensor

    @property
    def length(self) -> int:
        return self.kv.shape[4]


@dataclass(slots=True)
class RowCache:
    """Keys and values of one row: per layer `(2, 1, kv heads, capacity, head dim)`, `length` positions filled."""

    layers: tuple[torch.Tensor, ...]
    length: int

    @classmethod
    def start(cls, prefix: Prefix, capacity: int) -> RowCache:
        shape = list(prefix.kv.shape)
        shape[4] = capacity
        kv = prefix.kv.new_empty(shape)
        kv[..., : prefix.length, :] = prefix.kv
        return cls(kv.unbind(0), prefix.length)


class _PrefillCache:
    """What transformers takes for a cache while a prompt is read: keeps what it is given."""

    is_compileable = False

    def __init__(self, layers: int) -> None:
        self.kv: list[torch.Tensor] = [torch.empty(0)] * layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.kv[layer_idx] = torch.stack((k, v))
        return k, v


class _DecodeCache:
    """The same while one token is decoded for each row: hands attention every row's own keys and values."""

    is_compileable = False

    def __init__(self, rows: Sequence[RowCache]) -> None:
        self.rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(row.length for row in self.rows)

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        keys, values = [], []
        for new, row in zip(torch.stack((k, v)).unsqueeze(2).unbind(1), self.rows, strict=True):
            kv = row.layers[layer_idx].narrow(3, 0, row.length + 1)
            kv.narrow(3, row.length, 1).copy_(new)
            key, value = kv.unbind(0)
            keys.append(key)
            values.append(value)
        return keys, values


def _attention(
    module: nn.Module, query: torch.Tensor, key: Any, value: Any, mask: None, *, scaling: float, **kw: Any
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: causal over a prompt, or row by row over the lists that `_DecodeCache` gives."""
    if kw.get("softcap") is not None or kw.get("s_aux") is not None:
        raise ModelError("models with attention soft-capping or sinks are not supported by the local engine")
    rows, heads, tokens, width = query.shape
    if isinstance(key, torch.Tensor):
        group = heads // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, scale=scaling)
        return out.transpose(1, 2), None
    grouped = query.view(rows, 1, key[0].shape[1], -1, width).unbind(0)
    parts = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in zip(grouped, key, value, strict=True)]
    return torch.cat(parts).view(rows, 1, heads, width), None


AttentionInterface.register(_ATTENTION, _attention)


class LanguageModel:
    """The weights and what is done with them. All calls from one thread.

    Attributes:
        hidden_size, vocab_size: shape `(v, d)` of the embedding table.
        positions: longest sequence the model was made for.
    """

    def __init__(self, folder: Path, *, device: str, quantize: bool) -> None:
        """Load a model folder.

        Raises:
            ModelError: the folder cannot be read as a causal language model, or it is of a kind not supported here.
        """
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        stored = "auto" if quantize else self.dtype
        try:
            disable_progress_bar()  # of transformers; this process shows its own
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=stored, attn_implementation=_ATTENTION)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise ModelError(f"{folder} cannot be loaded as a causal language model: {e}") from e
        self._embedding = model.get_input_embeddings()
        if type(self._embedding) is not nn.Embedding:
            raise ModelError(f"{folder}: input embeddings of type {type(self._embedding).__name__} are not supported")
        if quantize:
            local_int8.quantise(model)
            _widen(model, keep=self._embedding)
        self._model = model.eval().requires_grad_(False).to(self.device)
        config = model.config.get_text_config()
        self.vocab_size, self.hidden_size = self._embedding.weight.shape
        self.positions = min(config.max_position_embeddings, _window(config))
        self._layers = config.num_hidden_layers

    def prefill(self, token_ids: Sequence[int], span: tuple[int, int], soft: np.ndarray | None) -> Prefix:
        """Read a prompt; the soft prompt, float32 `(stop - start, d)`, replaces the embeddings of the span."""
        embeds = self._embed(torch.tensor([token_ids], device=self.device))
        if soft is not None:
            embeds[0, span[0] : span[1]] = torch.tensor(soft, dtype=self.dtype, device=self.device)
        cache = _PrefillCache(self._layers)
        logits = self._forward(embeds, torch.arange(len(token_ids), device=self.device)[None], cache)
        return Prefix(torch.stack(cache.kv), logits[0])

    def decode(self, rows: Sequence[RowCache], tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row: float32 logits `(rows, vocabulary)` of the next."""
        embeds = self._embed(torch.tensor(tokens, device=self.device)[:, None])
        positions = torch.tensor([row.length for row in rows], device=self.device)[:, None]
        logits = self._forward(embeds, positions, _DecodeCache(rows))
        for row in rows:
            row.length += 1
        return logits

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._embedding(ids).to(self.dtype)

    def _forward(self, embeds: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self._model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].float()


def _widen(model: nn.Module, keep: nn.Module) -> None:
    """All parameters and buffers to float32, but the embedding table stays as stored: its values are equal anyway."""
    for module in model.modules():
        if module is not keep:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()


def _window(config: Any) -> int:
    """Within its sliding window, a layer attends to everything; longer sequences are not served."""
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.sliding_window if sliding and config.sliding_window else config.max_position_embeddings
