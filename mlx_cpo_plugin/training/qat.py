"""Quantisation-aware training: the forward pass sees the weights as they will be deployed, quantised.

Source of the straight-through gradient: Bengio et al. 2013, arXiv 1308.3432.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.host import fake_quantizer
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.kernels.operations import BITS, Weight
from mlx_cpo_plugin.model.layers import ADAPTED, Call, biased, dense_dtype, merged_weight, overridden_calls, widths
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.settings.options import AUTO, HOST, MODES, mlx_quantises


@dataclass
class FakeQuantisation:
    """When fake quantisation applies: every ``interval``-th optimizer step from ``start_step`` on, counted from 1.

    Attributes:
        weights: what is rounded once for all passes between two updates of what it is made of.
        active: whether the forward passes that run now are fake-quantised.
    """

    start_step: float = math.inf
    interval: int = 1
    weights: list[RoundedWeight] = field(default_factory=list)
    active: bool = False

    def applies_to(self, optimizer_step: int) -> bool:
        """Whether the optimizer step with this number is fake-quantised."""
        since_start = optimizer_step - self.start_step
        return since_start >= 0 and since_start % self.interval == 0

    def begin(self, optimizer_step: int) -> None:
        """Fake-quantise the forward passes from here on if this step is, with the weights as they are now."""
        self.active = self.applies_to(optimizer_step)
        for weight in self.weights if self.active else ():
            weight.update()


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
    kernels: bool = False,
) -> Iterator[FakeQuantisation]:
    """Let ``model`` compute with fake-quantised weights while ``active`` is set.

    A linear layer with an adapter is fake-quantised as the merged weight W + s * B * A that will be deployed, over a
    quantised base too. MLX's quantiser takes embeddings as well. The gradient passes straight through; the optimizer
    keeps the full-precision weights. Only this model is touched, and all of it is undone when the context ends.

    Args:
        bits: 2 to 16.
        group_size: weights that share a scale along the input dimension; 0 or less: one scale for the whole tensor.
        quantizer, mode: see :class:`Quantizer`.
        kernels: whether the model computes with the compiled kernels, and does so before and after this context.
    """
    schedule, rounding = FakeQuantisation(start_step, interval), Quantizer(quantizer, bits, group_size, mode)
    linears, heads = _linear_layers(model)
    embeddings = _embeddings(model) if rounding.is_of_mlx else []

    def in_graph(module: nn.Module, original: Call) -> tuple[nn.Module, Call]:
        return module, _fake_quantised_call(original, schedule, rounding, dense_dtype(module))

    layers, deployed = [in_graph(module, type(module).__call__) for module in linears], []
    if kernels:
        rounded = {id(module): RoundedWeight(module, rounding) for module in (*linears, *heads, *embeddings)}
        schedule.weights += rounded.values()
        layers = [(m, _rounded_call(type(m).__call__, schedule, rounded[id(m)])) for m in linears]
        deployed = [(m, _deployed_weight(schedule, rounded[id(m)])) for m in (*heads, *embeddings)]
    lookups = [(m, _fake_quantised_lookup(type(m).__call__, schedule, rounding, dense_dtype(m))) for m in embeddings]
    by_row = rounding.group_size > 0
    with ExitStack() as stack:
        stack.enter_context(overridden_calls(layers))
        stack.enter_context(overridden_calls([in_graph(m, type(m).__call__) for m in heads], row_by_row=by_row))
        stack.enter_context(overridden_calls(lookups, row_by_row=by_row))
        tied = [in_graph(m, type(m).as_linear) for m in embeddings]
        stack.enter_context(overridden_calls(tied, method="as_linear", row_by_row=by_row))
        stack.enter_context(overridden_calls(deployed, method="deployed_weight", row_by_row=by_row))
        yield schedule


class Quantizer:
    """What will become of weights where they are deployed.

    Args:
        name: ``mlx``, which packs as ``mlx_lm.convert`` and ``fuse_bits`` do; ``host``, mlx-lm-lora's symmetric one;
            ``auto``, the former where it has these bits and this group size.
        mode: of ``mx.quantize``; all but ``affine`` bring their own bits and group size.
    """

    def __init__(self, name: str, bits: int, group_size: int, mode: str = "affine") -> None:
        is_host = name == HOST or (name == AUTO and not mlx_quantises(bits, group_size, mode))
        self._host = fake_quantizer() if is_host else None
        self.bits, self.group_size = MODES[mode].get("bits", bits), MODES[mode].get("group_size", group_size)
        self._mode = mode

    @property
    def is_of_mlx(self) -> bool:
        """Whether it is MLX's, which also quantises embeddings."""
        return self._host is None

    def rounded(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return a float32 weight [..., output, input] as quantisation leaves it, which finds it in ``dtype``."""
        if self._host is not None:
            return self._host(weight, self.bits, self.group_size)
        if not self._takes(weight):
            return weight
        how: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self._mode}
        return mx.dequantize(*mx.quantize(weight.astype(dtype), **how), **how).astype(mx.float32)

    def stored(self, weight: mx.array, dtype: mx.Dtype) -> Weight:
        """Return the same as the compiled kernels multiply with it: packed where they unpack it."""
        if not self.packs or not self._takes(weight):
            return Weight((self.rounded(weight, dtype),))
        packed = mx.quantize(weight.astype(dtype), group_size=self.group_size, bits=self.bits)
        return Weight(tuple(packed), self.bits, self.group_size)

    @property
    def packs(self) -> bool:
        """Whether the compiled kernels unpack what it makes of weights."""
        return self._host is None and self._mode == "affine" and self.bits in BITS

    def _takes(self, weight: mx.array) -> bool:
        return weight.shape[-1] % self.group_size == 0  # else it is left as it is when a model is converted


class RoundedWeight:
    """A module's weight as the compiled kernels multiply with it, rounded once for all passes of a step.

    Attributes:
        value: what :meth:`update` made of it: the merged weight, or its rounding error where the layer's own call is
            needed beside it.
    """

    def __init__(self, module: nn.Module, quantizer: Quantizer) -> None:
        self._module, self._quantizer = module, quantizer
        self._made_of: list[mx.array] = []

    def update(self) -> None:
        """Round the weight as it is now, unless nothing has changed."""
        made_of = list(by_name(self._module.parameters()).values())
        if len(made_of) == len(self._made_of) and all(map(operator.is_, made_of, self._made_of)):
            return
        merged, dtype = merged_weight(self._module), dense_dtype(self._module)
        if needs_own_call(self._module):
            self.value = Weight((self._quantizer.rounded(merged, dtype) - merged,))
        else:
            self.value = self._quantizer.stored(merged, dtype)
        mx.eval(self.value.arrays)
        self._made_of = made_of


def needs_own_call(module: nn.Module) -> bool:
    """Whether a layer's gradient takes more than its input and a weight that holds the adapter: of DoRA and dropout."""
    return isinstance(module, ADAPTED) and (not isinstance(module, LoRALinear) or module.dropout._p_1 < 1)


def kept_bytes(model: nn.Module, quantizer: Quantizer, size: int) -> int:
    """Return what a step keeps of rounded weights, or of their rounding errors in numbers of ``size`` bytes.

    Whether the compiled kernels compute it is as :func:`mlx_cpo_plugin.kernels.library.in_use` says now.
    """
    (linears, heads), total = _linear_layers(model), 0.0
    for module in (*linears, *heads, *(_embeddings(model) if quantizer.is_of_mlx else ())):
        linear = module.linear if isinstance(module, ADAPTED) else module
        weights = math.prod(linear.weight.shape[:-1]) * widths(linear)[0]
        if not library.in_use():
            total += size * weights
        elif quantizer.packs and not needs_own_call(module):
            total += weights * (quantizer.bits / 8 + 2 * dense_dtype(module).size / quantizer.group_size)
        else:
            total += 4 * weights
    return round(total)


def _linear_layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return those in layers or with an adapter, and those outside, such as the head; none of a quantised base."""
    adapters = [module for module in model.modules() if isinstance(module, ADAPTED)]
    inside = {id(adapter.linear) for adapter in adapters}
    others = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    of_layers = {id(module) for layer in getattr(model, "layers", ()) for module in layer.modules()}
    in_layers = [module for module in others if id(module) in of_layers]
    return adapters + in_layers, [module for module in others if id(module) not in of_layers]


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Return the embeddings that are quantised where a model is deployed: those without an adapter."""
    adapted = {id(module.embedding) for module in model.modules() if isinstance(module, LoRAEmbedding)}
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in adapted]


def _rounded_call(original: Call, schedule: FakeQuantisation, weight: RoundedWeight) -> Call:
    def call(module: nn.Module, x: mx.array) -> mx.array:
        if not schedule.active:
            return original(module, x)
        wide = x.astype(mx.float32)
        if needs_own_call(module):
            return original(module, x) + operations.linear(wide, weight.value).astype(x.dtype)
        if isinstance(module, LoRALinear):
            adapter = (module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32), module.scale)
            y = biased(module.linear, operations.adapted_linear(wide, weight.value, *adapter, through=True))
        else:
            y = biased(module, operations.linear(wide, weight.value))
        return y.astype(x.dtype)

    return call


def _deployed_weight(schedule: FakeQuantisation, weight: RoundedWeight) -> Call:
    return lambda module: weight.value if schedule.active else None


def _fake_quantised_lookup(original: Call, schedule: FakeQuantisation, quantizer: Quantizer, dtype: mx.Dtype) -> Call:
    def call(module: nn.Module, tokens: mx.array) -> mx.array:
        y = original(module, tokens)
        if not schedule.active:
            return y
        rows = mx.stop_gradient(module.weight[tokens].astype(mx.float32))
        return y + (quantizer.rounded(rows, dtype) - rows).astype(y.dtype)

    return call


def _fake_quantised_call(original: Call, schedule: FakeQuantisation, quantizer: Quantizer, dtype: mx.Dtype) -> Call:
    def call(module: nn.Module, x: mx.array, *args: mx.array, **kwargs: mx.array) -> mx.array:
        y = original(module, x, *args, **kwargs)
        if not schedule.active:
            return y
        # Adding the rounding error as a constant leaves the layer's own gradient, dropout included, untouched.
        # It waits for x so that each call has its own: MLX cannot compile two equal calls of its quantiser.
        merged = mx.stop_gradient(mx.depends(merged_weight(module), x))
        error = (quantizer.rounded(merged, dtype) - merged).astype(x.dtype)
        if isinstance(module, LoRASwitchLinear):
            indices = args[0] if args else kwargs["indices"]
            return y + mx.gather_mm(x, error.swapaxes(-1, -2), rhs_indices=indices)
        return y + x @ error.T

    return call
