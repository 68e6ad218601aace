"""Quantisation-aware training: the forward pass sees the weights as they will be deployed, quantised.

Source of the straight-through gradient: Bengio et al. 2013, arXiv 1308.3432.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.kernels import operations
from mlx_cpo_plugin.model.layers import STACKED, Call, biased, dense_dtype, merged_weight, overridden_calls
from mlx_cpo_plugin.settings.options import AUTO
from mlx_cpo_plugin.training.quantizer import KernelOperand, Quantizer, needs_own_call, quantised_modules


@dataclass
class FakeQuantisation:
    """When fake quantisation applies: every ``interval``-th optimizer step from ``start_step`` on, counted from 1.

    Attributes:
        operands: what is rounded once for all passes of a step, of the compiled kernels.
        active: whether the forward passes that run now are fake-quantised.
    """

    start_step: float = math.inf
    interval: int = 1
    operands: list[KernelOperand] = field(default_factory=list)
    active: bool = False
    _rounded_for: int | None = None

    def applies_to(self, optimizer_step: int) -> bool:
        """Whether the optimizer step with this number is fake-quantised."""
        since_start = optimizer_step - self.start_step
        return since_start >= 0 and since_start % self.interval == 0

    def update(self) -> None:
        """Round the weights as they are now, for the compiled kernels."""
        for operand in self.operands:
            operand.update()

    @contextmanager
    def during(self, optimizer_step: int) -> Iterator[None]:
        """Fake-quantise the forward passes inside if this step is; between two steps weights are taken to change."""
        self.active = self.applies_to(optimizer_step)
        if self.active and optimizer_step != self._rounded_for:
            self.update()
            self._rounded_for = optimizer_step
        try:
            yield
        finally:
            self.active = False


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

    A module with an adapter is fake-quantised as the merged weight W + s * B * A that will be deployed, over a
    quantised base too. The gradient passes straight through; the optimizer keeps the full-precision weights. Only this
    model is touched, and all of it is undone when the context ends.

    Args:
        bits: 2 to 16.
        group_size: weights that share a scale along the input dimension; 0 or less: one scale for the whole tensor.
        quantizer, mode: see :class:`mlx_cpo_plugin.training.quantizer.Quantizer`.
        kernels: whether the model computes with the compiled kernels, and does so before and after this context.
    """
    schedule, rounding = FakeQuantisation(start_step, interval), Quantizer(quantizer, bits, group_size, mode)
    quantised = quantised_modules(model, rounding)
    layers, heads, embeddings = quantised.layers, quantised.heads, quantised.embeddings
    calls = FakeQuantisedCalls(schedule, quantised.quantizer_of)
    with ExitStack() as stack:
        stack.enter_context(overridden_calls([(m, calls.of_layer(m, type(m).__call__, kernels)) for m in layers]))
        for modules, method, made in (
            (heads, "__call__", calls.in_graph),
            (embeddings, "__call__", calls.of_lookup),
            (embeddings, "as_linear", calls.in_graph),
        ):
            for has_rows in (True, False):  # of a weight, from which a part can be taken; an adapter's module has none
                calls_of = [(m, made(m, getattr(type(m), method))) for m in modules if ("weight" in m) is has_rows]
                stack.enter_context(overridden_calls(calls_of, method, row_by_row=rounding.by_row and has_rows))
        if kernels:
            deployed = [(m, calls.of_head(m)) for m in (*heads, *embeddings) if "weight" in m]
            stack.enter_context(overridden_calls(deployed, "deployed_weight", row_by_row=rounding.by_row))
        yield schedule


class FakeQuantisedCalls:
    """Makes the calls that answer in place of a module's own, ``original``, and do what it does while not active."""

    def __init__(self, schedule: FakeQuantisation, quantizer_of: Callable[[nn.Module], Quantizer]) -> None:
        self._schedule, self._quantizer_of = schedule, quantizer_of

    def of_layer(self, module: nn.Module, original: Call, kernels: bool) -> Call:
        """Return the call of a layer in a model that computes with the compiled kernels, or without them."""
        made = self.with_kernels if kernels and not isinstance(module, STACKED) else self.in_graph
        return made(module, original)

    def in_graph(self, module: nn.Module, original: Call) -> Call:
        """Return a call that rounds the whole weight in each pass."""
        schedule, quantizer, dtype = self._schedule, self._quantizer_of(module), dense_dtype(module)

        def call(module: nn.Module, x: mx.array, *args: mx.array, **kwargs: mx.array) -> mx.array:
            y = original(module, x, *args, **kwargs)
            if not schedule.active:
                return y
            # Adding the rounding error as a constant leaves the layer's own gradient, dropout included, untouched.
            # It waits for x so that each call has its own: MLX cannot compile two equal calls of its quantiser.
            merged = mx.stop_gradient(mx.depends(merged_weight(module), x))
            error = (quantizer.rounded(merged, dtype) - merged).astype(x.dtype)
            if isinstance(module, SwitchLinear | LoRASwitchLinear):
                indices = args[0] if args else kwargs["indices"]
                return y + mx.gather_mm(x, error.swapaxes(-1, -2), rhs_indices=indices)
            is_transposed = args[0] if args else kwargs.get("transpose", True)  # as only a MultiLinear is asked
            return y + x @ (error.swapaxes(-1, -2) if is_transposed else error)

        return call

    def of_lookup(self, module: nn.Module, original: Call) -> Call:
        """Return a call of an embedding, which rounds the rows that are looked up."""
        schedule, quantizer, dtype = self._schedule, self._quantizer_of(module), dense_dtype(module)

        def call(module: nn.Module, tokens: mx.array) -> mx.array:
            y = original(module, tokens)
            if not schedule.active:
                return y
            rows = mx.stop_gradient(merged_weight(module, tokens))
            return (y.astype(mx.float32) + (quantizer.rounded(rows, dtype) - rows)).astype(y.dtype)

        return call

    def with_kernels(self, module: nn.Module, original: Call) -> Call:
        """Return a call that multiplies with a weight that is rounded once for all passes of a step."""
        schedule, operand = self._schedule, KernelOperand(module, self._quantizer_of(module))
        schedule.operands.append(operand)

        def call(module: nn.Module, x: mx.array) -> mx.array:
            if not schedule.active:
                return original(module, x)
            wide = x.astype(mx.float32)
            if needs_own_call(module):
                return original(module, x) + operations.linear(wide, operand.weight).astype(x.dtype)
            if isinstance(module, LoRALinear):
                adapter = (module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32), module.scale)
                y = biased(module.linear, operations.adapted_linear(wide, operand.weight, *adapter, merged=True))
            else:
                y = biased(module, operations.linear(wide, operand.weight))
            return y.astype(x.dtype)

        return call

    def of_head(self, module: nn.Module) -> Call:
        """Return a method that gives the kernel of the head its weight; it is rounded when it is first asked for."""
        schedule, operand = self._schedule, KernelOperand(module, self._quantizer_of(module))
        return lambda module: operand.weight if schedule.active else None
