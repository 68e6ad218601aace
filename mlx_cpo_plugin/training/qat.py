"""Quantisation-aware training: the forward pass sees the weights as they will be deployed, quantised.

Source of the straight-through gradient: Bengio et al. 2013, arXiv 1308.3432.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlx_cpo_plugin.host import fake_quantizer
from mlx_cpo_plugin.model.layers import ADAPTED, Call, dense_dtype, merged_weight, overridden_calls
from mlx_cpo_plugin.settings.options import AUTO, HOST, MODES, mlx_quantises

Quantizer = Callable[[mx.array, mx.Dtype], mx.array]


@dataclass
class FakeQuantisation:
    """When fake quantisation applies: every ``interval``-th optimizer step from ``start_step`` on, counted from 1.

    Attributes:
        active: whether the forward passes that run now are fake-quantised.
    """

    start_step: int = 1
    interval: int = 1
    active: bool = False

    def applies_to(self, optimizer_step: int) -> bool:
        """Whether the optimizer step with this number is fake-quantised."""
        since_start = optimizer_step - self.start_step
        return since_start >= 0 and since_start % self.interval == 0


@contextmanager
def fake_quantised(
    model: nn.Module,
    *,
    bits: int,
    group_size: int,
    quantizer: str = AUTO,
    mode: str = "affine",
    start_step: int = 1,
    interval: int = 1,
) -> Iterator[FakeQuantisation]:
    """Let the linear layers of ``model`` compute with fake-quantised weights while ``active`` is set.

    A layer with an adapter is fake-quantised as the merged weight W + s * B * A that will be deployed, over a quantised
    base too. The gradient passes straight through; the optimizer keeps the full-precision weights. Only this model's
    layers are touched, and all of it is undone when the context ends.

    Args:
        bits: 2 to 16.
        group_size: weights that share a scale along the input dimension; 0 or less: one scale for the whole tensor.
        quantizer, mode: see :func:`quantizer_for`.
    """
    schedule = FakeQuantisation(start_step, interval)
    round_trip = quantizer_for(quantizer, bits, group_size, mode)
    replacements: list[tuple[nn.Module, Call]] = [
        (module, _fake_quantised_call(type(module).__call__, schedule, round_trip)) for module in _linear_layers(model)
    ]
    with overridden_calls(replacements):
        yield schedule


def quantizer_for(name: str, bits: int, group_size: int, mode: str = "affine") -> Quantizer:
    """Return a function from a float32 weight and the dtype it is deployed in to the weight after quantisation.

    Args:
        name: ``mlx``, which packs as ``mlx_lm.convert`` and ``fuse_bits`` do; ``host``, mlx-lm-lora's symmetric one;
            ``auto``, the former where it has these bits and this group size.
        mode: of ``mx.quantize``; all but ``affine`` bring their own bits and group size.
    """
    if name == HOST or (name == AUTO and not mlx_quantises(bits, group_size, mode)):
        host = fake_quantizer()
        return lambda weight, _: host(weight, bits, group_size)
    group_size, bits = MODES[mode].get("group_size", group_size), MODES[mode].get("bits", bits)

    def round_trip(weight: mx.array, dtype: mx.Dtype) -> mx.array:
        if weight.shape[-1] % group_size:  # such a layer is left as it is when a model is converted
            return weight
        packed = mx.quantize(weight.astype(dtype), group_size=group_size, bits=bits, mode=mode)
        return mx.dequantize(*packed, group_size=group_size, bits=bits, mode=mode).astype(mx.float32)

    return round_trip


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with an adapter, and the linear layers that are not inside one of these."""
    adapters = [module for module in model.modules() if isinstance(module, ADAPTED)]
    inside = {id(adapter.linear) for adapter in adapters}
    return adapters + [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def _fake_quantised_call(original: Call, schedule: FakeQuantisation, round_trip: Quantizer) -> Call:
    def call(module: nn.Module, x: mx.array, *args: mx.array, **kwargs: mx.array) -> mx.array:
        y = original(module, x, *args, **kwargs)
        if not schedule.active:
            return y
        # Adding the rounding error as a constant leaves the layer's own gradient, dropout included, untouched.
        # It waits for x so that each call has its own: MLX cannot compile two equal calls of its quantiser.
        merged = mx.stop_gradient(mx.depends(merged_weight(module), x))
        error = (round_trip(merged, dense_dtype(module)) - merged).astype(x.dtype)
        if isinstance(module, LoRASwitchLinear):
            indices = args[0] if args else kwargs["indices"]
            return y + mx.gather_mm(x, error.swapaxes(-1, -2), rhs_indices=indices)
        return y + x @ error.T

    return call
