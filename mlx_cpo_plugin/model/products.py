"""Products in float32, whatever the weights are stored as.

On a CPU MLX has no fast product with packed weights, nor with half-precision ones. So activations are float32 from the
embedding on, as in a model of float32 weights, and each product unpacks or widens its own weight, forwards and once
more backwards: what is in memory beside the stored weights is a part of one layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.model.layers import Call, biased, dora_lengths, is_half, overridden_calls, stored_weight

# With fewer rows than this, reading the packed weights once is faster than unpacking them.
FEWEST_ROWS = 8
# Numbers of a weight that are unpacked or widened at a time.
PART_ELEMENTS = 2**22
# MLX takes the memory of so many operations, of which half are products, before the first of them is done.
_PARTS_AHEAD = 5

_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute in float32 until the context ends, with its weights as they are stored.

    A weight that is trained gets its gradient in its own dtype. On a GPU nothing changes, nor in a model that is no
    ``nn.Module``.
    """
    if current_device().fast_half_products or not isinstance(model, nn.Module):
        yield
        return
    stored = [module for module in model.modules() if isinstance(module, _PACKED) or is_half(module)]
    linears = [module for module in stored if isinstance(module, nn.Linear | nn.QuantizedLinear)]
    embeddings = [module for module in stored if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
    layers: list[tuple[nn.Module, Call]] = [(linear, _product(type(linear).__call__)) for linear in linears]
    layers += [(embedding, _widened(type(embedding).__call__)) for embedding in embeddings]
    around: list[tuple[nn.Module, Call]] = [(m, _switched) for m in stored if isinstance(m, SwitchLinear)]
    inside = {id(linear) for linear in linears}
    around += [(m, _with_dora) for m in model.modules() if isinstance(m, DoRALinear) and id(m.linear) in inside]
    heads: list[tuple[nn.Module, Call]] = [(embedding, _product(type(embedding).as_linear)) for embedding in embeddings]
    with ExitStack() as stack:
        stack.enter_context(overridden_calls(layers, row_by_row=True))
        stack.enter_context(overridden_calls(around))
        stack.enter_context(overridden_calls(heads, method="as_linear", row_by_row=True))
        yield


def _widened(original: Call) -> Call:
    def call(embedding: nn.Module, x: mx.array) -> mx.array:
        rows = stored_weight(embedding, x) if isinstance(embedding, _PACKED) else original(embedding, x)
        return rows.astype(mx.float32)

    return call


def _product(original: Call) -> Call:
    def call(layer: nn.Module, x: mx.array) -> mx.array:
        if isinstance(layer, _PACKED) and x.size < FEWEST_ROWS * x.shape[-1]:
            return original(layer, x)
        return biased(layer, product(layer, x))

    return call


def _with_dora(layer: nn.Module, x: mx.array) -> mx.array:
    """Return what mlx_lm's ``DoRALinear`` does, which multiplies by itself with the weight of its linear layer."""
    y = product(layer.linear, x)
    z = (layer.dropout(x) @ layer.lora_a) @ layer.lora_b
    y = (layer.m / dora_lengths(layer)).astype(x.dtype) * (y + (layer.scale * z).astype(x.dtype))
    return biased(layer.linear, y)


def product(layer: nn.Module, x: mx.array) -> mx.array:
    """Return ``x @ W.T`` [..., output] of x [..., input], computed in float32, in the dtype of ``x``.

    Args:
        layer: a linear layer or an embedding, packed or not.
    """
    packed = isinstance(layer, _PACKED)
    rows = max(1, PART_ELEMENTS // x.shape[-1])
    parts = [slice(start, start + rows) for start in range(0, len(layer.weight), rows)]

    def widened(weight: mx.array, part: slice) -> mx.array:
        return (stored_weight(layer, part) if packed else weight[part]).astype(mx.float32)

    @mx.custom_function
    def multiply(x: mx.array, weight: mx.array) -> mx.array:
        x, products = x.astype(mx.float32), []
        for part in parts:
            products.append(x @ widened(weight, part).T)
            x = mx.depends(x, products[-1])  # one part after the other, or all of them would be in memory
        return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)

    @multiply.vjp
    def multiply_vjp(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        grad_x = cotangent[..., parts[0]] @ widened(weight, parts[0])
        for part in parts[1:]:
            grad_x = grad_x + cotangent[..., part] @ widened(weight, part)
        if packed:
            return grad_x.astype(x.dtype), mx.zeros_like(weight)
        rows_of_x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        rows_of_y = cotangent.reshape(len(rows_of_x), -1)
        grad_weight = [(rows_of_y[:, part].T @ rows_of_x).astype(weight.dtype) for part in parts]
        return grad_x.astype(x.dtype), mx.concatenate(grad_weight)

    result: Any = multiply(x, mx.zeros(0) if packed else layer.weight)
    return result.astype(x.dtype)


def _switched(layer: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """Return what mlx_lm's ``SwitchLinear`` does, computed in float32, in the dtype of ``x``."""

    def gathered(x: mx.array, weight: mx.array) -> mx.array:
        experts = weight.astype(mx.float32).swapaxes(-1, -2)
        return mx.gather_mm(x.astype(mx.float32), experts, rhs_indices=indices, sorted_indices=sorted_indices)

    @mx.custom_function
    def multiply(x: mx.array, weight: mx.array) -> mx.array:
        return gathered(x, weight)

    @multiply.vjp
    def multiply_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> Any:
        # Differentiated here, the weight is widened once more instead of being kept.
        return tuple(mx.vjp(lambda x, weight: [gathered(x, weight)], list(primals), [cotangent])[1])

    result: Any = multiply(x, layer.weight)
    y = result.astype(x.dtype)
    return y + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else y


def widened_bytes(model: nn.Module) -> int:
    """Return about what unpacked and widened weights of the layers take at a time; a head is taken in small blocks."""
    if current_device().fast_half_products:
        return 0
    sizes = [0]
    for module in (module for layer in model.layers for module in layer.modules()):
        if isinstance(module, _PACKED):
            sizes.append(_PARTS_AHEAD * min(module.weight.size * 32 // module.bits, PART_ELEMENTS))
        elif is_half(module):
            size = module.weight.size
            sizes.append(size if isinstance(module, SwitchLinear) else _PARTS_AHEAD * min(size, PART_ELEMENTS))
    return mx.float32.size * max(sizes)
