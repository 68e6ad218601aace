"""Pairs -> the gradient of their losses, in the ways that trade speed for memory; all of them exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.batches import Arrays, Batch, StepArrays, StepTotals, collate, collate_answers
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.grouping import Grouping, PairSize
from mlx_cpo_plugin.model.logps import AnswerScores, score_answers, score_rows
from mlx_cpo_plugin.model.shared_batch import SharedBatch, collate_shared, score_batch
from mlx_cpo_plugin.model.shared_prompt import SharedPair, SharedPromptScorer, fit_together, normalised_pair, share
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.objective import Objective

Gradient = dict[str, mx.array]


class PairGradients(NamedTuple):
    """Preference losses float32 [B] and scores of B pairs, and the gradient of their part in the step's loss by name.

    For the step's loss see :meth:`mlx_cpo_plugin.training.objective.Objective.part_of_step`.
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
    """All answers of the pairs in one padded, compiled forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        def loss(model: nn.Module, arrays: Arrays, step: StepArrays) -> tuple[mx.array, mx.array, AnswerScores]:
            scores = score_answers(model, Batch(*arrays), objective.length_normalised)
            return *objective.part_of_step(scores, *step), scores

        # ``quantised`` is read by no one here: it makes the two ways to trace the model two entries of the cache.
        @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
        def compute(arrays: Arrays, step: StepArrays, quantised: bool) -> Any:
            (_, losses, scores), gradient = nn.value_and_grad(model, loss)(model, arrays, step)
            # On a CPU MLX may fail to compile a function that also returns a part of what it is given.
            return losses, scores[:-2], gradient

        self._compute = compute

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        batch = collate(pairs)
        losses, scores, gradient = self._compute(batch.arrays, step.arrays, quantised)
        columns = (*scores, batch.token_counts[: len(pairs)], batch.token_counts[len(pairs) :])
        return PairGradients(losses, AnswerScores(*columns), by_name(gradient))


class AnswerGradients:
    """One answer at a time: the activations of a single answer are kept.

    The loss of a pair sees the model through two numbers only, the log-probs c and r of its answers. So its gradient is
    dL/dc times that of c plus dL/dr times that of r, and the two can be computed one after the other.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.objective = objective

        def answer_logps(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
            logps, logits = score_rows(model, Batch(*arrays))
            return logps.sum(), logits.sum()

        @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
        def compute(arrays: Arrays, quantised: bool) -> Any:
            (logps, logits), gradient = nn.value_and_grad(model, answer_logps)(model, arrays)
            return logps, logits, gradient

        self._compute = compute

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        return one_by_one(pairs, lambda pair: self._pair(pair, step, quantised))

    def _pair(self, pair: PreferencePair, step: StepTotals, quantised: bool) -> PairGradients:
        sides = []
        for answer, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
            side = self._compute(collate_answers([(pair.prompt, answer, scored)]).arrays, quantised)
            mx.eval(side)
            sides.append(side)
        (chosen_logps, chosen_logits, by_chosen), (rejected_logps, rejected_logits, by_rejected) = sides
        sums = [x.reshape(1) for x in (chosen_logps, rejected_logps, chosen_logits, rejected_logits)]
        losses, scores, (chosen_slope, rejected_slope) = loss_slopes(self.objective, pair, sums, step)
        gradient = weighted_sum(chosen_slope, by_name(by_chosen), rejected_slope, by_name(by_rejected))
        return PairGradients(losses, scores, gradient)


class SharedPromptGradients:
    """Over shared starts: pairs of like length in one padded pass where that is faster, the others one at a time.

    A pair alone has no padding but that between its answers: short ones are computed side by side, others one after the
    other.

    Args:
        one_after_the_other: computes a pair whose answers are long, in less memory.
        compiled: compile the padded passes, and compute pairs alone that way, too, as long as they fit.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        scorer: SharedPromptScorer,
        one_after_the_other: Callable[[PreferencePair, SharedPair, StepTotals], PairGradients],
        grouping: Grouping,
        compiled: bool = False,
    ) -> None:
        def loss(
            model: nn.Module, pair: PreferencePair, cut: SharedPair, step: StepTotals
        ) -> tuple[mx.array, mx.array, AnswerScores]:
            scores = normalised_pair(scorer.score(cut, differentiate=True), pair, objective.length_normalised)
            return *objective.part_of_step(scores, *step), scores

        self._model = model
        self._value_and_gradient = nn.value_and_grad(model, loss)
        self._one_after_the_other = one_after_the_other
        self._grouping = grouping
        self._compiled = compiled
        self._together = PaddedGradients(model, objective, scorer)

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        cuts = [share(pair) for pair in pairs]
        sizes = [PairSize.of(cut) for cut in cuts]

        def compute(group: Sequence[int]) -> PairGradients:
            room = self._grouping.room([sizes[number] for number in group])
            if len(group) > 1 or (self._compiled and room.tokens <= self._grouping.budget):
                return self._together([cuts[number] for number in group], room, step, quantised)
            return self._alone(pairs[group[0]], cuts[group[0]], step)

        return group_by_group(self._grouping.groups(sizes), compute)

    def _alone(self, pair: PreferencePair, cut: SharedPair, step: StepTotals) -> PairGradients:
        if not fit_together(cut.chosen, cut.rejected):
            return self._one_after_the_other(pair, cut, step)
        (_, losses, scores), gradient = self._value_and_gradient(self._model, pair, cut, step)
        return PairGradients(losses, scores, by_name(gradient))


class PaddedGradients:
    """Several pairs in one padded, compiled pass over shared starts."""

    def __init__(self, model: nn.Module, objective: Objective, scorer: SharedPromptScorer) -> None:
        def loss(
            model: nn.Module, batch: SharedBatch, scores_shared: bool, step: StepArrays
        ) -> tuple[mx.array, mx.array, AnswerScores]:
            scores = score_batch(
                scorer,
                batch,
                scores_shared=scores_shared,
                length_normalised=objective.length_normalised,
                differentiate=True,
            )
            return *objective.part_of_step(scores, *step), scores

        @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[model.state, mx.random.state])
        def compute(arrays: tuple[mx.array, ...], scores_shared: bool, step: StepArrays, quantised: bool) -> Any:
            batch = SharedBatch(*arrays)
            (_, losses, scores), gradient = nn.value_and_grad(model, loss)(model, batch, scores_shared, step)
            return losses, scores[:-2], gradient

        self._compute = compute

    def __call__(
        self, cuts: Sequence[SharedPair], room: PairSize, step: StepTotals, quantised: bool = False
    ) -> PairGradients:
        batch = collate_shared(cuts, room)
        losses, scores, gradient = self._compute(tuple(batch), room.scores_shared, step.arrays, quantised)
        columns = (*scores, batch.token_counts[: len(cuts)], batch.token_counts[len(cuts) :])
        return PairGradients(losses, AnswerScores(*columns), by_name(gradient))


def added(left: Gradient | None, right: Gradient) -> Gradient:
    """Return the sum of two gradients, in float32: in half precision small ones would vanish. ``None`` is zero."""
    return right if left is None else {name: left[name].astype(mx.float32) + value for name, value in right.items()}


def weighted_sum(left_weight: mx.array, left: Gradient, right_weight: mx.array, right: Gradient) -> Gradient:
    """Return ``left_weight * left + right_weight * right`` in the dtypes of ``left``; the weights have one element."""
    return {
        name: (left_weight.reshape(()) * value + right_weight.reshape(()) * right[name]).astype(value.dtype)
        for name, value in left.items()
    }


def one_by_one(pairs: Sequence[PreferencePair], compute: Callable[[PreferencePair], PairGradients]) -> PairGradients:
    """Add up what ``compute`` returns for each pair, with nothing of a pair left when the next one begins."""
    return group_by_group([[number] for number in range(len(pairs))], lambda group: compute(pairs[group[0]]))


def group_by_group(groups: Sequence[Sequence[int]], compute: Callable[[Sequence[int]], PairGradients]) -> PairGradients:
    """Add up what ``compute`` returns for groups of pairs, given by number; the rest comes in the pairs' order."""
    losses, scores = [], []
    total: Gradient | None = None
    for group in groups:
        result = compute(group)
        total = added(total, result.gradient)
        mx.eval(total, result.losses, result.scores)
        losses.append(result.losses)
        scores.append(result.scores)
    order = mx.argsort(mx.array([number for group in groups for number in group]))
    columns = zip(*scores, strict=True)
    return PairGradients(
        mx.concatenate(losses)[order],
        AnswerScores(*(mx.concatenate(list(column))[order] for column in columns)),
        total or {},
    )


def loss_slopes(
    objective: Objective, pair: PreferencePair, sums: Sequence[mx.array], step: StepTotals
) -> tuple[mx.array, AnswerScores, tuple[mx.array, mx.array]]:
    """Return loss [1] and scores of a pair, and the slopes of its part in the step's loss by its two summed log-probs.

    Args:
        sums: chosen and rejected log-prob, chosen and rejected raw logits, each float32 [1], summed over scored tokens.
    """
    chosen_logps, rejected_logps, *logits = sums
    counts = (pair.chosen_scored.sum(), pair.rejected_scored.sum())
    rest = (*logits, *(mx.array([float(count)]) for count in counts))

    def loss(chosen_logps: mx.array, rejected_logps: mx.array) -> tuple[mx.array, mx.array, AnswerScores]:
        moved = AnswerScores(chosen_logps, rejected_logps, *rest)
        scores = normalised_pair(moved, pair, objective.length_normalised)
        return *objective.part_of_step(scores, *step), scores

    (_, losses, scores), slopes = mx.value_and_grad(loss, argnums=(0, 1))(chosen_logps, rejected_logps)
    return losses, AnswerScores(*scores), slopes
