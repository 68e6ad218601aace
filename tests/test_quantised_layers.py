"""Quantised layers on a CPU multiply with unpacked weights, and compute what packed ones do."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cpo_plugin.layers.quantised import unpacked_products

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="on a GPU packed weights are multiplied as they are"
)

MODES = {
    "affine, 4 bits": {"bits": 4, "group_size": 64},
    "affine, 8 bits": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


class OneLayer(nn.Module):
    """A quantised linear layer, or a quantised embedding as a head."""

    def __init__(self, head: bool, bias: bool = False, **quantisation: object) -> None:
        super().__init__()
        if head:
            self.layer = nn.QuantizedEmbedding.from_embedding(nn.Embedding(96, 128), **quantisation)
        else:
            self.layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 96, bias=bias), **quantisation)
        self.head = head

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer.as_linear(x) if self.head else self.layer(x)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_equal_those_of_packed_weights(mode: str, head: bool) -> None:
    mx.random.seed(0)
    model, x, upstream = OneLayer(head, **MODES[mode]), mx.random.normal((3, 20, 128)), mx.random.normal((3, 20, 96))

    def loss(x: mx.array) -> mx.array:
        return (model(x) * upstream).sum()

    packed, packed_slope = model(x), mx.grad(loss)(x)
    with unpacked_products(model):
        unpacked, unpacked_slope = model(x), mx.grad(loss)(x)

    np.testing.assert_allclose(np.array(unpacked), np.array(packed), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(unpacked_slope), np.array(packed_slope), rtol=1e-4, atol=1e-4)


def test_a_bias_is_added() -> None:
    model = OneLayer(head=False, bias=True, **MODES["affine, 4 bits"])
    x = mx.random.normal((20, 128))

    with unpacked_products(model):
        unpacked = model(x)

    np.testing.assert_allclose(np.array(unpacked), np.array(model(x)), rtol=1e-4, atol=1e-4)


def test_the_packed_product_is_used_for_few_rows_and_after_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OneLayer(head=False, **MODES["affine, 4 bits"])
    original, calls = mx.quantized_matmul, []
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **named: calls.append(1) or original(*args, **named))

    with unpacked_products(model):
        model(mx.ones((20, 128)))
        assert not calls
        model(mx.ones((2, 128)))
    model(mx.ones((20, 128)))

    assert len(calls) == 2
    assert type(model.layer) is nn.QuantizedLinear
