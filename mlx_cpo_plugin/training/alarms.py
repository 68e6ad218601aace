"""Checks that end a run before its weights are corrupted; each says at which step, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import UserError

_NAMED = 3


class TrainingError(UserError):
    """Training cannot go on; the last good adapter is kept."""


LOWER_THESE = "lower max_seq_length, batch_size or batch_tokens, or switch on grad_checkpoint or efficient_long_context"
OUT_OF_MEMORY = f"The device is out of memory; {LOWER_THESE}."


def check_losses(losses: mx.array, pairs: Sequence[PreferencePair], step: int) -> None:
    """Raise a TrainingError that names the rows before a non-finite loss corrupts the weights."""
    bad = np.flatnonzero(~np.isfinite(np.array(losses))).tolist()
    if bad:
        raise TrainingError(
            f"Step {step}: the loss of {_rows([pairs[number] for number in bad])} is not finite; look at these rows, "
            "lower the learning rate or beta. The weights from before this step are kept."
        )


def check_gradient(norm: float, pairs: Sequence[PreferencePair], step: int) -> None:
    """Raise a TrainingError that names the step's rows before a non-finite gradient corrupts the weights."""
    if not np.isfinite(norm):
        raise TrainingError(
            f"Step {step}: the gradient of {_rows(pairs)} is not finite, though the losses are; lower the learning "
            "rate, set max_grad_norm, or load the model in a wider precision. The weights from before this step are "
            "kept."
        )


def check_first_update(
    before: Mapping[str, mx.array], after: Mapping[str, mx.array], learning_rate: float, all_satisfied: bool
) -> None:
    """Raise a TrainingError where no parameter changed, which logs would not show.

    Args:
        before, after: the trainable parameters by name.
        all_satisfied: whether every loss was exactly zero, which leaves nothing to learn.
    """
    if learning_rate == 0 or all_satisfied:
        return
    if all(bool(mx.array_equal(value, after[name]).item()) for name, value in before.items()):
        raise TrainingError(
            f"Step 1: none of {len(before)} trainable parameters changed; check num_layers, lora_parameters (a scale "
            "above 0) and that the learning rate is not too small for the model's precision."
        )


def _rows(pairs: Sequence[PreferencePair]) -> str:
    named = [pair.source or "a row without a source" for pair in pairs[:_NAMED]]
    more = len(pairs) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
