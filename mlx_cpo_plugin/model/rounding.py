"""Rounding float32 to a model's half precision such that changes below its resolution are not lost.

Weights that were loaded in half precision lie exactly on its grid. Rounding to nearest takes them back to where they
were until they have moved by half a step, and short training at a small learning rate moves hardly any so far. Here
each weight has a threshold of its own, at a fixed random place between two numbers of the grid: a weight on the grid
stays as it is, and of many that moved by a tenth of a step every tenth is rounded to the next number, so that sums over
them are right.
"""

from __future__ import annotations

import zlib

import mlx.core as mx

# Bits of a float32 that the format drops.
_DROPPED_BITS = {mx.bfloat16: 16, mx.float16: 13}
_FLOAT16_NORMAL, _FLOAT16_STEP = 2.0**-14, 2.0**-24


def dithered(values: mx.array, dtype: mx.Dtype, name: str) -> mx.array:
    """Return float32 ``values`` in ``dtype``, rounded as the module says if that is bfloat16 or float16.

    Args:
        name: of the parameter; its thresholds follow from it alone.
    """
    dropped = _DROPPED_BITS.get(dtype)
    if dropped is None or values.size == 0:
        return values.astype(dtype)
    values = values.astype(mx.float32)
    thresholds = _random_bits(values.size, zlib.crc32(name.encode())).reshape(values.shape) >> (32 - dropped)
    bits = values.view(mx.uint32)
    raised = (bits + thresholds) & mx.array(0xFFFFFFFF ^ ((1 << dropped) - 1), mx.uint32)
    result = mx.where(mx.isfinite(values), raised.view(mx.float32), values)
    if dtype == mx.float16:  # below the normal numbers its grid is an even one
        share = thresholds.astype(mx.float32) / (1 << dropped)
        even = mx.sign(values) * mx.floor(mx.abs(values) / _FLOAT16_STEP + share) * _FLOAT16_STEP
        result = mx.where(mx.abs(values) < _FLOAT16_NORMAL, even, result)
    return result.astype(dtype)


def _random_bits(count: int, seed: int) -> mx.array:
    """Return uint32 [count], by a hash of position and seed: several times faster than MLX's generator."""
    mixed = (mx.arange(count, dtype=mx.uint32) + mx.array(seed, mx.uint32)) * mx.array(0x9E3779B1, mx.uint32)
    mixed = (mixed ^ (mixed >> 15)) * mx.array(0x85EBCA77, mx.uint32)
    return mixed ^ (mixed >> 13)
