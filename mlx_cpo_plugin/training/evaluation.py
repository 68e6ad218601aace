"""Means over preference pairs of a model that is not being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.batches import collate, evaluation_plan, scored_tokens
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.grouping import PairSize
from mlx_cpo_plugin.model.logps import AnswerScores, evaluation_mode, score_answers
from mlx_cpo_plugin.model.shared_batch import score_together
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, normalised_pair, share
from mlx_cpo_plugin.training.metrics import PairMeans
from mlx_cpo_plugin.training.objective import Objective


def evaluate_pairs(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    objective: Objective,
    *,
    batch_size: int,
    num_batches: int = -1,
    scorer: SharedPromptScorer | None = None,
) -> tuple[dict[str, float], int]:
    """Return the means over the pairs of all ranks, and the number of scored tokens.

    Every pair counts once and weighs the same, whatever the batch size. Dropout is off meanwhile; the model's mode is
    restored afterwards.

    Args:
        num_batches: how many batches of ``batch_size`` pairs to take; -1 means all.
        scorer: shares the prompt between the answers of a pair; without it all answers of a batch are padded together.
    """
    means = PairMeans(objective)
    for scores, scored_pairs in scored_batches(
        model, pairs, objective.length_normalised, batch_size=batch_size, num_batches=num_batches, scorer=scorer
    ):
        losses = objective.losses(scores)
        mx.eval(losses)
        means.add(losses, scores, scored_tokens(scored_pairs))
    return means.over_ranks()


def scored_batches(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    length_normalised: bool,
    *,
    batch_size: int,
    num_batches: int = -1,
    scorer: SharedPromptScorer | None = None,
) -> Iterator[tuple[AnswerScores, Sequence[PreferencePair]]]:
    """Yield the evaluated scores of pairs that were computed together, and these pairs; each pair comes once.

    The arguments are those of :func:`evaluate_pairs`; the model is in evaluation mode until the last one is taken.
    """
    world = mx.distributed.init()
    with evaluation_mode(model):
        for batch_pairs in evaluation_plan(
            pairs, batch_size=batch_size, num_batches=num_batches, rank=world.rank(), world_size=world.size()
        ):
            for scores, scored_pairs in _scored(model, batch_pairs, length_normalised, scorer):
                mx.eval(*scores)
                yield scores, scored_pairs


def _scored(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    length_normalised: bool,
    scorer: SharedPromptScorer | None,
) -> Iterator[tuple[AnswerScores, Sequence[PreferencePair]]]:
    """Yield the scores of pairs that are computed together, and these pairs."""
    if scorer is None:
        yield score_answers(model, collate(pairs), length_normalised), pairs
        return
    cuts = [share(pair) for pair in pairs]
    for group in scorer.grouping.groups([PairSize.of(cut) for cut in cuts]):
        if len(group) == 1:
            pair, cut = pairs[group[0]], cuts[group[0]]
            yield normalised_pair(scorer.score(cut), pair, length_normalised), [pair]
            continue
        scores = score_together(scorer, [cuts[number] for number in group], length_normalised)
        yield scores, [pairs[number] for number in group]
