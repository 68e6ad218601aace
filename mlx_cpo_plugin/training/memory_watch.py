"""Warns before a micro-batch for which memory may not suffice: on a CPU, the process would end without a word."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import free_memory
from mlx_cpo_plugin.errors import LOWER_THESE, TrainingError
from mlx_cpo_plugin.training.memory_estimate import ModelSizes, Way, bytes_for


class MemoryWatch:
    """Compares micro-batches with the memory that is free."""

    def __init__(self, model: nn.Module, way: Way) -> None:
        self.sizes = ModelSizes(model, way)
        self.way = way
        self._most_tried = 0

    def risk(self, pairs: Sequence[PreferencePair], step: int) -> str | None:
        """Return what to say before a micro-batch that may need more than is free, and more than any one before it.

        Raises:
            TrainingError: the gradient alone, which is there as a whole in the end, needs more than is free.
        """
        free = free_memory()
        if free is None:
            return None
        free += mx.get_cache_memory()  # what MLX has kept of arrays that are gone
        longest = max(pairs, key=lambda pair: pair.tokens).source or "a row without a source"
        if self.sizes.gradient > free:
            raise TrainingError(
                f"Step {step}: the gradient alone needs {self.sizes.gradient / 1e9:.2f} GB, but {free / 1e9:.2f} GB "
                "are free; train fewer parameters (train_type: lora, lower num_layers or rank) or free memory."
            )
        needed = bytes_for(self.sizes, pairs, self.way)
        if needed <= max(free, self._most_tried):
            return None
        self._most_tried = needed
        return (
            f"Step {step}: the micro-batch with {longest} may need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} "
            f"GB are free; if the process ends here without a word, {LOWER_THESE}."
        )
