"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_cpo_plugin.model.caches import cache_arrays, forked, is_cache, leaves, set_state
from mlx_cpo_plugin.model.layers import Call, overridden_calls
from mlx_cpo_plugin.model.packed import PackedCache
from mlx_cpo_plugin.model.remembered import WrittenCache


@contextmanager
def checkpointed_layers(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Recompute every layer of ``model.layers`` but the last in the backward pass, until the context ends.

    The backward pass begins with the last one, so it would be recomputed as soon as it had been computed. Unlike a
    patch of the layer's class, this leaves other models alone, and dropout draws the same mask in both passes.
    """
    if not enabled:
        yield
        return
    dropout_keys: dict[int, mx.array] = {}
    replacements: list[tuple[nn.Module, Call]] = []
    for layer in model.layers[:-1]:
        dropouts = [module for module in layer.modules() if isinstance(module, nn.Dropout) and module._p_1 < 1]
        replacements.append((layer, checkpointed_call(type(layer).__call__, dropouts, dropout_keys)))
        replacements += [(dropout, _keyed_dropout(dropout_keys)) for dropout in dropouts]
    with overridden_calls(replacements):
        yield


def checkpointed_call(
    original: Call, dropouts: Sequence[nn.Module] = (), dropout_keys: dict[int, mx.array] | None = None
) -> Call:
    """Return a call of a layer that is computed again in the backward pass.

    Args:
        original: takes the layer first.
        dropouts: in the layer, which find their keys in ``dropout_keys`` by their ids.
    """
    keys_of = {} if dropout_keys is None else dropout_keys

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # mx.checkpoint differentiates floating inputs only; masks and flags are closed over. What a cache holds has to
        # come in and go out explicitly, or gradients would not flow through it.
        given: list[Any] = []
        tree_map(given.append, (args, kwargs), is_leaf=_is_module)
        inputs = [leaf for leaf in given if _is_differentiable(leaf)]
        caches = [leaf for leaf in given if is_cache(leaf)]
        # The backward pass runs ``inner`` again, when the caches have long moved on.
        before = forked(caches)
        remembered = cache_arrays(before)
        drawing = any(dropout.training for dropout in dropouts)  # so that a validation leaves the random state alone
        keys = mx.random.randint(0, 2**31 - 1, (len(dropouts), 2)).astype(mx.uint32) if drawing else None
        after: list[Any] = []

        def give_keys() -> None:
            if keys is not None:
                keys_of.update({id(dropout): keys[at] for at, dropout in enumerate(dropouts)})

        written = any(isinstance(leaf, WrittenCache) for leaf in leaves(caches))  # no gradient flows through it
        if written or any(hasattr(leaf, "update_and_fetch") and not _can_be_closed_over(leaf) for leaf in given):
            give_keys()
            return original(layer, *args, **kwargs)

        def inner(parameters: Any, inputs: list[mx.array], remembered: list[mx.array]) -> tuple[Any, list[mx.array]]:
            give_keys()
            layer.update(parameters)
            forks, arrays = forked(before, iter(remembered)), iter(inputs)
            standing_in = dict(zip(map(id, caches), forks, strict=True))

            def in_place(leaf: Any) -> Any:
                return next(arrays) if _is_differentiable(leaf) else standing_in.get(id(leaf), leaf)

            ours, named = tree_map(in_place, (args, kwargs), is_leaf=_is_module)
            output = original(layer, *ours, **named)
            after[:] = forks
            held = cache_arrays(forks)
            # A layer may return what its cache holds, and of an array that goes out twice MLX knows one gradient.
            return output, mx.depends(held, held) if held else []

        own = layer.trainable_parameters()
        output, new = mx.checkpoint(inner)(own, inputs, remembered)
        layer.update(own)  # of which a second call takes its gradients
        set_state(caches, after, iter(new))
        return output

    return call


def _keyed_dropout(dropout_keys: dict[int, mx.array]) -> Call:
    def call(dropout: nn.Module, x: mx.array) -> mx.array:
        if not dropout.training:
            return x
        kept = mx.random.bernoulli(dropout._p_1, x.shape, key=dropout_keys[id(dropout)])
        return (kept * x) * (1 / dropout._p_1)

    return call


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _can_be_closed_over(cache: Any) -> bool:
    """Whether a cache is one whose arrays are told, or one that holds none."""
    return is_cache(cache) or isinstance(cache, PackedCache)


def _is_module(value: Any) -> bool:
    """Whether a value is a module, which is a mapping, too."""
    return isinstance(value, nn.Module)
