"""The compiled operations as functions of MLX arrays; all arrays are float32 unless a weight is stored otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_cpo_plugin.kernels.library import call

# Bits of packed weights that are unpacked.
BITS = (2, 4, 8)


@dataclass(frozen=True)
class Weight:
    """A frozen weight [output, input] as it is stored.

    Attributes:
        arrays: the weight, float32, bfloat16 or float16; or packed weight, scales and biases of ``mx.quantize``.
        bits, group_size: of a packed weight; 0 otherwise.
    """

    arrays: tuple[mx.array, ...]
    bits: int = 0
    group_size: int = 0


class Segment(NamedTuple):
    """Consecutive queries that see a prefix of keys, and of their own keys those up to themselves.

    Attributes:
        first_query, queries: where they are, and how many.
        first_prefix_key, prefix_keys: the prefix.
        first_own_key: that of the first query.
    """

    first_query: int
    queries: int
    first_prefix_key: int
    prefix_keys: int
    first_own_key: int


def linear(x: mx.array, weight: Weight) -> mx.array:
    """Return ``x @ W.T`` [..., output] of x [..., input]."""
    return call("linear", [x, *weight.arrays], 1, (0, 0, weight.bits, weight.group_size, False))[0]


def adapted_linear(
    x: mx.array, weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, merged: bool = False
) -> mx.array:
    """Return ``x @ W.T + scale * (x @ A) @ B`` [..., output] of x [..., input], A [input, rank], B [rank, output].

    Args:
        merged: the weight has the adapter in it, so return ``x @ W.T``; A and B have their gradient as otherwise.
    """
    numbers = (scale, lora_a.shape[1], weight.bits, weight.group_size, merged)
    return call("linear", [x, lora_a, lora_b, *weight.arrays], 2, numbers)[0]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return ``x / sqrt(mean(x**2) + eps) * weight`` of x [..., D] and a frozen weight [D]."""
    return call("norm", [x, weight.astype(mx.float32)], 1, (eps,))[0]


def rotated(x: mx.array, cosines: mx.array, sines: mx.array, neighbours: bool) -> mx.array:
    """Return x [B, H, N, D] with pairs of numbers turned by angles, whose cosines and sines are [1 or B, N, R].

    Args:
        neighbours: whether pairs are neighbours; else the first R numbers of a row pair up with the next R.
    """
    return call("rotation", [x, cosines, sines], 1, (neighbours,))[0]


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    segments: Sequence[Segment],
    window: int | None = None,
) -> mx.array:
    """Return attention [B, H, N, V] of queries [B, H, N, D], keys [B, H / G, S, D] and values [B, H / G, S, V].

    Args:
        window: how many keys, its own included, a query sees at most.
    """
    numbers = (scale, window or 0, len(segments), *(number for segment in segments for number in segment))
    return call("attention", [queries, keys, values], 2, numbers)[0]


def silu_gate(gate: mx.array, x: mx.array) -> mx.array:
    """Return ``silu(gate) * x``, all of one shape."""
    return call("silu_gate", [gate, x], 1)[0]


def gelu(x: mx.array) -> mx.array:
    """Return the approximation of GELU with tanh."""
    return call("gelu", [x], 1)[0]


def target_scores(
    hidden: mx.array, targets: mx.array, weight: Weight, differentiate: bool
) -> tuple[mx.array, mx.array]:
    """Return log-probs and raw logits of target tokens, float32 [N].

    Args:
        hidden: [N, D], the states that predict the targets.
        targets: int32 [N].
        weight: [V, D].
        differentiate: whether a gradient with respect to the log-probs follows; the raw logits have none.
    """
    numbers = (differentiate, weight.bits, weight.group_size)

    @mx.custom_function
    def scores(hidden: mx.array) -> tuple[mx.array, ...]:
        return tuple(call("head", [hidden, targets, *weight.arrays], 3, numbers))

    @scores.vjp
    def scores_vjp(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return cotangents[0][:, None] * outputs[2]

    result: Any = scores(hidden)
    return result[0], result[1]
