"""How many bytes a token keeps for the backward pass, and how many tokens fit."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_cpo_plugin.device import current_device, device_memory
from mlx_cpo_plugin.model.layers import LINEAR, widths
from mlx_cpo_plugin.parameters import by_name

# Share of the memory that is free after loading the model which the activations of a pass may take.
SHARE_FOR_ACTIVATIONS = 0.5


def tokens_that_fit(model: nn.Module) -> float:
    """Return about how many tokens a pass may have beside the model, for the device's memory."""
    free = device_memory() - mx.get_active_memory()
    return SHARE_FOR_ACTIVATIONS * max(free, 0) / max(sum(kept_bytes_of_layers(model)), 1)


def kept_bytes_of_layers(model: nn.Module) -> list[int]:
    """Return about how many bytes each layer keeps of a token for the backward pass.

    These are the inputs and outputs of its products; below the first layer that is trained nothing is kept.
    """
    size = activation_size(model)
    kept = [sum(_kept_bytes(module, size) for module in layer.modules()) for layer in model.layers]
    trained = [number for number, layer in enumerate(model.layers) if by_name(layer.trainable_parameters())]
    inside = sum(len(by_name(model.layers[number].trainable_parameters())) for number in trained)
    if not trained or inside < len(by_name(model.trainable_parameters())):
        return kept
    return [bytes_kept if number >= trained[0] else 0 for number, bytes_kept in enumerate(kept)]


def _kept_bytes(module: nn.Module, size: int) -> int:
    """Return what a module by itself keeps of a token, in activations of ``size`` bytes."""
    if isinstance(module, LoRALinear | DoRALinear):
        inputs, outputs = widths(module.linear)
        kept = outputs * size if isinstance(module, DoRALinear) else 0
        if module.lora_a.dtype.size > size:  # the adapter reads a wider copy of what the layer reads
            kept += inputs * module.lora_a.dtype.size
        if module.dropout._p_1 < 1:
            kept += inputs * (size + 1)
        return kept
    return sum(widths(module)) * size if isinstance(module, LINEAR) else 0


def activation_size(model: nn.Module) -> int:
    """Return the bytes of a number in the model's activations."""
    if not current_device().fast_half_products:
        return mx.float32.size
    floats = [array for array in by_name(model.parameters()).values() if mx.issubdtype(array.dtype, mx.floating)]
    return min((array.dtype.size for array in floats), default=4)
