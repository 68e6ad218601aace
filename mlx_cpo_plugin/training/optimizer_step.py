"""One optimizer step: the gradient summed over its micro-batches and ranks, then applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.exchange import sum_over_ranks
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.alarms import check_first_update, check_gradient, check_losses
from mlx_cpo_plugin.training.gradients import Gradient, GradientMethod, added
from mlx_cpo_plugin.training.master_weights import MasterWeights, in_float32


class OptimizerStep:
    """Adds up the gradient of a step micro-batch by micro-batch, then applies it.

    The loss of a step is a mean over all its pairs, and with ``cpo_alpha`` one over the tokens of all their chosen
    answers, so each micro-batch weighs by what it holds of them, and nothing has to be rescaled at the end.

    Args:
        gradients: computes gradients.
        long_gradients: computes those of pairs longer than ``long_above`` tokens.
        max_norm: gradients are scaled down to it; ``None``: they are not.

    Attributes:
        number: of the step that is added up, from 1.
        total: its gradient so far; ``None`` while there is none.
        masters: the weights that are updated, part of what a resumed run needs.
        optimizer_is_whole: whether no step has failed that may have changed a part of the optimizer's state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        gradients: GradientMethod,
        long_gradients: GradientMethod,
        long_above: float,
        max_norm: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.gradients = gradients
        self.long_gradients = long_gradients
        self.long_above = long_above
        self.max_norm = max_norm
        self.number = 1
        self.total: Gradient | None = None
        self.optimizer_is_whole = True
        self._pairs: list[PreferencePair] = []
        self._all_satisfied = True
        self.masters = MasterWeights(model)
        # Without this the first two steps would be traced as two different ones.
        optimizer.init(in_float32(model.trainable_parameters()))
        changed = [model.state, optimizer.state, self.masters.copies]

        @partial(mx.compile, inputs=changed, outputs=changed)
        def update(gradient: Gradient, scale: mx.array) -> None:
            weights = self.masters.weights()
            scaled = {name: (scale * value).astype(weights[name].dtype) for name, value in gradient.items()}
            updated = optimizer.apply_gradients(_tree(scaled), _tree(weights))
            self.masters.set(by_name(updated))

        self._update = update

    def add(
        self, pairs: Sequence[PreferencePair], totals: StepTotals, quantised: bool = False
    ) -> tuple[mx.array, AnswerScores]:
        """Add the gradient of what ``pairs`` add to the loss of the step; return preference losses [B] and scores.

        Args:
            totals: of the whole step.
        """
        long = max(pair.length for pair in pairs) > self.long_above
        result = (self.long_gradients if long else self.gradients)(pairs, totals, quantised)
        mx.eval(result.losses, result.scores, result.gradient)
        check_losses(result.losses, pairs, self.number)
        total = added(self.total, result.gradient)
        mx.eval(total)
        self.total = total  # only now, so that nothing is half done where memory ends
        self._pairs += pairs
        self._all_satisfied &= not np.array(result.losses).any()
        return result.losses, result.scores

    def apply(self) -> float:
        """Take the optimizer step over all ranks and return the norm of its gradient, before it was scaled down.

        Raises:
            TrainingError: the gradient is not finite, or the first step changes nothing; nothing was updated.
            LostRankError: the gradient is not that of all ranks; nothing was updated.
        """
        weights = self.masters.weights()
        # A rank may have had no pair in the whole step. Ranks exchange arrays by their order, not by their names.
        total = {name: self.total[name] if self.total else mx.zeros_like(value) for name, value in weights.items()}
        if mx.distributed.init().size() > 1:  # ranks have to exchange the same dtypes, too
            total = sum_over_ranks({name: value.astype(weights[name].dtype) for name, value in total.items()})
        norm = gradient_norm(total)
        check_gradient(norm, self._pairs, self.number)
        before = weights if self.number == 1 else {}
        scale = mx.array(1.0 if self.max_norm is None else min(1.0, self.max_norm / max(norm, 1e-30)))
        self.optimizer_is_whole = False
        try:
            self._update(total, scale)
            mx.eval(self.model.state, self.optimizer.state, self.masters.copies)
            if before:
                after, rate = self.masters.weights(), float(self.optimizer.learning_rate.item())
                check_first_update(before, after, rate, self._all_satisfied)
        except BaseException:
            self.masters.set(weights)
            raise
        self.optimizer_is_whole = True
        self.total, self._pairs = None, []
        self.number += 1
        return norm


def _tree(arrays: dict[str, mx.array]) -> Any:
    return tree_unflatten(list(arrays.items()))


def gradient_norm(gradient: Gradient) -> float:
    """Return the Euclidean norm over all parameters, summed in float32."""
    squares = [mx.square(value.astype(mx.float32)).sum() for value in gradient.values()]
    norm: Any = mx.sqrt(mx.stack(squares).sum()).item()
    return float(norm)
