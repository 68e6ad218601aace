"""Which code computes the gradient of which pair: all of it is decided here.

=================================================  ===========================================================
pairs                                              computed by
=================================================  ===========================================================
prompts cannot be shared
  a pair of the micro-batch is over the step size  answer by answer: :class:`AnswerGradients`
  otherwise                                        all answers in one padded pass: :class:`BatchGradients`
prompts are shared
  a pair of the micro-batch is over the step size  in segments of the step size: :class:`SegmentGradients`
  with the compiled kernels, unless one is very long  packed into one pass: :class:`PassGradients`
  several that the grouping puts together          one padded pass over prefixes and answers: `BatchGradients`
  one, where steps are compiled, and it is short   the same, since compiled shapes have to be few
  one whose answers are short and alike            both side by side: :class:`PassGradients`
  any other one                                    prefix and answers one after the other: `SegmentGradients`
=================================================  ===========================================================

The step size is ``seq_step_size``, of ``efficient_long_context``. Within a pass, :mod:`mlx_cpo_plugin.model.head`
decides how the output layer is computed. Whether prompts can be shared is decided before a run, in
:mod:`mlx_cpo_plugin.model.parity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.nn as nn

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compilation_pays
from mlx_cpo_plugin.model.buckets import Grouping, PairSize, bucket_shapes
from mlx_cpo_plugin.model.packed import token_count
from mlx_cpo_plugin.model.shared_prefix import SplitPair, is_long, split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, can_batch_sides
from mlx_cpo_plugin.training.gradient_methods import (
    AnswerGradients,
    BatchGradients,
    GradientMethod,
    PairGradients,
    PassGradients,
    summed_over_groups,
)
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.objective import Objective

# Raised where the same pairs change weights by other bits than in earlier versions; checkpoints record it.
ARITHMETIC = 5


def gradients_for(
    model: nn.Module,
    objective: Objective,
    scorer: SharedPromptScorer | None,
    pairs: Sequence[PreferencePair],
    *,
    step_size: int | None = None,
    compiled: bool | None = None,
) -> GradientMethod:
    """Return how the gradients of micro-batches of ``pairs`` are computed.

    Args:
        scorer: shares prompts; ``None``: they cannot be shared.
        step_size: in tokens; ``None``: no pair is long.
        compiled: whether steps are compiled; ``None``: where the device gains by it.
    """
    if scorer is None:
        return PlainGradients(model, objective, step_size)
    grouping = scorer.grouping
    compiled = compilation_pays(compiled)
    if compiled:  # for few shapes; without compilation nothing is padded further than the longest of a group
        sizes = [PairSize.of(split_shared_prefix(pair)) for pair in pairs]
        grouping = replace(grouping, buckets=bucket_shapes(sizes, grouping.budget))
    return SharedPromptGradients(model, objective, scorer, grouping, step_size, compiled)


class PlainGradients:
    """The upper part of the table."""

    def __init__(self, model: nn.Module, objective: Objective, step_size: int | None = None) -> None:
        self.step_size = step_size
        self.in_one_pass = BatchGradients(model, objective)
        self.answer_by_answer = AnswerGradients(model, objective)

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        compute = self.answer_by_answer if any_is_long(pairs, self.step_size) else self.in_one_pass
        return compute(pairs, step, quantised)


class SharedPromptGradients:
    """The lower part of the table."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        scorer: SharedPromptScorer,
        grouping: Grouping,
        step_size: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.grouping, self.step_size, self.compiled = grouping, step_size, compiled
        self.in_one_pass = BatchGradients(model, objective, scorer)
        self.scorer = scorer
        self.side_by_side = PassGradients(model, objective, scorer.score)
        self.packed = PassGradients(model, objective, scorer.score_packed)
        self.one_after_the_other = SegmentGradients(model, objective, scorer)
        self.in_segments = SegmentGradients(model, objective, scorer, step_size)

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        if any_is_long(pairs, self.step_size):
            return self.in_segments(pairs, step, quantised)
        splits = [split_shared_prefix(pair) for pair in pairs]
        if self.scorer.packs:
            return self._packed(splits, step)
        sizes = [PairSize.of(split) for split in splits]
        # The largest first: later ones are computed beside the gradient of those before.
        groups = self.grouping.groups(sizes)[::-1]

        def compute(group: Sequence[int]) -> PairGradients:
            first, bucket = splits[group[0]], self.grouping.bucket_for([sizes[number] for number in group])
            if len(group) > 1 or (self.compiled and bucket.tokens <= self.grouping.budget):
                return self.in_one_pass([pairs[number] for number in group], step, quantised, bucket)
            if can_batch_sides(len(first.chosen), len(first.rejected)):
                return self.side_by_side(first, step)
            return self.one_after_the_other.of_pair(first, step)

        return summed_over_groups(groups, compute, order=[number for group in groups for number in group])

    def _packed(self, splits: Sequence[SplitPair], step: StepTotals) -> PairGradients:
        def compute(group: Sequence[int]) -> PairGradients:
            pairs = [splits[number] for number in group]
            if len(pairs) == 1 and token_count(pairs[0]) > self.grouping.budget:  # large products need no company
                return self.one_after_the_other.of_pair(pairs[0], step)
            return self.packed(pairs, step)

        tokens = [token_count(split) for split in splits]
        groups = self.scorer.packed_groups(splits)
        groups.sort(key=lambda group: -sum(tokens[number] for number in group))
        return summed_over_groups(groups, compute, order=[number for group in groups for number in group])


def any_is_long(pairs: Sequence[PreferencePair], step_size: int | None) -> bool:
    """Whether a pair of a micro-batch is long."""
    return any(is_long(pair, step_size) for pair in pairs)
