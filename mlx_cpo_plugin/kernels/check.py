"""Compares freshly compiled kernels with MLX's own operations, in a process of its own: ``python -m … FILE``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.kernels.operations import Segment, Weight

# Relative; float32 rounds to 6e-8.
TOLERANCE = 1e-5

Function = Callable[..., mx.array]
Case = tuple[str, Function, Function, Sequence[mx.array]]


def cases() -> Iterator[Case]:
    """Yield operations, what MLX computes them with, and the arrays that both take and have gradients for."""
    mx.random.seed(0)
    x, weight = mx.random.normal((2, 40, 64)), mx.random.normal((96, 64))
    lora_a, lora_b = mx.random.normal((64, 8)), mx.random.normal((8, 96))
    packed = mx.quantize(weight, group_size=32, bits=4)
    for name, stored, wide in (
        ("float32", Weight((weight,)), weight),
        ("bfloat16", Weight((weight.astype(mx.bfloat16),)), weight.astype(mx.bfloat16).astype(mx.float32)),
        ("float16", Weight((weight.astype(mx.float16),)), weight.astype(mx.float16).astype(mx.float32)),
        ("4 bits", Weight(tuple(packed), 4, 32), mx.dequantize(*packed, group_size=32, bits=4)),
    ):
        yield (
            f"linear, {name}",
            lambda x, a, b, stored=stored: operations.adapted_linear(x, stored, a, b, 2.0),
            lambda x, a, b, wide=wide: x @ wide.T + 2.0 * (x @ a) @ b,
            (x, lora_a, lora_b),
        )
    held = weight + 2.0 * (lora_a @ lora_b).T  # the adapter, which alone is to have a gradient of it
    yield (
        "linear, rounded",
        lambda x, a, b: operations.adapted_linear(x, Weight((held,)), a, b, 2.0, merged=True),
        lambda x, a, b: x @ held.T + passed_through(2.0 * (mx.stop_gradient(x) @ a) @ b),
        (x, lora_a, lora_b),
    )
    yield "linear, plain", lambda x: operations.linear(x, Weight((weight,))), lambda x: x @ weight.T, (x,)
    ones = mx.random.normal((64,))
    yield (
        "norm",
        lambda x: operations.rms_norm(x, ones, 1e-5),
        lambda x: mx.fast.rms_norm(x, ones, 1e-5),
        (x,),
    )
    yield "silu", operations.silu_gate, lambda gate, x: nn.silu(gate) * x, (x, 2 * x)
    yield "gelu", operations.gelu, nn.gelu_approx, (3 * x,)
    queries, keys, values = (mx.random.normal((2, heads, rows, 16)) for heads, rows in ((6, 40), (2, 70), (2, 70)))
    angles = mx.arange(7, 47)[None, :, None] * mx.power(1e4, -mx.arange(0, 16, 2) / 16)
    for neighbours in (False, True):
        yield (
            "rotation",
            lambda x, turn=neighbours: operations.rotated(x, mx.cos(angles), mx.sin(angles), turn),
            lambda x, turn=neighbours: mx.fast.rope(x, 16, traditional=turn, base=1e4, scale=1.0, offset=7),
            (queries,),
        )
    behind = mx.arange(30, 70)[:, None] - mx.arange(70)
    for window in (None, 9):
        mask = (behind >= 0) & (behind < (window or 70))
        yield (
            "attention",
            lambda q, k, v, window=window: operations.attention(q, k, v, 0.25, [Segment(0, 40, 0, 30, 30)], window),
            lambda q, k, v, mask=mask: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask),
            (queries, keys, values),
        )
    targets = mx.random.randint(0, 96, (80,)).astype(mx.int32)
    for values in (weight, weight.astype(mx.bfloat16)):
        yield (
            f"head, {values.dtype}",
            lambda hidden, values=values: operations.target_scores(hidden, targets, Weight((values,)), True)[0],
            lambda hidden, values=values: -nn.losses.cross_entropy(hidden @ values.astype(mx.float32).T, targets),
            (x.reshape(80, 64) / 8,),
        )


def passed_through(x: mx.array) -> mx.array:
    """Return zeros with the gradient of ``x``."""
    return x - mx.stop_gradient(x)


def difference(case: Case) -> float:
    """Return the largest relative difference of values and gradients."""
    _, kernel, reference, arrays = case
    results = []
    for function in (kernel, reference):
        weights = mx.random.normal(function(*arrays).shape, key=mx.random.key(1))

        def total(*given: mx.array, function: Function = function, weights: mx.array = weights) -> Any:
            return (function(*given) * weights).sum()

        gradients = mx.grad(total, argnums=tuple(range(len(arrays))))(*arrays)
        results.append([function(*arrays), *(gradients if isinstance(gradients, tuple) else (gradients,))])
    distances = [mx.linalg.norm(a - b) / mx.linalg.norm(b) for a, b in zip(*results, strict=True)]
    return float(mx.max(mx.stack(distances)))


def main(file: str) -> None:
    mx.set_default_device(mx.Device(mx.cpu))
    blas.use_fast_blas()
    library.load(Path(file))
    with blas.one_thread():
        for case in cases():
            if not difference(case) < TOLERANCE:
                sys.exit(f"error: {case[0]} differs from MLX by {difference(case):.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
