"""Log-probs, losses and gradients of pairs in float64, by the plainest way there is: the CPU, one answer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.selftest.float64_gradient import answer_gradient, convert
from mlx_cpo_plugin.selftest.models import unquantised
from mlx_cpo_plugin.training.gradient_methods import PairGradients
from mlx_cpo_plugin.training.objective import Objective


@dataclass(frozen=True)
class Reference:
    """What B pairs amount to as an optimizer step of their own, all in float64.

    Attributes:
        chosen_logps, rejected_logps: [B], sums, or means where the loss wants these.
        losses: [B], without the likelihood term.
        gradient: of the step's loss, by the parameter's name.
    """

    chosen_logps: NDArray[np.float64]
    rejected_logps: NDArray[np.float64]
    losses: NDArray[np.float64]
    gradient: dict[str, NDArray[np.float64]]

    @classmethod
    def of_result(cls, result: PairGradients) -> Reference:
        """Take what was computed on the device itself for the reference."""
        return cls(
            chosen_logps=_as_float64(result.scores.chosen_logps),
            rejected_logps=_as_float64(result.scores.rejected_logps),
            losses=_as_float64(result.losses),
            gradient={name: _as_float64(value) for name, value in result.gradient.items()},
        )

    def score_error(self, result: PairGradients) -> float:
        """Return the largest error of log-probs and losses, relative to each, or to 1 where it is smaller."""
        pairs = (
            (result.scores.chosen_logps, self.chosen_logps),
            (result.scores.rejected_logps, self.rejected_logps),
            (result.losses, self.losses),
        )
        errors = [np.abs(_as_float64(ours) - own) / np.maximum(np.abs(own), 1) for ours, own in pairs]
        return float(np.max(errors))  # unlike Python's max, NaN where any of them is

    def gradient_error(self, result: PairGradients) -> float:
        """Return the norm of the gradient's error over that of the gradient.

        Raises:
            ValueError: it is a gradient of other parameters.
        """
        if result.gradient.keys() != self.gradient.keys():
            raise ValueError(f"gradients of {sorted(result.gradient.keys() ^ self.gradient.keys())[:3]} differ")
        errors = [np.sum((_as_float64(result.gradient[name]) - own) ** 2) for name, own in self.gradient.items()]
        return float(np.sqrt(np.sum(errors) / np.sum([np.sum(own**2) for own in self.gradient.values()])))


def reference_of(
    model: nn.Module, pairs: Sequence[PreferencePair], objective: Objective, *, recompute: bool = False
) -> Reference:
    """Return the reference of ``pairs``; ``model`` is converted to float64 and stays so.

    Args:
        recompute: layers keep no activations for the backward pass, for models that are not tiny.

    Raises:
        ValueError: the model is too large for this machine in float64, or leaves float64 on the way.
    """
    with mx.stream(mx.cpu), _gather_mm_by_definition():  # only CPUs have float64
        convert(unquantised(model))
        with checkpointed_layers(model) if recompute else nullcontext():
            sides = [
                [
                    answer_gradient(model, pair.prompt, answer, scored, objective.length_normalised)
                    for answer, scored in pair.answers
                ]
                for pair in pairs
            ]
        chosen, rejected = (mx.array([side[at][0] for side in sides], mx.float64) for at in (0, 1))
        tokens = mx.array([float(pair.chosen_tokens) for pair in pairs], mx.float64)

        def step_loss(chosen: mx.array, rejected: mx.array) -> tuple[mx.array, mx.array]:
            losses = objective.fn(chosen, rejected, **objective.options)
            nll = -chosen * tokens if objective.length_normalised else -chosen
            return losses.mean() + objective.cpo_alpha * nll.sum() / tokens.sum(), losses

        (_, losses), slopes = mx.value_and_grad(step_loss, argnums=(0, 1))(chosen, rejected)
        mx.eval(losses, slopes)
        by_chosen, by_rejected = (np.array(slope) for slope in slopes)
        gradient = {
            name: sum(
                by_chosen[at] * np.array(pair[0][1][name]) + by_rejected[at] * np.array(pair[1][1][name])
                for at, pair in enumerate(sides)
            )
            for name in sides[0][0][1]
        }
        return Reference(np.array(chosen), np.array(rejected), np.array(losses), gradient)


@contextmanager
def _gather_mm_by_definition() -> Iterator[None]:
    """Let the products of experts, for which MLX has no float64, gather their weights until the context ends."""
    kernel = mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, *, rhs_indices: mx.array, **_order: Any) -> mx.array:
        return a @ b[rhs_indices]

    mx.gather_mm = gather_mm  # type: ignore[assignment]  # called as mlx_lm calls it
    try:
        yield
    finally:
        mx.gather_mm = kernel


def _as_float64(array: mx.array) -> NDArray[np.float64]:
    return np.array(array.astype(mx.float32), np.float64)
