"""Validation: scores of held-out pairs, means over them, the best validation so far, and patience."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.batches import evaluation_plan, scored_tokens
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.logps import AnswerScores, evaluation_mode
from mlx_cpo_plugin.model.scoring import scored_groups
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.settings.cpo_options import MEASURES
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.metrics import PAIR_VALUES, PairMeans
from mlx_cpo_plugin.training.objective import Objective
from mlx_cpo_plugin.training.state import Resumable
from mlx_cpo_plugin.types import Values


class Validation(NamedTuple):
    """What a validation found.

    Attributes:
        means: over the pairs of all ranks, each of the same weight, by name.
        tokens: scored tokens of all ranks.
        values: of this rank's pairs, in the order of the data, :data:`mlx_cpo_plugin.training.metrics.PAIR_VALUES`,
            float64 [values, n].
        places: of these pairs in the data, int64 [n].
    """

    means: dict[str, float]
    tokens: int
    values: NDArray[np.float64]
    places: NDArray[np.int64]


def evaluate_pairs(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    objective: Objective,
    *,
    batch_size: int,
    num_batches: int = -1,
    scorer: SharedPromptScorer | None = None,
    step_size: int | None,
) -> Validation:
    """Score pairs; the arguments are those of :func:`scored_batches`."""
    means = PairMeans(objective)
    place = {id(pair): number for number, pair in enumerate(pairs)}
    places: list[int] = []
    values = [np.zeros((len(PAIR_VALUES), 0))]
    for scores, scored_pairs in scored_batches(
        model,
        pairs,
        objective.length_normalised,
        batch_size=batch_size,
        num_batches=num_batches,
        scorer=scorer,
        step_size=step_size,
    ):
        losses = objective.losses(scores)
        mx.eval(losses)
        values.append(means.add(losses, scores, scored_tokens(scored_pairs)))
        places += [place[id(pair)] for pair in scored_pairs]
    # How pairs are grouped into passes may change at a resume.
    order = np.argsort(places, kind="stable")
    return Validation(*means.over_ranks(), np.concatenate(values, axis=1)[:, order], np.array(places, np.int64)[order])


def scored_batches(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    length_normalised: bool,
    *,
    batch_size: int,
    num_batches: int = -1,
    scorer: SharedPromptScorer | None = None,
    step_size: int | None = None,
) -> Iterator[tuple[AnswerScores, Sequence[PreferencePair]]]:
    """Yield the evaluated scores of pairs computed together, with these pairs; each pair of this rank comes once.

    Dropout is off until the last one is taken; the model's mode is then restored.

    Args:
        num_batches: how many batches of ``batch_size`` pairs to take; -1 means all.
        scorer, step_size: see :func:`mlx_cpo_plugin.model.scoring.scored_groups`.
    """
    world = mx.distributed.init()
    with evaluation_mode(model):
        for batch in evaluation_plan(
            pairs, batch_size=batch_size, num_batches=num_batches, rank=world.rank(), world_size=world.size()
        ):
            for group, scores in scored_groups(model, batch, scorer, step_size, length_normalised):
                mx.eval(*scores)
                yield scores, [batch[number] for number in group]


def unused_without_validation(args: CPOTrainingArgs) -> str | None:
    """Return one sentence on settings that have no effect without validation pairs, if any are set."""
    wanted = ("save_best", "early_stopping_patience", "eval_per_epoch")
    unused = [key for key in wanted if getattr(args, key)]
    verb = "have" if len(unused) > 1 else "has"
    return f"Nothing is validated: {' and '.join(unused)} {verb} no effect." if unused else None


class BestSoFar(Resumable):
    """The best validation of a run, with its ``value``, all its ``means``, and its ``iteration``.

    These are ``None``, none and 0 before the first.

    Args:
        measure: a key of :data:`mlx_cpo_plugin.settings.cpo_options.MEASURES`; its ``name``.
        patience: validations in a row without an improvement after which to stop; ``None``: never.
        pairs: digest of the validation pairs; values over other pairs are not compared.
        saved: whether the adapter of the best validation is saved.

    Attributes:
        waited: validations since the best.
        last: iteration of the last validation.
    """

    remembered: ClassVar[tuple[str, ...]] = (
        "measure",
        "pairs",
        "saved",
        "value",
        "means",
        "iteration",
        "waited",
        "last",
    )

    def __init__(self, measure: str, patience: int | None = None, pairs: str = "", saved: bool = False) -> None:
        self.name = measure
        self.measure, self.sign = MEASURES[measure]
        self.patience = patience
        self.pairs = pairs
        self.saved = saved
        self.value: float | None = None
        self.means: dict[str, float] = {}
        self.iteration = self.waited = self.last = 0

    def add(self, iteration: int, means: Mapping[str, float]) -> None:
        """Record a validation."""
        self.last = iteration
        if self.is_best(means):
            self.value, self.means, self.iteration, self.waited = means[self.measure], dict(means), iteration, 0
        else:
            self.waited += 1

    def is_best(self, means: Mapping[str, float]) -> bool:
        """Return whether a validation is better than all those recorded."""
        value = means[self.measure]
        return math.isfinite(value) and (self.value is None or self.sign * value > self.sign * self.value)

    @property
    def out_of_patience(self) -> bool:
        """Whether the run should stop."""
        return self.patience is not None and self.waited >= self.patience

    def restore(self, state: Values) -> None:
        """Continue from ``state`` where it is comparable; otherwise the search begins anew."""
        self.last = state["last"]
        if self.is_comparable(state):
            self.value, self.means = state["value"], state["means"]
            self.iteration, self.waited = state["iteration"], state["waited"]

    def is_comparable(self, state: Values) -> bool:
        """Return whether ``state`` has the same measure of the same pairs, with the adapter saved if it is needed."""
        same = (state["measure"], state["pairs"]) == (self.measure, self.pairs)
        return same and (state["saved"] or not self.saved)
