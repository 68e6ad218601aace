"""Which pairs are computed together: those of like length, where one larger pass beats the padding that it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.model.memory import tokens_that_fit

if TYPE_CHECKING:
    from mlx_cpo_plugin.model.shared_prompt import SharedPair

# Pairs of a pass.
GROUP_SIZES = (1, 2, 4, 8)
# Each shape is compiled by itself, and all of them are searched at each step.
MOST_SHAPES = 32
ROOM_MULTIPLE = 16
# A room more has to save this share of all tokens.
LEAST_SAVING = 0.005

# A pass of this many times its overhead has little left to gain.
ENOUGH = 8


@dataclass(frozen=True)
class PairSize:
    """What a pair takes up, or has room for.

    Attributes:
        shared: tokens that both answers share, at least 1.
        answer: tokens of the longer answer, at least 2.
        scored: tokens whose log-probs count, of both answers; common ones once.
        scores_shared: whether some of them are among the shared tokens.
    """

    shared: int
    answer: int
    scored: int
    scores_shared: bool = False

    @classmethod
    def of(cls, pair: SharedPair) -> PairSize:
        """Return the size of a pair."""
        segments = (pair.chosen, pair.rejected) if pair.shared is None else (pair.shared, pair.chosen, pair.rejected)
        return cls(
            shared=1 if pair.shared is None else pair.shared.inputs.shape[1],
            answer=max(2, pair.chosen.inputs.shape[1], pair.rejected.inputs.shape[1]),
            scored=sum(len(segment.targets) for segment in segments),
            scores_shared=pair.shared is not None and len(pair.shared.targets) > 0,
        )

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.shared + 2 * self.answer

    def holds(self, other: PairSize) -> bool:
        """Whether a pair of the other size fits in."""
        return self == self.joined(other)

    def joined(self, other: PairSize) -> PairSize:
        """Return the smallest size that holds both."""
        return PairSize(
            max(self.shared, other.shared),
            max(self.answer, other.answer),
            max(self.scored, other.scored),
            self.scores_shared or other.scores_shared,
        )


@dataclass(frozen=True)
class Grouping:
    """How pairs are put together.

    Attributes:
        overhead: what a pass costs beside its tokens, in tokens.
        budget: tokens, padding included, that several pairs in a pass have together at most.
        rooms: the sizes that pairs are padded to, so that few shapes occur; none: to the longest of each group.
    """

    overhead: float
    budget: float
    rooms: tuple[PairSize, ...] = ()

    def groups(self, sizes: Sequence[PairSize]) -> list[list[int]]:
        """Return the pairs, by number, that are computed together, so that the whole costs least.

        They are neighbours in the order of their tokens; the cost of a pass is its overhead and its tokens.
        """
        order = sorted(range(len(sizes)), key=lambda number: (sizes[number].tokens, sizes[number].shared))
        costs, lasts = [0.0], [0]
        for end in range(1, len(order) + 1):
            options = []
            for count in GROUP_SIZES:
                if count > end:
                    break
                tokens = count * self.room([sizes[number] for number in order[end - count : end]]).tokens
                if count == 1 or tokens <= self.budget:
                    options.append((costs[end - count] + self.overhead + tokens, count))
            cost, count = min(options)
            costs.append(cost)
            lasts.append(count)
        groups, end = [], len(order)
        while end:
            groups.append(order[end - lasts[end] : end])
            end -= lasts[end]
        return groups[::-1]

    def room(self, sizes: Sequence[PairSize]) -> PairSize:
        """Return what each pair of a group is padded to."""
        needed = sizes[0]
        for size in sizes[1:]:
            needed = needed.joined(size)
        rooms = [room for room in self.rooms if room.holds(needed)]
        return min(rooms, key=lambda room: room.tokens) if rooms else needed


PAIR_BY_PAIR = Grouping(overhead=0, budget=0)


def grouping_for(model: nn.Module) -> Grouping:
    """Return how pairs are grouped on the device at hand: as many tokens in a pass as its speed and memory want."""
    weights = sum(get_total_parameters(layer) for layer in model.layers) / len(model.layers)
    # A token takes two operations with each weight, forwards and twice backwards.
    device = current_device()
    overhead = device.weight_read_tokens + device.layer_start_flops / (6 * weights)
    return Grouping(overhead, min(ENOUGH * overhead, tokens_that_fit(model)))


def padding_rooms(sizes: Sequence[PairSize], budget: float) -> tuple[PairSize, ...]:
    """Return a few sizes, so that each of ``sizes`` is held by one and all of them, padded, have few tokens.

    All pairs in one room are cut in two where that saves most tokens, then one of the two, and so on, as long as the
    rooms, each with as many of its pairs as the budget allows, have no more than :data:`MOST_SHAPES` shapes.
    """
    parts = [np.array([[size.shared, size.answer, size.scored, size.scores_shared] for size in sizes])]
    while True:
        saving, number, left, right = max((_best_cut(number, part) for number, part in enumerate(parts)), key=_saving)
        cut = [*parts[:number], left, right, *parts[number + 1 :]]
        if saving < LEAST_SAVING * sum(map(_padded_tokens, parts)) or _shapes(cut, budget) > MOST_SHAPES:
            return tuple(_room_of(part) for part in parts)
        parts = cut


def _shapes(parts: Sequence[np.ndarray], budget: float) -> int:
    rooms = map(_room_of, parts)
    return sum(max(1, sum(count * room.tokens <= budget for count in GROUP_SIZES)) for room in rooms)


def _room_of(part: np.ndarray) -> PairSize:
    shared, answer, scored, scores_shared = part.max(0)
    rounded = [-(-int(most) // ROOM_MULTIPLE) * ROOM_MULTIPLE for most in (shared, answer, scored)]
    return PairSize(rounded[0], rounded[1], rounded[2], bool(scores_shared))


_Cut = tuple[float, int, np.ndarray, np.ndarray]


def _saving(cut: _Cut) -> float:
    return cut[0]


def _padded_tokens(part: np.ndarray) -> float:
    shared, answer = part.max(0)[:2]
    return float(len(part) * (shared + 2 * answer))


def _best_cut(number: int, part: np.ndarray) -> _Cut:
    """Return the best of some cuts by the shared tokens or by those of the answers."""
    best: _Cut = (0.0, number, part, part)
    for axis in (0, 1):
        for border in np.unique(np.quantile(part[:, axis], np.arange(1, 20) / 20, method="lower")):
            below = part[:, axis] <= border
            if below.all():
                continue
            left, right = part[below], part[~below]
            saving = _padded_tokens(part) - _padded_tokens(left) - _padded_tokens(right)
            best = max(best, (saving, number, left, right), key=_saving)
    return best
