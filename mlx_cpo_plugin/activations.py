"""SwiGLU that keeps less for the backward pass: the two arrays it is made of, and nothing in between."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.models import activations


@mx.custom_function
def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return ``silu(gate) * x``, as mlx_lm's ``swiglu`` does; all of one shape and dtype."""
    return gate * mx.sigmoid(gate) * x


@lean_swiglu.vjp
def _lean_swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    # Computing the sigmoid again costs less than keeping it and the product with it for every token and layer.
    gate, x = primals
    sigmoid = mx.sigmoid(gate)
    by_gate = cotangent * x * sigmoid * (1 + gate * (1 - sigmoid))
    return by_gate, cotangent * gate * sigmoid


@contextmanager
def lean_activations() -> Iterator[None]:
    """Let every model of mlx_lm use :func:`lean_swiglu` until the context ends."""
    original = activations.swiglu
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and getattr(module, "swiglu", None) is original
    ]
    for module in users:
        module.swiglu = lean_swiglu  # type: ignore[attr-defined]  # the name that each of them imported
    try:
        yield
    finally:
        for module in users:
            module.swiglu = original  # type: ignore[attr-defined]
