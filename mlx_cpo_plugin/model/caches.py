"""Differentiable key/value caches: what a model remembers of earlier tokens, as arrays that gradients flow through."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

# What an architecture raises that does not expect our caches.
ARCHITECTURE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class SegmentCache:
    """Keys and values of all earlier tokens of an attention layer, each [B, heads, tokens, D]; none is ever dropped.

    Layers with a sliding window see the tokens in it through their mask.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def offset(self) -> Any:
        """How many tokens came before."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append, and return everything up to now."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of N new tokens over all tokens up to the last of them."""
        if window_size is not None and self.offset + N > window_size:
            return create_causal_mask(N, self.offset, window_size=window_size)
        if N == 1:
            return None
        return create_causal_mask(N, self.offset) if return_array else "causal"


class PaddedCache(SegmentCache):
    """Keys and values of earlier tokens, padded on the right; each row has its own number of tokens.

    New tokens come behind the padding, and continue where their row's tokens end.

    Args:
        lengths: int32 [B]; how many of the first ``padded`` keys are tokens.
    """

    def __init__(self, keys: mx.array | None, values: mx.array | None, lengths: mx.array, padded: int) -> None:
        super().__init__(keys, values)
        self.lengths, self.padded = lengths, padded

    @property
    def offset(self) -> Any:
        """How many tokens of each row came before the new ones, int32 [B]."""
        return self.lengths

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the mask of N new tokens over padding and tokens, bool [B, 1, N, padded + N]."""
        lengths, columns = self.lengths[:, None], mx.arange(self.padded + N)
        is_new = columns >= self.padded
        positions = mx.where(is_new, columns - self.padded + lengths, columns)[:, None]
        queries = (lengths + mx.arange(N))[..., None]
        visible = (is_new | (columns < lengths))[:, None] & (positions <= queries)
        if window_size is not None:
            visible = visible & (positions > queries - window_size)
        return visible[:, None]


def fresh_caches(model: nn.Module) -> list[Any]:
    """Return empty caches, one a layer, that gradients flow through.

    Raises:
        LookupError: the model has a kind of cache that has no counterpart here.
    """
    return [_differentiable(cache) for cache in make_prompt_cache(model)]


def _differentiable(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_differentiable(inner) for inner in cache.caches))
    if type(cache) in (KVCache, RotatingKVCache, ConcatenateKVCache):
        return SegmentCache()
    if isinstance(cache, ArraysCache):
        return cache
    raise LookupError(f"{type(cache).__name__} has no differentiable counterpart")


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache as :func:`fresh_caches` returns them."""
    return isinstance(value, SegmentCache | ArraysCache | CacheList)


def can_be_padded(caches: Sequence[Any]) -> bool:
    """Whether nothing but keys and values is remembered, which a mask can hide."""
    return all(isinstance(cache, SegmentCache) for cache in caches)


def cache_arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Return every array that the caches hold."""
    held = [leaf.cache if isinstance(leaf, ArraysCache) else (leaf.keys, leaf.values) for leaf in leaves(caches)]
    return [array for arrays in held for array in arrays if array is not None]


def set_state(caches: Sequence[Any], like: Sequence[Any], arrays: Iterator[mx.array]) -> None:
    """Let ``caches`` hold ``arrays``, in the order that :func:`cache_arrays` gives those of ``like``."""
    for cache, other in zip(leaves(caches), leaves(like), strict=True):
        if isinstance(cache, ArraysCache):
            cache.cache = [state if state is None else next(arrays) for state in other.cache]
        else:
            cache.keys, cache.values = (next(arrays), next(arrays)) if other.keys is not None else (None, None)


def forked(caches: Sequence[Any], arrays: Iterator[mx.array] | None = None) -> list[Any]:
    """Return caches with the same contents, or with ``arrays`` in the order of :func:`cache_arrays` in their place.

    What is appended to the copies leaves the originals as they are.
    """
    forks = [_copied(cache) for cache in caches]
    set_state(forks, caches, iter(cache_arrays(caches)) if arrays is None else arrays)
    return forks


def repeated(caches: Sequence[Any], rows: int) -> list[Any]:
    """Return caches of one row with ``rows`` equal ones."""
    return forked(caches, iter([mx.broadcast_to(array, (rows, *array.shape[1:])) for array in cache_arrays(caches)]))


def continued(caches: Sequence[SegmentCache], lengths: mx.array, sides: int) -> list[PaddedCache]:
    """Return caches for ``sides`` times as many rows, all of the first side before all of the next.

    Args:
        caches: hold rows of tokens that are padded on the right.
        lengths: int32 [B]; the tokens of each row.
    """
    result, lengths = [], mx.concatenate([lengths] * sides)
    for cache in caches:
        keys, values = (mx.concatenate([array] * sides) for array in cache_arrays([cache]))
        result.append(PaddedCache(keys, values, lengths, keys.shape[2]))
    return result


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """Yield the caches that are no lists of caches."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def _copied(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_copied(inner) for inner in cache.caches))
    return copy.copy(cache)
