"""Every way in which the gradient of a micro-batch is computed."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn

from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.gradient_methods import AnswerGradients, BatchGradients, GradientMethod
from mlx_cpo_plugin.training.gradients import SharedPromptGradients
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.objective import Objective


def shared_prompts(grouping: Grouping) -> Callable[[nn.Module, Objective], GradientMethod]:
    return lambda model, objective: SharedPromptGradients(model, objective, SharedPromptScorer(model), grouping)


def in_segments(model: nn.Module, objective: Objective) -> GradientMethod:
    return SegmentGradients(model, objective, SharedPromptScorer(model), step_size=16)


WAYS: dict[str, Callable[[nn.Module, Objective], GradientMethod]] = {
    "plain batches": BatchGradients,
    "plain answers": AnswerGradients,
    "shared prompts, padded": shared_prompts(Grouping(overhead=1e9, budget=1e9)),
    "shared prompts, pair by pair": shared_prompts(PAIR_BY_PAIR),
    "segments": in_segments,
}
