"""Means over preference pairs of a model that is not being trained."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.batches import collate, evaluation_plan, scored_tokens
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.metrics import PairMeans
from mlx_cpo_plugin.objective import Objective
from mlx_cpo_plugin.scoring import AnswerScores, score_answers
from mlx_cpo_plugin.shared_prompt import SharedPromptScorer, normalised, share


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
    world = mx.distributed.init()
    means = PairMeans(objective.beta)
    was_training = model.training
    model.eval()
    try:
        for batch_pairs in evaluation_plan(
            pairs, batch_size=batch_size, num_batches=num_batches, rank=world.rank(), world_size=world.size()
        ):
            if scorer is None:
                _add(
                    means,
                    objective,
                    score_answers(model, collate(batch_pairs), objective.length_normalised),
                    batch_pairs,
                )
                continue
            for pair in batch_pairs:
                _add(means, objective, normalised(scorer.score(share(pair)), pair, objective.length_normalised), [pair])
    finally:
        model.train(was_training)
    return means.over_ranks()


def _add(means: PairMeans, objective: Objective, scores: AnswerScores, pairs: Sequence[PreferencePair]) -> None:
    losses = objective.losses(scores)
    mx.eval(losses, *scores)
    means.add(losses, scores, scored_tokens(pairs))
