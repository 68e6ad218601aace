"""How much memory there is, and how much of it a token takes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_cpo_plugin.device import current_device, device_memory
from mlx_cpo_plugin.parameters import by_name

_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)

# Share of the memory that is free after loading the model which the activations of a pass may take.
SHARE_FOR_ACTIVATIONS = 0.5


def kept_bytes_per_token(model: nn.Module) -> int:
    """Return about how many bytes are kept for the backward pass of a token: what goes into and out of its products."""
    return sum(kept_bytes_of_layers(model))


def kept_bytes_of_layers(model: nn.Module) -> list[int]:
    """Return :func:`kept_bytes_per_token` of each layer; below the first one that is trained nothing is kept."""
    size = activation_size(model)
    kept = [sum(_kept_bytes(module, size) for module in layer.modules()) for layer in model.layers]
    trained = [number for number, layer in enumerate(model.layers) if by_name(layer.trainable_parameters())]
    inside = sum(len(by_name(model.layers[number].trainable_parameters())) for number in trained)
    if not trained or inside < len(by_name(model.trainable_parameters())):
        return kept
    return [bytes_kept if number >= trained[0] else 0 for number, bytes_kept in enumerate(kept)]


def tokens_that_fit(model: nn.Module) -> float:
    """Return about how many tokens a pass may have beside the model, for the device's memory."""
    free = device_memory() - mx.get_active_memory()
    return SHARE_FOR_ACTIVATIONS * max(free, 0) / max(kept_bytes_per_token(model), 1)


def linear_layers(layer: nn.Module) -> list[nn.Module]:
    """Return the linear layers inside a layer, packed or not."""
    return [module for module in layer.modules() if isinstance(module, _LINEAR)]


def _kept_bytes(module: nn.Module, size: int) -> int:
    """Return what a module by itself keeps of a token, in activations of ``size`` bytes a number."""
    if isinstance(module, _LINEAR):
        return sum(widths(module)) * size
    if not isinstance(module, LoRALinear | DoRALinear):
        return 0
    inputs, outputs = widths(module.linear)
    kept = outputs * size if isinstance(module, DoRALinear) else 0
    if module.lora_a.dtype.size > size:  # the adapter reads a wider copy of what the layer reads
        kept += inputs * module.lora_a.dtype.size
    if module.dropout._p_1 < 1:
        kept += inputs * (size + 1)
    return kept


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    outputs, inputs = module.weight.shape[-2:]
    if isinstance(module, nn.QuantizedLinear | QuantizedSwitchLinear):
        inputs = inputs * 32 // module.bits
    return int(inputs), int(outputs)


def activation_size(model: nn.Module) -> int:
    """Return the bytes of a number in the model's activations, which are float32 on a CPU whatever the weights are."""
    if not current_device().fast_half_products:
        return mx.float32.size
    floats = [array for array in by_name(model.parameters()).values() if mx.issubdtype(array.dtype, mx.floating)]
    return min((array.dtype.size for array in floats), default=4)
