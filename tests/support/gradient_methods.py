"""Every way in which the gradient of a micro-batch is computed."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn

from mlx_cpo_plugin.model.grouping import PAIR_BY_PAIR, Grouping
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.gradients import (
    AnswerGradients,
    BatchGradients,
    GradientMethod,
    SharedPromptGradients,
)
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.objective import Objective


def shared_prompts(grouping: Grouping) -> Callable[[nn.Module, Objective], GradientMethod]:
    def build(model: nn.Module, objective: Objective) -> GradientMethod:
        scorer = SharedPromptScorer(model)
        whole = SegmentGradients(model, objective, scorer)
        return SharedPromptGradients(model, objective, scorer, whole.pair_gradients, grouping)

    return build


def in_segments(model: nn.Module, objective: Objective) -> GradientMethod:
    return SegmentGradients(model, objective, SharedPromptScorer(model), step_size=16)


WAYS: dict[str, Callable[[nn.Module, Objective], GradientMethod]] = {
    "plain batches": BatchGradients,
    "plain answers": AnswerGradients,
    "shared prompts, padded": shared_prompts(Grouping(overhead=1e9, budget=1e9)),
    "shared prompts, pair by pair": shared_prompts(PAIR_BY_PAIR),
    "segments": in_segments,
}
