"""What must not go unnoticed while a run trains: each alarm says at which step, and what to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.model.logps import AnswerScores

WINDOW = 20
# How many standard errors two halves of the window have to be apart.
CERTAIN = 3.0
_NAMED = 3


class TrainingError(UserError):
    """Training cannot go on; the last good adapter is kept."""


LOWER_THESE = "lower max_seq_length, batch_size or batch_tokens, or switch on grad_checkpoint or efficient_long_context"
OUT_OF_MEMORY = f"The device is out of memory; {LOWER_THESE}."


def check_losses(losses: mx.array, pairs: Sequence[PreferencePair], step: int) -> None:
    """Stop before a loss that is no number spoils the weights.

    Raises:
        TrainingError: names the rows.
    """
    bad = np.flatnonzero(~np.isfinite(np.array(losses))).tolist()
    if bad:
        raise TrainingError(
            f"Step {step}: the loss of {_rows([pairs[number] for number in bad])} is not finite; look at these rows, "
            "lower the learning rate or beta. The weights from before this step are kept."
        )


def check_gradient(norm: float, pairs: Sequence[PreferencePair], step: int) -> None:
    """Stop before a gradient that is no number spoils the weights.

    Raises:
        TrainingError: names the rows of the step.
    """
    if not np.isfinite(norm):
        raise TrainingError(
            f"Step {step}: the gradient of {_rows(pairs)} is not finite, though the losses are; lower the learning "
            "rate, set max_grad_norm, or load the model in a wider precision. The weights from before this step are "
            "kept."
        )


def check_first_update(
    before: Mapping[str, mx.array], after: Mapping[str, mx.array], learning_rate: float, all_satisfied: bool
) -> None:
    """Find out that nothing is being trained, which logs would not show.

    Args:
        before, after: the trainable parameters by name.
        all_satisfied: whether every loss was exactly zero, which leaves nothing to learn.

    Raises:
        TrainingError: no parameter changed.
    """
    if learning_rate == 0 or all_satisfied:
        return
    if all(bool(mx.array_equal(value, after[name]).item()) for name, value in before.items()):
        raise TrainingError(
            f"Step 1: none of {len(before)} trainable parameters changed; check num_layers, lora_parameters (a scale "
            "above 0) and that the learning rate is not too small for the model's precision."
        )


class DisplacementAlarm:
    """Tells once when margins rise only because both answers become unlikely, the chosen one too."""

    def __init__(self, loss_type: str) -> None:
        self.loss_type = loss_type
        self.means: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        self.told = False

    def warning(self, iteration: int, scores: AnswerScores) -> str | None:
        """Take note of a micro-batch; return what there is to tell after it."""
        chosen, rejected = np.array(scores.chosen_logps, np.float64), np.array(scores.rejected_logps, np.float64)
        self.means.append((float(chosen.mean()), float((chosen - rejected).mean())))
        if self.told or len(self.means) < 2 * WINDOW:
            return None
        earlier, later = np.array(self.means)[:WINDOW], np.array(self.means)[WINDOW:]
        moved = later.mean(0) - earlier.mean(0)
        error = np.sqrt((earlier.var(0, ddof=1) + later.var(0, ddof=1)) / WINDOW)
        if not (moved[1] > CERTAIN * error[1] and moved[0] < -CERTAIN * error[0]):
            return None
        self.told = True
        advice = (
            "raise delta or lower beta" if self.loss_type == "dpop" else "try dpo_cpo_loss_type: dpop, or a lower beta"
        )
        return (
            f"Iter {iteration}: the margin rose by {moved[1]:.1f} while the chosen answers' log-prob fell by "
            f"{-moved[0]:.1f} (likelihood displacement); {advice}."
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {"means": list(self.means), "told": self.told}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.means.extend((chosen, margin) for chosen, margin in state["means"])
        self.told = bool(state["told"])


def _rows(pairs: Sequence[PreferencePair]) -> str:
    named = [pair.source or "a row without a source" for pair in pairs[:_NAMED]]
    more = len(pairs) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
