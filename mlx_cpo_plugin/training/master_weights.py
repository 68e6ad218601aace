"""Trained weights of half precision, kept in float32: an update below their resolution adds up instead of vanishing.

Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_cpo_plugin.model.rounding import dithered
from mlx_cpo_plugin.parameters import by_name

_HALVES = (mx.bfloat16, mx.float16)


class MasterWeights:
    """What the optimizer updates: float32 copies of the trained weights that are narrower, and the others themselves.

    Attributes:
        copies: the float32 copies by name; the model holds them rounded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        narrow = {name: value for name, value in by_name(model.trainable_parameters()).items() if _is_half(value)}
        self._dtypes = {name: value.dtype for name, value in narrow.items()}
        self.copies = {name: value.astype(mx.float32) for name, value in narrow.items()}

    def weights(self) -> dict[str, mx.array]:
        """Return every trained weight by name, in float32 where the model's own is narrower."""
        return by_name(self._model.trainable_parameters()) | self.copies

    def set(self, weights: Mapping[str, mx.array]) -> None:
        """Take over trained weights by name, and give the model what it computes with."""
        self.copies.update({name: weights[name].astype(mx.float32) for name in self.copies})
        rounded = {
            name: dithered(self.copies[name], self._dtypes[name], name) if name in self.copies else value
            for name, value in weights.items()
        }
        self._model.update(tree_unflatten(list(rounded.items())))


def in_float32(parameters: dict) -> dict:
    """Return a tree of parameters with those of half precision in float32, for the optimizer's state."""
    return tree_map(lambda value: value.astype(mx.float32) if _is_half(value) else value, parameters)


def bytes_of_copies(model: nn.Module) -> int:
    """Return what the float32 copies of :class:`MasterWeights` take."""
    return sum(4 * value.size for value in by_name(model.trainable_parameters()).values() if _is_half(value))


def _is_half(value: mx.array) -> bool:
    return value.dtype in _HALVES
