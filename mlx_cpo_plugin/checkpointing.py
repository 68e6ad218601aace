"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.overrides import Call, overridden_calls


@contextmanager
def checkpointed_layers(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Checkpoint every layer in ``model.layers`` until the context ends.

    Unlike a patch of the layer's class, this leaves other models alone, and dropout draws the same mask in both passes.
    """
    if not enabled:
        yield
        return
    dropout_keys: dict[int, mx.array] = {}
    replacements: list[tuple[nn.Module, Call]] = []
    for layer in model.layers:
        dropouts = [module for module in layer.modules() if isinstance(module, nn.Dropout) and module._p_1 < 1]
        replacements.append((layer, _checkpointed_call(type(layer).__call__, dropouts, dropout_keys)))
        replacements += [(dropout, _keyed_dropout(dropout_keys)) for dropout in dropouts]
    with overridden_calls(replacements):
        yield


def _checkpointed_call(original: Call, dropouts: Sequence[nn.Module], dropout_keys: dict[int, mx.array]) -> Call:
    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # mx.checkpoint differentiates floating inputs only; masks, caches and flags are closed over.
        inputs = {at: value for at, value in enumerate(args) if _is_differentiable(value)}
        keyword_inputs = {name: value for name, value in kwargs.items() if _is_differentiable(value)}
        keys = mx.random.randint(0, 2**31 - 1, (max(1, len(dropouts)), 2)).astype(mx.uint32) if dropouts else None

        def inner(parameters: Any, inputs: dict[int, mx.array], keyword_inputs: dict[str, mx.array]) -> Any:
            for number, dropout in enumerate(dropouts):
                assert keys is not None
                dropout_keys[id(dropout)] = keys[number]
            layer.update(parameters)
            merged = [inputs.get(at, value) for at, value in enumerate(args)]
            return original(layer, *merged, **{**kwargs, **keyword_inputs})

        return mx.checkpoint(inner)(layer.trainable_parameters(), inputs, keyword_inputs)

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
