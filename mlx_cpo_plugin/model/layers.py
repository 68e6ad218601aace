"""Layers of a model: what they multiply with, with and without an adapter, and other calls in place of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.kernels.operations import BITS, Weight
from mlx_cpo_plugin.parameters import by_name

Call = Callable[..., Any]

ADAPTED = (LoRALinear, DoRALinear, LoRASwitchLinear)
WITH_ADAPTER = (*ADAPTED, LoRAEmbedding)
HALF_PRECISION = (mx.bfloat16, mx.float16)
# Layers of several weights [number, output, input], of which mlx_lm quantises each: of experts, and of heads.
STACKED = (SwitchLinear, MultiLinear)
LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


@contextmanager
def overridden_calls(
    replacements: Sequence[tuple[nn.Module, Call]], method: str = "__call__", row_by_row: bool = False
) -> Iterator[None]:
    """Let ``call(module, *args, **kwargs)`` answer each module's call until the context ends, normally or not.

    Only the modules given are touched, not their classes: another model in the same process keeps its behaviour.

    Args:
        method: the method to answer in place of the call.
        row_by_row: what the new classes say of themselves: that each output depends on its own row of the weight alone.
    """
    originals = [(module, type(module)) for module, _ in replacements]
    try:
        for module, call in replacements:
            original = type(module)
            # The name stays, since mlx_lm and error messages tell layers by it.
            body = {method: call, "__module__": original.__module__, "row_by_row": row_by_row}
            module.__class__ = type(original.__name__, (original,), body)
        yield
    finally:
        for module, original in reversed(originals):
            module.__class__ = original


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before :func:`overridden_calls`."""
    return next(kind for kind in type(module).__mro__ if "row_by_row" not in vars(kind))


def kernel_weight(module: nn.Module) -> Weight | None:
    """Return the weight of a linear layer or an embedding as the compiled kernels take it; None: they do not.

    That of a fake-quantised head is what a ``deployed_weight`` of its class returns, if it returns one.
    """
    deployed: Weight | None = module.deployed_weight() if hasattr(type(module), "deployed_weight") else None
    if deployed is not None:
        return deployed
    kind = original_class(module)
    if kind in (nn.Linear, nn.Embedding):
        known = module.weight.dtype in (mx.float32, *HALF_PRECISION)
        return Weight((module.weight,)) if known else None
    if kind in (nn.QuantizedLinear, nn.QuantizedEmbedding) and module.mode == "affine" and module.bits in BITS:
        return Weight((module.weight, module.scales, module.biases), module.bits, module.group_size)
    return None


def linear_layers(layer: nn.Module) -> list[nn.Module]:
    """Return the linear layers inside a layer, quantised or not."""
    return [module for module in layer.modules() if isinstance(module, LINEAR)]


def first_trained_layer(model: nn.Module) -> int:
    """Return the number of the first layer that is trained, or that comes after what is."""
    trained = [len(by_name(layer.trainable_parameters())) for layer in model.layers]
    if sum(trained) < len(by_name(model.trainable_parameters())):
        return 0
    return next((number for number, parameters in enumerate(trained) if parameters), 0)


def biased(layer: nn.Module, y: mx.array) -> mx.array:
    """Return the product with a linear layer's weight with its bias, if it has one."""
    return y + layer["bias"] if "bias" in layer else y


def is_half(module: nn.Module) -> bool:
    """Whether a layer multiplies with weights of half precision."""
    return isinstance(module, nn.Linear | nn.Embedding | SwitchLinear) and module.weight.dtype in HALF_PRECISION


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer, or the width and the tokens of an embedding."""
    outputs, inputs = module.weight.shape[-2:]
    if "scales" in module:
        inputs = inputs * 32 // module.bits
    return int(inputs), int(outputs)


def stored_weight(layer: nn.Module, rows: slice | mx.array = slice(None)) -> mx.array:
    """Return the weight [..., output, input] of a layer, dequantised to float32 where it is quantised.

    Args:
        rows: which outputs, of a layer with no more than these two dimensions.
    """
    if "scales" not in layer:
        return layer.weight[rows]
    scales, biases = layer.scales[rows], layer.get("biases")
    if biases is not None:  # of half precision, scales and biases would have each product with them rounded
        scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
    return mx.dequantize(
        layer.weight[rows],
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def dora_lengths(layer: DoRALinear) -> mx.array:
    """Return the length of each row of the weight with its adapter, float32 [output], by which DoRA divides.

    It has no gradient. Source: Liu et al. 2024, arXiv 2402.09353, section 4.3.
    """
    adapted = stored_weight(layer.linear).astype(mx.float32) + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    return mx.stop_gradient(mx.linalg.norm(adapted, axis=1))


def merged_weight(module: nn.Module, rows: slice | mx.array = slice(None)) -> mx.array:
    """Return the float32 weight [..., output, input] that a layer has once its adapter, if any, is fused into it.

    Args:
        rows: which outputs, of a layer with no more than these two dimensions; of an embedding, which tokens.
    """
    if isinstance(module, (nn.Linear, nn.Embedding, *STACKED)):
        return module.weight[rows].astype(mx.float32)
    lora_a, lora_b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if isinstance(module, LoRAEmbedding):
        return stored_weight(module.embedding, rows).astype(mx.float32) + module.scale * (lora_a[rows] @ lora_b)
    weight = stored_weight(module.linear, rows).astype(mx.float32)
    if isinstance(module, LoRASwitchLinear):
        return weight + module.scale * (lora_b @ lora_a)
    weight = weight + module.scale * (lora_b.T[rows] @ lora_a.T)
    if isinstance(module, DoRALinear):
        weight = weight * (module.m[rows].astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None]
    return weight


def dense_dtype(module: nn.Module) -> mx.Dtype:
    """Return the dtype of a layer's weight, with or without an adapter, once it is dequantised."""
    base = base_of(module)
    if "scales" not in base:
        return base.weight.dtype
    return base.scales.dtype if "biases" in base else mx.bfloat16  # the scales of other modes are integers


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter is for, or the layer itself."""
    if isinstance(module, LoRAEmbedding):
        return module.embedding
    return module.linear if isinstance(module, ADAPTED) else module
