"""What a model remembers of a long text, held once: all segments write their keys and values into one place.

For its gradient a segment reads them there. Nothing is appended, so that the memory is that of the keys and values and
of their gradient, once each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from mlx_cpo_plugin.model.caches import SegmentCache, leaves
from mlx_cpo_plugin.model.layers import first_trained_layer

# How many tokens are there after a segment of a layer of attention; what else a layer remembers, as it was.
State = list[Any]


class WrittenCache(SegmentCache):
    """Keys and values in memory for ``room`` tokens, which is taken when the first are written.

    Attributes:
        length: how many are written.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    @property
    def offset(self) -> int:
        """How many tokens came before."""
        return self.length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write behind what is there, and return everything up to now."""
        if self.keys is None or self.values is None:
            shapes = [(*array.shape[:2], self.room, array.shape[3]) for array in (keys, values)]
            self.keys, self.values = mx.zeros(shapes[0], keys.dtype), mx.zeros(shapes[1], values.dtype)
        start, self.length = self.length, self.length + keys.shape[2]
        # MLX writes in place where nothing else holds the array.
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class ReadCache(SegmentCache):
    """What was written before a segment, for its gradient.

    Its keys and values are zeros that take no memory; the gradient with respect to them is that with respect to what
    was written. Without a trained layer below there is none.
    """

    def __init__(self, written: WrittenCache, start: int, trained: bool) -> None:
        super().__init__()
        self.written, self.start, self.trained = written, start, trained
        if trained and start and written.keys is not None and written.values is not None:
            self.keys, self.values = (_stand_in(array, start) for array in (written.keys, written.values))

    @property
    def offset(self) -> int:
        """How many tokens came before."""
        return self.start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return everything up to now, from where it is written as far as it is."""
        held = (self.written.keys, self.written.values)
        end, stand_ins = self.start + keys.shape[2], (self.keys, self.values)
        is_written = self.written.length >= end
        joined = []
        for new, stand_in, array in zip((keys, values), stand_ins, held, strict=True):
            before = None if array is None or not self.start else array[:, :, : self.start]
            whole = array[:, :, :end] if array is not None and is_written else None
            joined.append(_joined(new, stand_in, before, whole) if self.trained else _all(new, before, whole))
        if self.trained:
            self.keys, self.values = joined
        return joined[0], joined[1]


def _stand_in(array: mx.array, tokens: int) -> mx.array:
    return mx.broadcast_to(mx.zeros((), array.dtype), (*array.shape[:2], tokens, array.shape[3]))


def _all(new: mx.array, before: mx.array | None, whole: mx.array | None) -> mx.array:
    if whole is not None:
        return whole
    return new if before is None else mx.concatenate([before, new], axis=2)


def _joined(new: mx.array, stand_in: mx.array | None, before: mx.array | None, whole: mx.array | None) -> mx.array:
    """Return what :func:`_all` does, with a gradient for the new part, and one for that before to the stand-in."""

    @mx.custom_function
    def join(new: mx.array, *stand_in: mx.array) -> mx.array:
        return _all(new, before, whole)

    @join.vjp
    def join_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        if stand_in is None:
            return cotangent
        start = stand_in.shape[2]
        return cotangent[:, :, start:], cotangent[:, :, :start]

    result: Any = join(new) if stand_in is None else join(new, stand_in)
    return result


def with_room(caches: Sequence[Any], room: int) -> list[Any]:
    """Return empty caches that have room for so many tokens."""
    return [
        CacheList(*with_room(cache.caches, room))
        if isinstance(cache, CacheList)
        else WrittenCache(room)
        if isinstance(cache, SegmentCache)
        else cache
        for cache in caches
    ]


def state_of(caches: Sequence[Any]) -> State:
    """Return where the text ends that ``caches`` hold, for :func:`go_back` and :func:`read_from`."""
    return [leaf.length if isinstance(leaf, WrittenCache) else list(leaf.cache) for leaf in leaves(caches)]


def go_back(caches: Sequence[Any], state: State) -> None:
    """Let the text of ``caches`` end where it did."""
    for leaf, at in zip(leaves(caches), state, strict=True):
        if isinstance(leaf, WrittenCache):
            leaf.length = at
        else:
            leaf.cache = list(at)


def read_from(caches: Sequence[Any], state: State, model: nn.Module) -> list[Any]:
    """Return caches for the gradient of the segment that begins at ``state``, which ``caches`` hold or go up to."""
    first = first_trained_layer(model) if len(caches) == len(model.layers) else 0
    states = iter(state)

    def reading(cache: Any, trained: bool) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*(reading(inner, trained) for inner in cache.caches))
        at = next(states)
        if isinstance(cache, WrittenCache):
            return ReadCache(cache, at, trained)
        copied = copy.copy(cache)
        copied.cache = list(at)
        return copied

    return [reading(cache, number >= first) for number, cache in enumerate(caches)]
