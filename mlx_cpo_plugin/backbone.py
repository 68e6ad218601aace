"""A model taken apart: tokens -> hidden states -> logits, for any architecture that mlx_lm builds alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.overrides import overridden_calls
from mlx_cpo_plugin.parameters import by_name

_BACKBONE_PATHS = ("model", "language_model.model", "backbone", "transformer", "model.language_model")


class SplitModel:
    """The backbone and the head of a model, to be called separately.

    The head is the model itself, run on hidden states in place of its backbone: whatever it does to them there, such as
    a tied embedding, a scale or a soft cap, it does here.

    Raises:
        LookupError: the model has no backbone where mlx_lm's architectures have it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone = _find_backbone(model)

    def hidden(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Return the hidden states [B, T, D] that the head reads, of tokens int32 [B, T]; ``caches`` take them in."""
        return self.backbone(tokens, cache=caches)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits [N, V] of hidden states [N, D]."""
        with overridden_calls([(self.backbone, lambda backbone, *args, **kwargs: hidden[None])]):
            return self.model(mx.zeros((1, len(hidden)), mx.int32))[0]

    def head_parameters(self) -> dict[str, mx.array]:
        """Return the trainable parameters that are not inside a layer, by name: all that the head can depend on."""
        trainable = by_name(self.model.trainable_parameters())
        return {name: value for name, value in trainable.items() if "layers" not in name.split(".")}


def _find_backbone(model: nn.Module) -> nn.Module:
    for path in _BACKBONE_PATHS:
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return module
    raise LookupError(f"{type(model).__module__} has no backbone of its own")
