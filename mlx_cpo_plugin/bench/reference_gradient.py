"""The float64 gradient that the trainers of a benchmark are compared with: neither can tell how good another is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.selftest.float64_gradient import answer_gradient, convert
from mlx_cpo_plugin.settings.config import RunSettings


@dataclass(frozen=True)
class ReferenceLoss:
    """One of the losses that both trainers have.

    Attributes:
        loss_type: ``sigmoid``, ``hinge``, ``ipo`` or ``dpop``.
        beta, delta: as in the settings.
    """

    loss_type: str
    beta: float
    delta: float

    @classmethod
    def from_settings(cls, settings: RunSettings) -> ReferenceLoss:
        """Take the loss from the settings of a run."""
        return cls(settings.dpo_cpo_loss_type, settings.beta, settings.delta)

    @property
    def takes_means(self) -> bool:
        """Whether an answer's log-prob is the mean of its tokens' instead of their sum."""
        return self.loss_type == "ipo"

    def slope(self, gap: float) -> float:
        """Return the derivative of a pair's loss by ``gap``, which is ``chosen_logps - rejected_logps``.

        The gap is all that these losses see of the model, the penalty of ``dpop`` included.
        """
        if self.loss_type == "hinge":
            return -self.beta if self.beta * gap < 1 else 0.0
        if self.loss_type == "ipo":
            return 2 * (gap - 1 / (2 * self.beta))
        # sigmoid(-x) as exp(-log(1 + exp(x))), for which no x is too large
        of_sigmoid = -self.beta * math.exp(-np.logaddexp(0.0, self.beta * gap))
        if self.loss_type == "dpop":
            return of_sigmoid - (self.delta if gap < 0 else 0.0)
        return of_sigmoid


def reference_gradient(
    model: nn.Module, pairs: Sequence[PreferencePair], loss: ReferenceLoss, finished: Callable[[int], None]
) -> dict[str, mx.array]:
    """Return the gradient of the mean loss of ``pairs`` by parameter name, float64.

    Args:
        model: is converted to float64 and stays so.
        finished: is told the number of pairs that are done.

    Raises:
        ValueError: the model is quantised, too large for this machine in float64, or leaves float64 on the way.
    """
    # Only CPUs have float64.
    with mx.stream(mx.cpu):
        convert(model)
        total: dict[str, mx.array] = {}
        with checkpointed_layers(model):
            for number, pair in enumerate(pairs, 1):
                chosen, by_chosen = answer_gradient(
                    model, pair.prompt, pair.chosen, pair.chosen_scored, loss.takes_means
                )
                rejected, by_rejected = answer_gradient(
                    model, pair.prompt, pair.rejected, pair.rejected_scored, loss.takes_means
                )
                weight = loss.slope(chosen - rejected) / len(pairs)
                for name, value in by_chosen.items():
                    total[name] = total.get(name, 0) + weight * (value - by_rejected[name])
                mx.eval(total)
                finished(number)
    return total
