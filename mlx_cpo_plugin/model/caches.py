"""What a model remembers of the tokens before: as arrays that gradients flow through."""

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

    def holding(self, keys: mx.array | None, values: mx.array | None) -> SegmentCache:
        """Return a cache like this one with other contents."""
        return SegmentCache(keys, values)

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
        if return_array:
            return create_causal_mask(N, self.offset)
        return None if N == 1 else "causal"

    def __bool__(self) -> bool:
        return True


class PaddedCache(SegmentCache):
    """Keys and values of earlier tokens, padded on their right, of which each row has a number of its own.

    New tokens come behind the padding, and go on from where their row's tokens end.

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

    def holding(self, keys: mx.array | None, values: mx.array | None) -> SegmentCache:
        """Return a cache like this one with other contents."""
        return PaddedCache(keys, values, self.lengths, self.padded)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the mask of N new tokens over padding and tokens, bool [B, 1, N, padded + N]."""
        lengths, columns = self.lengths[:, None], mx.arange(self.padded + N)
        is_new = columns >= self.padded
        positions = mx.where(is_new, columns - self.padded + lengths, columns)[:, None]
        queries = (lengths + mx.arange(N))[..., None]
        seen = (is_new | (columns < lengths))[:, None] & (positions <= queries)
        if window_size is not None:
            seen = seen & (positions > queries - window_size)
        return seen[:, None]


def fresh_caches(model: nn.Module) -> list[Any]:
    """Return empty caches, one a layer, that gradients flow through.

    Raises:
        LookupError: the model has a kind of cache that cannot be stood in for.
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


def forked(caches: Sequence[Any], arrays: Iterator[mx.array] | None = None) -> list[Any]:
    """Return caches with the same contents, or with ``arrays`` in the order of :func:`cache_arrays` in their place.

    What is appended to the copies leaves the originals as they are.
    """
    return [_forked(cache, arrays) for cache in caches]


def _forked(cache: Any, arrays: Iterator[mx.array] | None) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_forked(inner, arrays) for inner in cache.caches))
    if isinstance(cache, SegmentCache):
        keys, values = cache.keys, cache.values
        if arrays is not None and keys is not None:
            keys, values = next(arrays), next(arrays)
        return cache.holding(keys, values)
    fork = copy.copy(cache)
    fork.cache = [state if state is None or arrays is None else next(arrays) for state in cache.cache]
    return fork


def repeated(caches: Sequence[Any], rows: int) -> list[Any]:
    """Return caches of one row with ``rows`` equal ones."""
    arrays = [mx.broadcast_to(array, (rows, *array.shape[1:])) for array in cache_arrays(caches)]
    return forked(caches, iter(arrays))


def continued(caches: Sequence[SegmentCache], lengths: mx.array, sides: int) -> list[PaddedCache]:
    """Return caches for ``sides`` times as many rows, all of the first side before all of the next.

    Args:
        caches: hold rows of tokens that are padded on their right.
        lengths: int32 [B]; the tokens of each row.
    """
    result = []
    for cache in caches:
        assert cache.keys is not None
        assert cache.values is not None
        keys, values = mx.concatenate([cache.keys] * sides), mx.concatenate([cache.values] * sides)
        result.append(PaddedCache(keys, values, mx.concatenate([lengths] * sides), cache.keys.shape[2]))
    return result


def can_be_padded(caches: Sequence[Any]) -> bool:
    """Whether nothing but keys and values is remembered, which a mask can hide."""
    return all(isinstance(cache, SegmentCache) for cache in caches)


def beginning(caches: Sequence[Any], start: Sequence[Any]) -> list[Any]:
    """Return what ``start`` holds, with keys and values as views of those that ``caches`` hold by now."""
    return [_beginning(cache, begun) for cache, begun in zip(caches, start, strict=True)]


def _beginning(cache: Any, begun: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_beginning(*inner) for inner in zip(cache.caches, begun.caches, strict=True)))
    if isinstance(cache, SegmentCache) and begun.offset:
        assert cache.keys is not None
        assert cache.values is not None
        return SegmentCache(cache.keys[:, :, : begun.offset], cache.values[:, :, : begun.offset])
    return begun


def cache_arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Return every array that the caches hold."""
    arrays: list[mx.array] = []
    for cache in caches:
        if isinstance(cache, CacheList):
            arrays += cache_arrays(cache.caches)
        elif isinstance(cache, SegmentCache):
            arrays += [array for array in (cache.keys, cache.values) if array is not None]
        else:
            arrays += [state for state in cache.cache if state is not None]
    return arrays


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache as :func:`fresh_caches` returns them."""
    return isinstance(value, SegmentCache | ArraysCache | CacheList)


def adopt(caches: Sequence[Any], after: Sequence[Any], arrays: Iterator[mx.array]) -> None:
    """Let ``caches`` hold ``arrays``, which have the order that :func:`cache_arrays` gives those of ``after``."""
    for cache, like in zip(caches, after, strict=True):
        if isinstance(cache, CacheList):
            adopt(cache.caches, like.caches, arrays)
        elif isinstance(cache, SegmentCache):
            cache.keys, cache.values = (next(arrays), next(arrays)) if like.keys is not None else (None, None)
        else:
            cache.cache = [state if state is None else next(arrays) for state in like.cache]
