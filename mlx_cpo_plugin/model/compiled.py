"""A model computed by the compiled kernels: which models they suit, and the functions that they take the place of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.kernels.operations import Segment
from mlx_cpo_plugin.model import activations
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR
from mlx_cpo_plugin.model.layers import LINEAR, Call, biased, dora_lengths, kernel_weight, overridden_calls
from mlx_cpo_plugin.model.packed import Row, Visible
from mlx_cpo_plugin.model.parity import expected_grouping
from mlx_cpo_plugin.parameters import by_name

# What an adapter trains; the kernels have no gradient with respect to anything else.
_TRAINED = ("lora_a", "lora_b", "m")
# Tables of angles that are kept.
_TABLES = 8


def suits(model: nn.Module) -> bool:
    """Whether the kernels can train a model: they compute its layers, and only adapters are trained."""
    trained = by_name(model.trainable_parameters()) if computes(model) else {}
    return bool(trained) and all(name.rpartition(".")[2] in _TRAINED for name in trained)


def computes(model: nn.Module) -> bool:
    """Whether all products of the layers can be the kernels'.

    Products that are not, such as a recurrence's, would take one thread, where all others take as many as there are.
    """
    if not isinstance(model, nn.Module) or expected_grouping(model) in (None, PAIR_BY_PAIR):
        return False
    modules = [module for layer in model.layers for module in layer.modules()]
    return all(kernel_weight(module) is not None for module in modules if isinstance(module, LINEAR))


@contextmanager
def compiled_kernels(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute with the kernels, which have to be loaded, until the context ends."""
    among = [module for module in model.modules() if isinstance(module, LoRALinear | DoRALinear)]
    adapted = [module for module in among if kernel_weight(module.linear) is not None]  # a head's may be none of theirs
    inside = {id(module.linear) for module in adapted}
    modules = [module for layer in model.layers for module in layer.modules() if isinstance(module, LINEAR)]
    calls: list[tuple[nn.Module, Call]] = [(module, _linear) for module in modules if id(module) not in inside]
    calls += [(module, _with_dora if isinstance(module, DoRALinear) else _with_lora) for module in adapted]
    with ExitStack() as stack:
        stack.callback(_tables.clear)
        stack.enter_context(library.used())
        stack.enter_context(blas.one_thread())
        stack.enter_context(overridden_calls(calls))
        stack.enter_context(activations.replaced("swiglu", _swiglu))
        stack.enter_context(activations.replaced("scaled_dot_product_attention", _attention))
        for owner, name, kernel in (
            (mx.fast, "rms_norm", _rms_norm),
            (mx.fast, "rope", _rope),
            (nn, "gelu_approx", _gelu),
        ):
            stack.enter_context(_attribute(owner, name, kernel))
        yield


@contextmanager
def compiled_head(model: nn.Module) -> Iterator[None]:
    """Let the kernels compute whole logits, too, which only answers take: pairs are scored without them."""
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside and kernel_weight(module) is not None]
    linears: list[tuple[nn.Module, Call]] = [(module, _linear) for module in outside if isinstance(module, LINEAR)]
    tied: list[tuple[nn.Module, Call]] = [(module, _linear) for module in outside if not isinstance(module, LINEAR)]
    with overridden_calls(linears, row_by_row=True), overridden_calls(tied, "as_linear", row_by_row=True):
        yield


@contextmanager
def _attribute(owner: Any, name: str, kernel: Callable[..., Any]) -> Iterator[None]:
    """Let ``kernel`` answer in place of a function of a module, which it gets as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: kernel(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _is_wide(*arrays: mx.array) -> bool:
    return all(array.dtype == mx.float32 for array in arrays)


def _linear(layer: nn.Module, x: mx.array) -> mx.array:
    weight = kernel_weight(layer)
    assert weight is not None
    y = operations.linear(x.astype(mx.float32), weight)
    return biased(layer, y).astype(x.dtype)


def _with_lora(layer: nn.Module, x: mx.array) -> mx.array:
    return biased(layer.linear, _adapted(layer, x)).astype(x.dtype)


def _adapted(layer: nn.Module, x: mx.array) -> mx.array:
    """Return the product with a weight and its adapter, without the bias, in float32."""
    weight, wide = kernel_weight(layer.linear), x.astype(mx.float32)
    assert weight is not None
    if layer.dropout.training and layer.dropout._p_1 < 1:
        z = (layer.dropout(wide) @ layer.lora_a) @ layer.lora_b
        return operations.linear(wide, weight) + layer.scale * z
    lora_a, lora_b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    return operations.adapted_linear(wide, weight, lora_a, lora_b, layer.scale)


def _with_dora(layer: nn.Module, x: mx.array) -> mx.array:
    y = (layer.m / dora_lengths(layer)) * _adapted(layer, x)
    return biased(layer.linear, y).astype(x.dtype)


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    if not _is_wide(gate, x) or gate.shape != x.shape:
        return nn.silu(gate) * x
    return operations.silu_gate(gate, x)


def _gelu(original: Call, x: mx.array) -> mx.array:
    return operations.gelu(x) if _is_wide(x) else original(x)


def _rms_norm(original: Call, x: mx.array, weight: mx.array | None, eps: float, **kwargs: Any) -> mx.array:
    if weight is None or not _is_wide(x):
        return original(x, weight, eps, **kwargs)
    return operations.rms_norm(x, weight, eps)


def _rope(original: Call, x: mx.array, dims: int, **kwargs: Any) -> mx.array:
    offset = kwargs["offset"]
    if not isinstance(offset, Row) and (x.ndim != 4 or not _is_wide(x) or not isinstance(offset, int)):
        return original(x, dims, **kwargs)
    base_, scale, frequencies = kwargs["base"], kwargs["scale"], kwargs.get("freqs")
    key: tuple[Any, ...] = (dims, base_, scale, id(frequencies))
    if isinstance(offset, Row):
        tables, positions = offset.angles, offset.positions
    else:
        tables, positions = _tables, np.arange(offset, offset + x.shape[2])
        key = (*key, offset, x.shape[2])
    if key not in tables:
        while len(tables) >= _TABLES:
            tables.pop(next(iter(tables)))
        tables[key] = (*_angles(positions, dims, base_, scale, frequencies), frequencies)
    cosines, sines, _ = tables[key]
    return operations.rotated(x, cosines, sines, kwargs["traditional"])


# Cosines and sines by what they depend on; the frequencies stay in memory as long as their address is a key.
_tables: dict[Any, Any] = {}


def _angles(
    positions: np.ndarray, dims: int, base_: float | None, scale: float, frequencies: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return cosines and sines, float32 [1, N, dims / 2], of rotary embedding at ``positions`` [N]."""
    if frequencies is None:
        assert base_ is not None
        turns = float(base_) ** (-np.arange(0, dims, 2) / dims)
    else:
        turns = 1 / np.array(frequencies, np.float64)
    angles = (positions * scale)[None, :, None] * turns
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


def _attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | Visible | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    count = queries.shape[2]
    suited = sinks is None and isinstance(keys, mx.array) and _is_wide(queries, keys, values)
    if suited and isinstance(mask, Visible):
        return operations.attention(queries, keys, values, scale, mask.segments, mask.window)
    causal = isinstance(mask, str) or (mask is None and count == 1)
    if not suited or not causal:
        if isinstance(mask, Visible):
            raise TypeError("this attention knows no packed pairs")
        return activations.attention(queries, keys, values, cache, scale, mask, sinks)
    before = keys.shape[2] - count
    return operations.attention(queries, keys, values, scale, [Segment(0, count, 0, before, before)])
