"""A model split into backbone and head: tokens -> hidden states -> logits, for architectures built as mlx_lm's are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.kernels.operations import Weight
from mlx_cpo_plugin.model.caches import fresh_caches
from mlx_cpo_plugin.model.layers import (
    HALF_PRECISION,
    WITH_ADAPTER,
    base_of,
    kernel_weight,
    overridden_calls,
    stored_weight,
)
from mlx_cpo_plugin.parameters import by_name

# The parameters of an output layer, quantised or not, that have one row per token id.
_PER_TOKEN_PARAMETERS = ("weight", "scales", "biases", "bias")
# Token ids whose logits are compared: half of a large vocabulary, widened, would be the peak of a run.
PROBED_IDS = 4096
_BACKBONE_PATHS = ("model", "language_model.model", "backbone", "transformer", "model.language_model")


class SplitModel:
    """The backbone and the head of a model, to be called separately.

    The head is the model itself, run on hidden states in place of its backbone: whatever it does to them there, such as
    a tied embedding, a scale or a soft cap, it does here.

    Raises:
        LookupError: the model has no backbone where mlx_lm's architectures have it.

    Attributes:
        dtype: of the hidden states.
        vocabulary: how many logits there are.
        output_layer: the output projection, with one row per token id, if a layer does nothing but multiply with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone = _find_backbone(model)
        state = self.hidden(mx.zeros((1, 1), mx.int32), fresh_caches(model))
        self.dtype: mx.Dtype = state.dtype
        probe = mx.random.normal((2, state.shape[-1]), key=mx.random.key(0))
        logits = self.logits(probe)
        self.vocabulary: int = logits.shape[-1]
        self.output_layer = self._find_output_layer(probe, logits)
        self._head_is_product = self._has_product_for_head(probe)

    @property
    def head_weight(self) -> Weight | None:
        """The weight of the output layer as it is now, if the head is nothing else and the compiled kernels take it."""
        layer = self.output_layer
        return kernel_weight(layer) if layer is not None and self._head_is_product else None

    def hidden(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Return the hidden states [B, T, D] that the head reads, of tokens int32 [B, T], which ``caches`` take in."""
        return self.backbone(tokens, cache=caches)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits [N, V] of hidden states [N, D]."""
        with overridden_calls([(self.backbone, lambda backbone, *args, **kwargs: hidden[None])]):
            # Unlike an index, squeeze needs no zeros of the size of the logits for its gradient.
            return self.model(mx.zeros((1, len(hidden)), mx.int32)).squeeze(0)

    @contextmanager
    def vocabulary_slice(self, ids: slice | mx.array) -> Iterator[None]:
        """Let the head compute the logits of some token ids only, until the context ends.

        Requires an ``output_layer``; a gradient has to be taken inside the context, too.
        """
        layer = self.output_layer
        assert layer is not None
        whole = {name: layer[name] for name in _PER_TOKEN_PARAMETERS if name in layer}
        try:
            for name, array in whole.items():
                layer[name] = _as_multiplied(array[ids])
            yield
        finally:
            for name, array in whole.items():
                layer[name] = array

    def head_parameters(self) -> dict[str, mx.array]:
        """Return the trainable parameters that are not inside a layer, by name: all that the head can depend on."""
        last = self.model.layers[-1]

        def is_outside(module: nn.Module, name: str, value: Any) -> bool:
            holds_layers = isinstance(value, list) and any(item is last for item in value)
            return not holds_layers and nn.Module.trainable_parameter_filter(module, name, value)

        return by_name(self.model.filter_and_map(is_outside))

    def _find_output_layer(self, probe: mx.array, logits: mx.array) -> nn.Module | None:
        """Return the output projection, if its logits are the same when only a part of them is computed."""
        adapted = {id(base_of(module)) for module in self.model.modules() if isinstance(module, WITH_ADAPTER)}
        for layer in self.model.modules():
            if id(layer) in adapted:  # of which the adapter would compute the rest
                continue
            known = type(layer) in (nn.Linear, nn.Embedding) or isinstance(
                layer, nn.QuantizedLinear | nn.QuantizedEmbedding
            )
            # What stands in for a class, such as fake quantisation, may look at the whole weight.
            if not vars(type(layer)).get("row_by_row", known) or len(layer.weight) != self.vocabulary:
                continue
            self.output_layer = layer
            count = min(PROBED_IDS, self.vocabulary // 2)
            with self.vocabulary_slice(slice(0, count)):
                part = self.logits(probe)
            difference = mx.abs(part - logits[:, :count]).max() if part.size < logits.size else mx.inf
            if difference <= 0.01 * mx.abs(logits).max():
                return layer
        return None

    def _has_product_for_head(self, probe: mx.array) -> bool:
        layer = self.output_layer
        if layer is None or "bias" in layer or kernel_weight(layer) is None:
            return False
        states = 1000 * probe  # a soft cap is nothing but itself where logits are small
        count = min(PROBED_IDS, self.vocabulary // 2)
        with self.vocabulary_slice(slice(0, count)):
            logits = self.logits(states).astype(mx.float32)
        plain = states.astype(mx.float32) @ stored_weight(layer, slice(0, count)).astype(mx.float32).T
        return bool(mx.abs(logits - plain).max() <= 0.01 * mx.abs(plain).max())


def _as_multiplied(part: mx.array) -> mx.array:
    """Return a part of a weight as products want it: on a CPU in float32, so that forwards and backwards share it."""
    if not current_device().fast_half_products and part.dtype in HALF_PRECISION:
        return part.astype(mx.float32)
    return part


def _find_backbone(model: nn.Module) -> nn.Module:
    for path in _BACKBONE_PATHS:
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return module
    raise LookupError(f"{type(model).__module__} has no backbone of its own")
