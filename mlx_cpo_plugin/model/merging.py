"""Adapters merged into the weights that they change."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.model.products import stored_weight

MERGEABLE = (LoRALinear, DoRALinear, LoRASwitchLinear)


def merged_weight(module: nn.Module) -> mx.array:
    """Return the float32 weight [..., output, input] that a linear layer has once its adapter is fused into it."""
    if isinstance(module, nn.Linear):
        return module.weight.astype(mx.float32)
    weight = stored_weight(module.linear).astype(mx.float32)
    lora_a, lora_b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if isinstance(module, LoRASwitchLinear):
        return weight + module.scale * (lora_b @ lora_a)
    weight = weight + module.scale * (lora_b.T @ lora_a.T)
    if isinstance(module, DoRALinear):
        weight = weight * (module.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None]
    return weight


def dense_dtype(module: nn.Module) -> mx.Dtype:
    """Return the dtype that the weight of a linear layer has, with or without an adapter, when it is not packed."""
    linear = module.linear if isinstance(module, MERGEABLE) else module
    if "scales" not in linear:
        return linear.weight.dtype
    return linear.scales.dtype if "biases" in linear else mx.bfloat16  # the scales of other modes are no numbers
