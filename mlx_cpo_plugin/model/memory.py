"""How many bytes a token keeps for the backward pass, and how many tokens fit."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_cpo_plugin.device import current_device, device_memory
from mlx_cpo_plugin.errors import is_device_fault
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.caches import ARCHITECTURE_ERRORS, SegmentCache, cache_arrays, fresh_caches, leaves
from mlx_cpo_plugin.model.layers import LINEAR, first_trained_layer, linear_layers, widths
from mlx_cpo_plugin.model.logps import evaluation_mode
from mlx_cpo_plugin.parameters import by_name

# Share of the memory that is free after loading the model which the activations of a pass may take.
SHARE_FOR_ACTIVATIONS = 0.5
# Arrays that the gradient of a GELU reads besides those that products keep: the argument of its tanh, half of x, tanh
# plus one, and the result.
GELU_KEEPS = 4


def tokens_that_fit(model: nn.Module) -> float:
    """Return about how many tokens a pass may have beside the model, for the device's memory."""
    free = device_memory() - mx.get_active_memory()
    return SHARE_FOR_ACTIVATIONS * max(free, 0) / max(sum(kept_bytes_of_layers(model)), 1)


def kept_bytes_of_layers(model: nn.Module) -> list[int]:
    """Return about how many bytes each layer keeps of a token for the backward pass.

    These are the inputs and outputs of its products, and what a GELU keeps; below the first trained layer it is none.
    """
    size = activation_size(model)
    lean = hasattr(sys.modules.get(type(model.layers[0]).__module__), "swiglu")
    kept = [
        sum(_kept_bytes(module, size) for module in layer.modules())
        + (not lean) * GELU_KEEPS * size * max((widths(module)[1] for module in linear_layers(layer)), default=0)
        for layer in model.layers
    ]
    first = first_trained_layer(model)
    return [0] * first + kept[first:]


def remembered_by_token(model: nn.Module) -> int:
    """Return how many numbers all layers remember of each earlier token; 0 where that does not show.

    It shows in the shapes of what they remember of one token; no array is evaluated.
    """
    try:
        caches = fresh_caches(model)
        with evaluation_mode(model):
            model(mx.zeros((1, 1), mx.int32), cache=caches)
        by_token = [cache for cache in leaves(caches) if isinstance(cache, SegmentCache)]
        return sum(array.size for array in cache_arrays(by_token))
    except ARCHITECTURE_ERRORS as error:
        if is_device_fault(error):
            raise
        return 0


def _kept_bytes(module: nn.Module, size: int) -> int:
    """Return what a module by itself keeps of a token, in activations of ``size`` bytes."""
    if not isinstance(module, LoRALinear | DoRALinear):
        if not isinstance(module, LINEAR):
            return 0
        return sum(widths(module)[library.in_use() :]) * size  # the compiled kernels compute inputs once more
    inputs, outputs = widths(module.linear)
    wider = module.lora_a.dtype.size  # the adapter may read a copy of what the layer reads
    dropped = (size + 1) * (module.dropout._p_1 < 1)
    return inputs * (wider * (wider > size) + dropped) + outputs * size * isinstance(module, DoRALinear)


def activation_size(model: nn.Module) -> int:
    """Return the bytes of a number in the model's activations."""
    if not current_device().fast_half_products:
        return mx.float32.size
    floats = [array for array in by_name(model.parameters()).values() if mx.issubdtype(array.dtype, mx.floating)]
    return min((array.dtype.size for array in floats), default=4)
