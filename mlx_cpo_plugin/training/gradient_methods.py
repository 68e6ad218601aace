"""Pairs -> the gradient of their losses, by several methods that trade speed for memory; all of them are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.batches import Arrays, Batch, StepArrays, StepTotals, collate, collate_answers
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.buckets import PairSize
from mlx_cpo_plugin.model.logps import AnswerScores, normalised, score_answers, score_rows
from mlx_cpo_plugin.model.shared_prefix import SplitPair, split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedBatch, SharedPromptScorer, collate_shared
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.objective import Objective

Gradient = dict[str, mx.array]


class PairGradients(NamedTuple):
    """Preference losses, float32 [B], and scores of B pairs, and the gradient of what they add to the step's loss.

    For the step's loss see :meth:`mlx_cpo_plugin.training.objective.Objective.step_contribution`.
    """

    losses: mx.array
    scores: AnswerScores
    gradient: Gradient


class GradientMethod(Protocol):
    """A way to compute gradients.

    ``step`` says what the whole optimizer step holds, and ``quantised`` whether fake quantisation is active: a compiled
    model has to be traced anew for each.
    """

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients: ...


class BatchGradients:
    """All pairs in one padded, compiled pass.

    Args:
        scorer: computes shared prefixes once; ``None``: every answer is a row with its whole prompt.
    """

    def __init__(self, model: nn.Module, objective: Objective, scorer: SharedPromptScorer | None = None) -> None:
        self.scorer = scorer

        def contribution(
            model: nn.Module, arrays: Arrays | tuple[mx.array, ...], scores_shared: bool, step: StepArrays
        ) -> tuple[mx.array, mx.array, Sequence[mx.array]]:
            if scorer is None:
                scores = score_answers(model, Batch(*arrays), objective.length_normalised)
            else:
                sums = scorer.score_batch(SharedBatch(*arrays), scores_shared, differentiate=True)
                scores = normalised(sums, objective.length_normalised)
            # On a CPU MLX may fail to compile a function that also returns a part of what it is given.
            return *objective.step_contribution(scores, *step), scores[:-2]

        self._compute = _compiled_value_and_grad(model, contribution)

    def __call__(
        self,
        pairs: Sequence[PreferencePair],
        step: StepTotals,
        quantised: bool = False,
        bucket: PairSize | None = None,
    ) -> PairGradients:
        """Return the gradients of ``pairs``; with a scorer padded to ``bucket``, by default to the longest of them."""
        arrays: Arrays | SharedBatch
        scores_shared = False
        if self.scorer is None:
            arrays = collate(pairs).arrays
        else:
            splits = [split_shared_prefix(pair) for pair in pairs]
            bucket = bucket or self.scorer.grouping.bucket_for([PairSize.of(split) for split in splits])
            arrays, scores_shared = collate_shared(splits, bucket), bucket.scores_shared
        (losses, scores), gradient = self._compute(quantised, tuple(arrays), scores_shared, step.arrays)
        counts = arrays[-1]
        columns = (*scores, counts[: len(pairs)], counts[len(pairs) :])
        return PairGradients(losses, AnswerScores(*columns), by_name(gradient))


class AnswerGradients:
    """One answer at a time, with its whole prompt: the activations of a single answer are kept.

    The loss of a pair depends on the model through the log-probs c and r of its answers only. So its gradient is dL/dc
    times that of c plus dL/dr times that of r, and the two can be computed one after the other.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        def answer_logps(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, mx.array]:
            logps, logits = score_rows(model, Batch(*arrays))
            return logps.sum(), logps, logits

        self.objective = objective
        self._compute = _compiled_value_and_grad(model, answer_logps)

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        return summed_over_groups([[pair] for pair in pairs], lambda group: self._pair(group[0], step, quantised))

    def _pair(self, pair: PreferencePair, step: StepTotals, quantised: bool) -> PairGradients:
        sides = []
        for answer, scored in pair.answers:
            batch = collate_answers([(pair.prompt, answer, scored)])
            (logps, logits), gradient = self._compute(quantised, batch.arrays)
            mx.eval(logps, logits, gradient)
            sides.append((logps, logits, batch.token_counts, by_name(gradient)))
        (*chosen, grad_chosen), (*rejected, grad_rejected) = sides
        sums = AnswerScores(*(column for columns in zip(chosen, rejected, strict=True) for column in columns))
        losses, scores, slopes = loss_grads_wrt_logps(self.objective, sums, step)
        return PairGradients(losses, scores, weighted_sum(slopes, grad_chosen, grad_rejected))


class PassGradients:
    """All that ``score(pairs, differentiate=True)`` scores in one pass, which is not compiled."""

    def __init__(self, model: nn.Module, objective: Objective, score: Callable[..., AnswerScores]) -> None:
        def contribution(model: nn.Module, pairs: Any, step: StepTotals) -> tuple[mx.array, mx.array, AnswerScores]:
            scores = normalised(score(pairs, differentiate=True), objective.length_normalised)
            return *objective.step_contribution(scores, *step), scores

        self._compute = partial(nn.value_and_grad(model, contribution), model)

    def __call__(self, pairs: SplitPair | Sequence[SplitPair], step: StepTotals) -> PairGradients:
        (_, losses, scores), gradient = self._compute(pairs, step)
        return PairGradients(losses, scores, by_name(gradient))


def _compiled_value_and_grad(model: nn.Module, function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Return a compiled function of ``quantised`` and the arguments of ``function`` behind the model.

    It returns the results of ``function`` behind the first, and the gradient of the first one.
    """

    # ``quantised`` is read by no one here: it makes the two ways to trace the model two entries of the cache.
    @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
    def compute(quantised: bool, *arguments: Any) -> tuple[Any, Any]:
        (_, *results), gradient = nn.value_and_grad(model, function)(model, *arguments)
        return results, gradient

    return compute


def added(left: Gradient | None, right: Gradient) -> Gradient:
    """Return the sum of two gradients, in float32: in half precision small ones would vanish.

    ``None`` is zero, whose sum is the other one in its own dtype.
    """
    return right if left is None else {name: left[name].astype(mx.float32) + value for name, value in right.items()}


def weighted_sum(weights: tuple[mx.array, mx.array], left: Gradient, right: Gradient) -> Gradient:
    """Return ``weights[0] * left + weights[1] * right`` in the dtypes of ``left``; the weights have one element."""
    first, second = (weight.reshape(()) for weight in weights)
    return {name: (first * value + second * right[name]).astype(value.dtype) for name, value in left.items()}


def summed_over_groups(
    groups: Sequence[Sequence[Any]], compute: Callable[[Sequence[Any]], PairGradients], order: Sequence[int] = ()
) -> PairGradients:
    """Add up what ``compute`` returns for groups of pairs, one after the other.

    Args:
        order: the number that each of the groups' pairs has in the result; empty: they come in their order.
    """
    losses, scores = [], []
    total: Gradient | None = None
    for group in groups:
        result = compute(group)
        total = added(total, result.gradient)
        mx.async_eval(total, result.losses, result.scores)  # a GPU computes while the next group is put together
        losses.append(result.losses)
        scores.append(result.scores)
    columns = [mx.concatenate(list(column)) for column in (losses, *zip(*scores, strict=True))]
    if order:
        at = mx.argsort(mx.array(list(order)))
        columns = [column[at] for column in columns]
    return PairGradients(columns[0], AnswerScores(*columns[1:]), total or {})


def loss_grads_wrt_logps(
    objective: Objective, sums: AnswerScores, step: StepTotals
) -> tuple[mx.array, AnswerScores, tuple[mx.array, mx.array]]:
    """Return loss [1] and scores of a pair, and the gradient of what it adds to the step's loss w.r.t. its log-probs.

    Args:
        sums: over the scored tokens, each float32 [1].
    """

    def contribution(chosen_logps: mx.array, rejected_logps: mx.array) -> tuple[mx.array, mx.array, AnswerScores]:
        moved = sums._replace(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
        scores = normalised(moved, objective.length_normalised)
        return *objective.step_contribution(scores, *step), scores

    value_and_grad = mx.value_and_grad(contribution, argnums=(0, 1))
    (_, losses, scores), grads = value_and_grad(sums.chosen_logps, sums.rejected_logps)
    return losses, AnswerScores(*scores), grads
