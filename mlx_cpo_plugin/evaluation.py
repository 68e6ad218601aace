"""Means over preference pairs of a model that is not being trained."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.batches import collate, evaluation_plan, scored_tokens
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.metrics import PairMeans
from mlx_cpo_plugin.objective import Objective
from mlx_cpo_plugin.scoring import score_answers


def evaluate_pairs(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    objective: Objective,
    *,
    batch_size: int,
    num_batches: int = -1,
) -> tuple[dict[str, float], int]:
    """Return the means over the pairs of all ranks, and the number of scored tokens.

    Every pair counts once and weighs the same, whatever the batch size. Dropout is off meanwhile; the model's mode is
    restored afterwards.

    Args:
        num_batches: how many batches of ``batch_size`` pairs to take; -1 means all.
    """
    world = mx.distributed.init()
    means = PairMeans(objective.beta)
    was_training = model.training
    model.eval()
    try:
        for batch_pairs in evaluation_plan(
            pairs, batch_size=batch_size, num_batches=num_batches, rank=world.rank(), world_size=world.size()
        ):
            scores = score_answers(model, collate(batch_pairs), objective.length_normalised)
            losses = objective.losses(scores)
            mx.eval(losses, *scores)
            means.add(losses, scores, scored_tokens(batch_pairs))
    finally:
        model.train(was_training)
    return means.over_ranks()
