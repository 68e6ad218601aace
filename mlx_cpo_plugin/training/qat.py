"""Quantisation-aware training: the forward pass sees the weights as they will be deployed, quantised.

Source of the straight-through gradient: Bengio et al. 2013, arXiv 1308.3432.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.host.substrate import fake_quantizer
from mlx_cpo_plugin.layers.overrides import Call, overridden_calls
from mlx_cpo_plugin.layers.products import stored_weight

_ADAPTERS = (LoRALinear, DoRALinear, LoRASwitchLinear)


@dataclass
class FakeQuantisation:
    """When fake quantisation is in effect.

    Attributes:
        start_step: the first optimizer step, counted from 1, that it applies to.
        interval: it applies to every ``interval``-th step from there on.
        active: whether the forward passes that run now are fake-quantised.
    """

    start_step: int = 1
    interval: int = 1
    active: bool = False

    def applies_to(self, optimizer_step: int) -> bool:
        """Whether the optimizer step with this number, counted from 1, is fake-quantised."""
        since_start = optimizer_step - self.start_step
        return since_start >= 0 and since_start % self.interval == 0


@contextmanager
def fake_quantised(
    model: nn.Module, *, bits: int, group_size: int, start_step: int = 1, interval: int = 1
) -> Iterator[FakeQuantisation]:
    """Let the linear layers of ``model`` compute with fake-quantised weights while ``active`` is set.

    A layer with an adapter is fake-quantised as the merged weight W + s * B * A that will be deployed, over a quantised
    base too. The gradient passes straight through; the optimizer keeps the full-precision weights. Only this model's
    layers are touched, and all of it is undone when the context ends.

    Args:
        bits: 2 to 16.
        group_size: weights that share a scale along the input dimension; 0 or less: one scale for the whole tensor.

    Raises:
        ConfigError: this version of the host has no quantiser.
    """
    schedule = FakeQuantisation(start_step, interval)
    quantizer = fake_quantizer()
    replacements: list[tuple[nn.Module, Call]] = [
        (
            module,
            _fake_quantised_call(type(module).__call__, schedule, lambda weight: quantizer(weight, bits, group_size)),
        )
        for module in _linear_layers(model)
    ]
    with overridden_calls(replacements):
        yield schedule


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with an adapter, and the linear layers that are not inside one of these."""
    adapters = [module for module in model.modules() if isinstance(module, _ADAPTERS)]
    inside = {id(adapter.linear) for adapter in adapters}
    return adapters + [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def _fake_quantised_call(
    original: Call, schedule: FakeQuantisation, fake_quantize: Callable[[mx.array], mx.array]
) -> Call:
    def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = original(module, x, *args, **kwargs)
        if not schedule.active:
            return y
        # Adding the rounding error as a constant leaves the layer's own gradient, dropout included, untouched.
        merged = mx.stop_gradient(deployed_weight(module))
        error = (fake_quantize(merged) - merged).astype(x.dtype)
        if isinstance(module, LoRASwitchLinear):
            indices = args[0] if args else kwargs["indices"]
            return y + mx.gather_mm(x, error.swapaxes(-1, -2), rhs_indices=indices)
        return y + x @ error.T

    return call


def deployed_weight(module: nn.Module) -> mx.array:
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
