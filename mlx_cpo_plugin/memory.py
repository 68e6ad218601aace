"""How much memory there is, and how much of it a token takes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_cpo_plugin.parameters import by_name

# Share of the memory that is free after loading the model which the activations of a pass may take.
SHARE_FOR_ACTIVATIONS = 0.5


def device_memory_limit() -> int | None:
    """Return the bytes that Metal recommends to keep wired, or ``None`` where there is no such limit."""
    info: dict[str, Any] = mx.device_info()
    limit = info.get("max_recommended_working_set_size")
    return int(limit) if limit else None


def device_memory() -> int:
    """Return the bytes that a process may well use: what Metal recommends, elsewhere MLX's own limit."""
    return device_memory_limit() or mx.get_memory_limit()


def kept_bytes_per_token(model: nn.Module) -> int:
    """Return about how many bytes are kept for the backward pass of a token: what goes into and out of its products."""
    numbers = 0
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear | nn.QuantizedLinear | SwitchLinear | QuantizedSwitchLinear):
                numbers += _width(module)
    return numbers * _activation_size(model)


def tokens_that_fit(model: nn.Module) -> float:
    """Return about how many tokens a pass may have beside the model, for the device's memory."""
    free = device_memory() - mx.get_active_memory()
    return SHARE_FOR_ACTIVATIONS * max(free, 0) / max(kept_bytes_per_token(model), 1)


def _width(module: nn.Module) -> int:
    """Return the inputs and outputs of a linear layer."""
    outputs, inputs = module.weight.shape[-2:]
    if isinstance(module, nn.QuantizedLinear | QuantizedSwitchLinear):
        inputs = inputs * 32 // module.bits
    return int(outputs + inputs)


def _activation_size(model: nn.Module) -> int:
    """Return the bytes of a number in the model's activations."""
    floats = [array for array in by_name(model.parameters()).values() if mx.issubdtype(array.dtype, mx.floating)]
    return min((array.dtype.size for array in floats), default=4)
