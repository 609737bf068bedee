"""Linear layers with int8 weights on CPU: exact integer products, so a row's result never depends on the other rows.

Weights are quantised per output channel, activations per row (LLM.int8(), 2208.07339, without its outlier path). See
docs/decisions/0002-int8-on-cpu.md for what else was tried.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

_ENGINE = "fbgemm"
_VNNI, _NARROW = (127, 128), (63, 64)  # (largest activation, zero point)


def supported() -> bool:
    """Whether this machine's PyTorch has the int8 kernels that are used here (x86)."""
    return _ENGINE in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
    )


class Int8Linear(nn.Module):
    """`x -> x W^T + b` with int8 weights; float32 in and out, shapes as `nn.Linear`."""

    def __init__(self, linear: nn.Linear, levels: tuple[int, int]) -> None:
        super().__init__()
        self.levels, self.zero = levels
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
        self.packed = _pack(weight, scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(self.levels)
        out = _product(rows / scale, self.zero, self.packed).mul_(scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


def quantise(model: nn.Module) -> None:
    """Replace every linear layer of a model in place."""
    levels = _levels()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child, levels))


def _pack(weight: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():  # newer releases mean to drop quantised tensors; `supported` will notice
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        return torch.ops.quantized.linear_prepack(quantised, None)
    finally:
        torch.backends.quantized.engine = before


def _product(rows: torch.Tensor, zero: int, packed: torch.ScriptObject) -> torch.Tensor:
    """Rounds `rows` to integers and multiplies, with a 32-bit accumulator."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, zero, packed)


def _levels() -> tuple[int, int]:
    """Processors without VNNI add pairs of products in 16 bits, which overflow: there activations get 7 bits."""
    ones = torch.ones(16, 64)
    exact = _product(127 * ones, 128, _pack(127 * ones, torch.ones(16)))
    return _VNNI if torch.equal(exact, torch.full((16, 16), 64.0 * 127 * 127)) else _NARROW
