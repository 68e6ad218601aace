"""Functions that keep less for the backward pass, in place of mlx_lm's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models import activations, base

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.model.attention import Mask, lean_attention
from mlx_cpo_plugin.model.exponential import sigmoid


@mx.custom_function
def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return ``silu(gate) * x``, as mlx_lm's ``swiglu`` does; all of one shape and dtype."""
    return gate * sigmoid(gate) * x


@lean_swiglu.vjp
def _lean_swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    # Computing the sigmoid again costs less than keeping it and the product with it for every token and layer.
    gate, x = primals
    open_gate = sigmoid(gate)
    grad_gate = cotangent * x * open_gate * (1 + gate * (1 - open_gate))
    return grad_gate, cotangent * gate * open_gate


_mlx_lm_attention = base.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    if sinks is not None or hasattr(cache, "bits"):
        return _mlx_lm_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return lean_attention(queries, keys, values, scale, mask)


@contextmanager
def lean_activations() -> Iterator[None]:
    """Let every model of mlx_lm use :func:`lean_swiglu` and :func:`lean_attention` until the context ends."""
    with ExitStack() as stack:
        stack.enter_context(replaced("swiglu", lean_swiglu))
        if current_device().attention != "kernels":
            stack.enter_context(replaced("scaled_dot_product_attention", attention))
        yield


@contextmanager
def replaced(name: str, replacement: Any) -> Iterator[None]:
    """Replace a function in every module of mlx_lm's models that has it by its name, from base or activations."""
    original = getattr(base, name, None) or getattr(activations, name)
    users = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("mlx_lm.models.") and getattr(module, name, None) is original
    ]
    for module in users:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module in users:
            setattr(module, name, original)
