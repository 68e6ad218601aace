"""The gradient of one optimizer step, summed over its micro-batches and ranks, and the step itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map

from mlx_cpo_plugin.batches import Arrays, Batch, collate, collate_answers
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.objective import Objective
from mlx_cpo_plugin.scoring import AnswerScores, score_answers, score_rows


class StepGradient:
    """Adds up the gradient of an optimizer step micro-batch by micro-batch, then applies it.

    The loss of a step is the mean over all its pairs, so each micro-batch weighs by the pairs it holds, and nothing has
    to be rescaled at the end.

    Args:
        long_context_above: pairs longer than this many tokens are differentiated answer by answer; ``None``: never.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        long_context_above: int | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.long_context_above = long_context_above
        self.total: Any = None
        # Without this the first two steps would be traced as two different ones.
        optimizer.init(model.trainable_parameters())
        self._compile()

    def _compile(self) -> None:
        model, optimizer, objective = self.model, self.optimizer, self.objective

        def batch_loss(model: nn.Module, arrays: Arrays, pairs: mx.array) -> tuple[mx.array, mx.array, AnswerScores]:
            scores = score_answers(model, Batch(*arrays), objective.length_normalised)
            losses = objective.losses(scores)
            return losses.sum() / pairs, losses, scores

        def answer_logps(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
            batch = Batch(*arrays)
            logps, logits = score_rows(model, batch)
            divisor = batch.token_counts if objective.length_normalised else mx.array(1.0)
            return (logps / divisor).sum(), (logits / batch.token_counts).sum()

        # ``quantised`` is read by no one here: it makes the two ways to trace the model two entries of the cache.
        @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
        def batch_gradient(arrays: Arrays, pairs: mx.array, quantised: bool) -> Any:
            (_, losses, scores), gradient = nn.value_and_grad(model, batch_loss)(model, arrays, pairs)
            return losses, scores, gradient

        @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
        def answer_gradient(arrays: Arrays, quantised: bool) -> Any:
            (logps, logits), gradient = nn.value_and_grad(model, answer_logps)(model, arrays)
            return logps, logits, gradient

        @partial(mx.compile, inputs=[model.state, optimizer.state], outputs=[model.state, optimizer.state])
        def apply(gradient: Any) -> mx.array:
            flat: list[tuple[str, mx.array]] = tree_flatten(gradient)  # type: ignore[assignment]  # only strings have none
            squares = [mx.square(value.astype(mx.float32)).sum() for _, value in flat]
            optimizer.update(model, gradient)
            return mx.sqrt(mx.stack(squares).sum())

        self._batch_gradient, self._answer_gradient, self._apply = batch_gradient, answer_gradient, apply

    def add(
        self, pairs: Sequence[PreferencePair], window_pairs: int, quantised: bool = False
    ) -> tuple[mx.array, AnswerScores]:
        """Add the gradient of ``sum(losses) / window_pairs`` over ``pairs``; return losses [B] and scores."""
        longest = max(pair.length for pair in pairs)
        if self.long_context_above is not None and longest > self.long_context_above:
            losses, scores, gradient = self._answer_by_answer(pairs, window_pairs, quantised)
        else:
            losses, scores, gradient = self._batch_gradient(
                collate(pairs).arrays, mx.array(float(window_pairs)), quantised
            )
            scores = AnswerScores(*scores)
        self.total = gradient if self.total is None else tree_map(mx.add, self.total, gradient)
        mx.eval(losses, scores, self.total)
        return losses, scores

    def _answer_by_answer(self, pairs: Sequence[PreferencePair], window_pairs: int, quantised: bool) -> Any:
        """Return the exact gradient while the activations of a single answer are kept at a time.

        The loss of a pair sees the model through two numbers only, the log-probs c and r of its answers. So its
        gradient is dL/dc times that of c plus dL/dr times that of r, and the two are computed one after the other.
        """
        total, losses, scores = None, [], []
        for pair in pairs:
            sides = []
            for answer, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
                side = self._answer_gradient(collate_answers([(pair.prompt, answer, scored)]).arrays, quantised)
                mx.eval(side)
                sides.append(side)
            (chosen_logps, chosen_logits, chosen_gradient), (rejected_logps, rejected_logits, rejected_gradient) = sides
            score = AnswerScores(*(x[None] for x in (chosen_logps, rejected_logps, chosen_logits, rejected_logits)))
            loss, slopes = self._loss_slopes(score)
            chosen_slope, rejected_slope = (slope / window_pairs for slope in slopes)
            gradient = tree_map(
                lambda c, r, cs=chosen_slope, rs=rejected_slope: (cs * c + rs * r).astype(c.dtype),
                chosen_gradient,
                rejected_gradient,
            )
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            mx.eval(total, loss)
            losses.append(loss)
            scores.append(score)
        return (
            mx.concatenate(losses),
            AnswerScores(*(mx.concatenate(list(column)) for column in zip(*scores, strict=True))),
            total,
        )

    def _loss_slopes(self, score: AnswerScores) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """Return the loss [1] of one pair and its derivatives by chosen_logps and rejected_logps."""

        def loss(chosen_logps: mx.array, rejected_logps: mx.array) -> tuple[mx.array, mx.array]:
            losses = self.objective.losses(score._replace(chosen_logps=chosen_logps, rejected_logps=rejected_logps))
            return losses.sum(), losses

        (_, losses), slopes = mx.value_and_grad(loss, argnums=(0, 1))(score.chosen_logps, score.rejected_logps)
        return losses, slopes

    def apply(self) -> float:
        """Take the optimizer step over all ranks and return the norm of its gradient."""
        world_size = mx.distributed.init().size()
        # A rank may have had no pair in the whole step.
        total = self.total if self.total is not None else tree_map(mx.zeros_like, self.model.trainable_parameters())
        if world_size > 1:
            total = tree_map(lambda value: value * world_size, average_gradients(total))
        norm = self._apply(total)
        self.total = None
        mx.eval(self.model.state, self.optimizer.state, norm)
        return float(norm)
