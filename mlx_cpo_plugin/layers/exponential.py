"""Powers for CPUs, out of additions and products: MLX takes 8 ns there for an exp, as long as for 60 products."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# Below so many numbers the operations cost more to start than they save.
FEWEST = 2**13
LOG_2 = 0.6931471805599453
PER_LOG_2 = 1 / LOG_2
_LOWEST, _HIGHEST = -126.0, 127.0
# 2**r for |r| <= 1/2, fitted to the least relative error with 2**0 = 1; the highest power first.
_COEFFICIENTS = (1.326472731307e-3, 9.671512991190e-3, 5.550733581185e-2, 2.402224242689e-1, 6.931470036507e-1, 1.0)
# Added to a small number, it leaves the nearest integer in the lowest bits of the sum.
_ROUNDER = 12582912.0
_EXPONENT_BITS = 23


def power_of_two(x: mx.array) -> mx.array:
    """Return 2**x of a float32 array, to a relative error of 2e-7, for x up to 127; below -126 it is 2**-126.

    It has no gradient.
    """
    x = mx.maximum(x, _LOWEST)
    rounded = x + _ROUNDER
    r = x - (rounded - _ROUNDER)
    power = r * _COEFFICIENTS[0] + _COEFFICIENTS[1]
    for coefficient in _COEFFICIENTS[2:]:
        power = power * r + coefficient
    # What is not the integer in the bits of ``rounded`` is shifted out of them.
    return (power.view(mx.int32) + (rounded.view(mx.int32) << _EXPONENT_BITS)).view(mx.float32)


@mx.custom_function
def exponential(x: mx.array) -> mx.array:
    """Return exp(x) of a float32 array, held between 2**-126 and 2**127.

    The relative error is 2e-7, and 8e-8 more for each unit of x. On a GPU, and for less than :data:`FEWEST` numbers,
    it is MLX's own exp.
    """
    if has_fast_exponentials(x):
        return mx.exp(x)
    return power_of_two(mx.minimum(x * PER_LOG_2, _HIGHEST))


@exponential.vjp
def _exponential_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def has_fast_exponentials(x: mx.array) -> bool:
    """Whether MLX's own exponentials are the faster ones for an array of this size."""
    return mx.default_device().type == mx.DeviceType.gpu or x.size < FEWEST


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), computed in float32, in the dtype of ``x``; without a gradient of its own on a CPU."""
    if has_fast_exponentials(x):
        return mx.sigmoid(x)
    powers = power_of_two(mx.minimum(x.astype(mx.float32) * -PER_LOG_2, _HIGHEST))
    return mx.reciprocal(1 + powers).astype(x.dtype)
