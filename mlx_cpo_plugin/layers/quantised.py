"""Quantised layers on a CPU: unpacked for each product, since MLX has no fast product with packed weights there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.layers.overrides import overridden_calls

# With fewer rows than this, reading the packed weights once is faster than unpacking them.
FEWEST_ROWS = 8


@contextmanager
def unpacked_products(model: nn.Module) -> Iterator[None]:
    """Let the quantised linear layers and heads of ``model`` multiply with unpacked weights until the context ends.

    The weights are unpacked anew in the backward pass: no more than one layer's are in memory at a time. On a GPU
    nothing changes.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        yield
        return
    linears = [module for module in model.modules() if isinstance(module, nn.QuantizedLinear)]
    embeddings = [module for module in model.modules() if isinstance(module, nn.QuantizedEmbedding)]
    with ExitStack() as stack:
        stack.enter_context(overridden_calls([(linear, _product(type(linear).__call__)) for linear in linears]))
        heads = [(embedding, _product(type(embedding).as_linear)) for embedding in embeddings]
        stack.enter_context(overridden_calls(heads, method="as_linear"))
        yield


def _product(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(layer: nn.Module, x: mx.array) -> mx.array:
        if x.size < FEWEST_ROWS * x.shape[-1]:
            return original(layer, x)

        @mx.custom_function
        def multiply(x: mx.array) -> mx.array:
            return x @ unpacked_weight(layer).astype(x.dtype).T

        @multiply.vjp
        def multiply_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            return cotangent @ unpacked_weight(layer).astype(cotangent.dtype)

        y: Any = multiply(x)
        return y + layer["bias"] if "bias" in layer else y

    return call


def unpacked_weight(layer: nn.Module) -> mx.array:
    """Return the weight [..., output, input] of a quantised layer, in the dtype of its scales."""
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
