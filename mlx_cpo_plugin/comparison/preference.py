"""How often, and by how much, a model prefers the chosen answer: over all pairs, and by their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.scoring import prepared_scorer
from mlx_cpo_plugin.training.metrics import PAIR_VALUES, means_of_sums
from mlx_cpo_plugin.training.objective import Objective
from mlx_cpo_plugin.training.validation import evaluate_pairs

LENGTH_GROUPS = 3


@dataclass(frozen=True)
class LengthGroup:
    """Pairs of like length.

    Attributes:
        name: ``all``, or ``short``, ``medium`` and ``long``.
        pairs: the pairs of the group.
    """

    name: str
    pairs: Sequence[PreferencePair]

    def description(self) -> dict[str, Any]:
        """Return name, number of pairs, and the fewest and most tokens that their longer side has, prompt included."""
        lengths = [pair.length for pair in self.pairs]
        return {"name": self.name, "pairs": len(self.pairs), "shortest": min(lengths), "longest": max(lengths)}


def length_groups(pairs: Sequence[PreferencePair]) -> list[LengthGroup]:
    """Return a group of all pairs, followed by their thirds from short to long where there are enough for that."""
    groups = [LengthGroup("all", pairs)]
    if len(pairs) >= LENGTH_GROUPS:
        order = sorted(range(len(pairs)), key=lambda index: pairs[index].length)
        thirds = np.array_split(order, LENGTH_GROUPS)
        for name, third in zip(("short", "medium", "long"), thirds, strict=True):
            groups.append(LengthGroup(name, [pairs[index] for index in third]))
    return groups


class Preferences(NamedTuple):
    """What a model prefers.

    Attributes:
        means: of every group, by the names of :data:`mlx_cpo_plugin.training.metrics.PAIR_METRICS`.
        of_pairs: float64 [V, N], the values of :data:`mlx_cpo_plugin.training.metrics.PAIR_VALUES` of each pair.
    """

    means: list[dict[str, float]]
    of_pairs: NDArray[np.float64]

    def of_each(self, name: str) -> NDArray[np.float64]:
        """Return one of the values of all N pairs: float64 [N]."""
        values: NDArray[np.float64] = self.of_pairs[PAIR_VALUES.index(name)]
        return values


def preferences(
    model: nn.Module,
    groups: Sequence[LengthGroup],
    objective: Objective,
    *,
    batch_size: int,
    scoring: str,
    step_size: int | None = None,
) -> Preferences:
    """Return what a model prefers in every group and pair.

    Pairs are scored once, in the batches of a run's final test: the means over all of them are the test's.

    Args:
        groups: see :func:`length_groups`; the first one holds every pair.
        scoring: ``auto``, ``shared`` or ``plain``.
        step_size: longer pairs are computed in segments of so many tokens.
    """
    pairs = groups[0].pairs
    with prepared_scorer(model, pairs, scoring, lambda line: None, compiled_ones=True) as scorer:
        found = evaluate_pairs(model, pairs, objective, batch_size=batch_size, scorer=scorer, step_size=step_size)
    number = {id(pair): number for number, pair in enumerate(pairs)}

    def means_of(group: LengthGroup) -> dict[str, float]:
        values = found.values[:, [number[id(pair)] for pair in group.pairs]]
        return means_of_sums(values.sum(axis=1), len(group.pairs), objective)

    return Preferences([found.means, *map(means_of, groups[1:])], found.values)
