"""int8 linear layers: close to the float layer, and exact in what must be exact."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from service.engine import local_int8  # noqa: E402
from service.engine.local_int8 import Int8Linear  # noqa: E402

pytestmark = pytest.mark.skipif(not local_int8.supported(), reason="no int8 kernels on this processor")


def layer(bias: bool = True) -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(256, 320, bias=bias)


@pytest.mark.parametrize("levels", [local_int8._VNNI, local_int8._NARROW])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_integer_product_of_the_rounded_values(levels: tuple[int, int], bias: bool):
    linear, x = layer(bias), torch.randn(2, 3, 256)
    weight = linear.weight.detach()
    scale = weight.abs().amax(1) / 127
    row = x.abs().amax(2, keepdim=True) / levels[0]
    product = (x / row).round().double() @ (weight / scale[:, None]).round().double().T
    want = product * row * scale + (linear.bias.detach() if bias else 0)
    got = Int8Linear(linear, levels)(x)
    assert got.shape == (2, 3, 320)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert (got - linear(x)).norm() / linear(x).norm() < 1.5 / levels[0]


def test_rows_do_not_influence_each_other():
    linear, x = Int8Linear(layer(), local_int8._levels()), torch.randn(33, 256)
    x[5] *= 1e6
    together = linear(x)
    assert all(torch.equal(linear(x[i : i + 1])[0], together[i]) for i in range(33))
    assert torch.equal(linear(x[7:12]), together[7:12])


def test_rows_of_zeros_and_weights_of_zeros():
    linear = layer()
    torch.nn.init.zeros_(linear.weight)
    assert torch.equal(Int8Linear(linear, local_int8._VNNI)(torch.zeros(2, 256)), linear.bias.expand(2, -1))


def test_quantise_replaces_every_linear_layer():
    model = torch.nn.Sequential(layer(), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(320, 8)))
    local_int8.quantise(model)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert model(torch.randn(4, 256)).shape == (4, 8)
