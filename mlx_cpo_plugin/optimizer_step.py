"""One optimizer step: the gradient summed over its micro-batches and ranks, then applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.nn.utils import average_gradients
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.gradients import Gradient, GradientMethod, added
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.scoring import AnswerScores


class OptimizerStep:
    """Adds up the gradient of a step micro-batch by micro-batch, then applies it.

    The loss of a step is the mean over all its pairs, so each micro-batch weighs by the pairs it holds, and nothing has
    to be rescaled at the end.

    Args:
        gradients: computes gradients.
        long_gradients: computes those of pairs longer than ``long_above`` tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        gradients: GradientMethod,
        long_gradients: GradientMethod,
        long_above: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.gradients = gradients
        self.long_gradients = long_gradients
        self.long_above = long_above
        self.total: Gradient | None = None
        # Without this the first two steps would be traced as two different ones.
        optimizer.init(model.trainable_parameters())

        @partial(mx.compile, inputs=[model.state, optimizer.state], outputs=[model.state, optimizer.state])
        def update(gradient: Gradient) -> mx.array:
            squares = [mx.square(value.astype(mx.float32)).sum() for value in gradient.values()]
            optimizer.update(model, tree_unflatten(list(gradient.items())))
            return mx.sqrt(mx.stack(squares).sum())

        self._update = update

    def add(
        self, pairs: Sequence[PreferencePair], step_pairs: int, quantised: bool = False
    ) -> tuple[mx.array, AnswerScores]:
        """Add the gradient of ``sum(losses) / step_pairs`` over ``pairs``; return losses [B] and scores."""
        long = max(pair.length for pair in pairs) > self.long_above
        result = (self.long_gradients if long else self.gradients)(pairs, step_pairs, quantised)
        self.total = added(self.total, result.gradient)
        mx.eval(result.losses, result.scores, self.total)
        return result.losses, result.scores

    def apply(self) -> float:
        """Take the optimizer step over all ranks and return the norm of its gradient."""
        world_size = mx.distributed.init().size()
        # A rank may have had no pair in the whole step.
        total = self.total or {k: mx.zeros_like(v) for k, v in by_name(self.model.trainable_parameters()).items()}
        if world_size > 1:
            total = {name: value * world_size for name, value in by_name(average_gradients(total)).items()}
        norm = self._update(total)
        self.total = None
        mx.eval(self.model.state, self.optimizer.state, norm)
        return float(norm)
