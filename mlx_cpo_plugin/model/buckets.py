"""Which pairs share a pass: those of like length, where one larger pass beats the padding that it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters
from numpy.typing import NDArray

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.model.memory import tokens_that_fit
from mlx_cpo_plugin.model.shared_prefix import SplitPair

# Pairs of a pass.
GROUP_SIZES = (1, 2, 4, 8)
# Each shape is compiled by itself, and all of them are searched at each step.
MOST_SHAPES = 32
BUCKET_MULTIPLE = 16
# One bucket more has to save this share of all tokens.
LEAST_SAVING = 0.005
# A pass of this many times its overhead has little left to gain.
ENOUGH = 8


@dataclass(frozen=True)
class PairSize:
    """The size of a pair, or of a bucket that pairs are padded to.

    Attributes:
        shared: tokens of the shared prefix, at least 1.
        answer: tokens of the longer answer, at least 2.
        scored: tokens whose log-probs count, of both answers; shared ones once.
        scores_shared: whether some of them are in the shared prefix.
    """

    shared: int
    answer: int
    scored: int
    scores_shared: bool = False

    @classmethod
    def of(cls, pair: SplitPair) -> PairSize:
        """Return the size of a pair."""
        return cls(
            shared=1 if pair.prefix is None else len(pair.prefix),
            answer=max(2, len(pair.chosen), len(pair.rejected)),
            scored=sum(len(segment.targets) for segment in pair.segments),
            scores_shared=pair.prefix is not None and len(pair.prefix.targets) > 0,
        )

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.shared + 2 * self.answer

    def fits(self, other: PairSize) -> bool:
        """Whether a pair of the other size fits in."""
        return self == self.union(other)

    def union(self, other: PairSize) -> PairSize:
        """Return the smallest size that both fit in."""
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
        buckets: the sizes that pairs are padded to, so that few shapes occur; none: to the longest of each group.
    """

    overhead: float
    budget: float
    buckets: tuple[PairSize, ...] = ()

    def groups(self, sizes: Sequence[PairSize]) -> list[list[int]]:
        """Return the pairs, by number, that share a pass, such that the whole costs least.

        They are neighbours in the order of their tokens; the cost of a pass is its overhead and its tokens.
        """
        order = sorted(range(len(sizes)), key=lambda number: (sizes[number].tokens, sizes[number].shared))
        costs, lasts = [0.0], [0]
        for end in range(1, len(order) + 1):
            options = []
            for count in GROUP_SIZES:
                if count > end:
                    break
                size = self.bucket_for([sizes[number] for number in order[end - count : end]])
                tokens = count * size.tokens
                is_compiled_for = not self.buckets or size in self.buckets
                if count == 1 or (tokens <= self.budget and is_compiled_for):
                    options.append((costs[end - count] + self.overhead + tokens, count))
            cost, count = min(options)
            costs.append(cost)
            lasts.append(count)
        groups, end = [], len(order)
        while end:
            groups.append(order[end - lasts[end] : end])
            end -= lasts[end]
        return groups[::-1]

    def bucket_for(self, sizes: Sequence[PairSize]) -> PairSize:
        """Return what each pair of a group is padded to."""
        needed = sizes[0]
        for size in sizes[1:]:
            needed = needed.union(size)
        buckets = [bucket for bucket in self.buckets if bucket.fits(needed)]
        return min(buckets, key=lambda bucket: bucket.tokens) if buckets else needed


PAIR_BY_PAIR = Grouping(overhead=0, budget=0)


def grouping_for(model: nn.Module, overhead: float | None = None) -> Grouping:
    """Return how pairs are grouped on this device: as many tokens in a pass as its speed and memory suggest.

    Args:
        overhead: of a pass, in tokens; by default that of such a device.
    """
    if overhead is None:
        weights = sum(get_total_parameters(layer) for layer in model.layers) / len(model.layers)
        device = current_device()
        # A token takes two FLOPs with each weight, forwards and twice backwards.
        overhead = device.weight_read_tokens + device.layer_start_flops / (6 * weights)
    return Grouping(overhead, min(ENOUGH * overhead, tokens_that_fit(model)))


def bucket_shapes(sizes: Sequence[PairSize], budget: float) -> tuple[PairSize, ...]:
    """Return a few buckets, so that each of ``sizes`` fits into one and all of them, padded, have few tokens.

    One bucket for all pairs is split in two where that saves most tokens, then one of the two, and so on, as long as
    the buckets, each with as many of its pairs as the budget allows, have no more than :data:`MOST_SHAPES` shapes.
    """
    parts = [np.array([[size.shared, size.answer, size.scored, size.scores_shared] for size in sizes])]
    while True:
        splits = [_best_split(part) for part in parts]
        number = max(range(len(parts)), key=lambda part: splits[part][0])
        saving, left, right = splits[number]
        split = [*parts[:number], left, right, *parts[number + 1 :]]
        if saving < LEAST_SAVING * sum(map(_padded_tokens, parts)) or _shapes(split, budget) > MOST_SHAPES:
            return tuple(_bucket_of(part) for part in parts)
        parts = split


def _best_split(part: NDArray[np.int64]) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
    """Return the best of some splits by shared tokens or by answer tokens: what it saves, and both sides."""
    best = (0.0, part, part)
    for axis in (0, 1):
        for border in np.unique(np.quantile(part[:, axis], np.arange(1, 20) / 20, method="lower")):
            below = part[:, axis] <= border
            if below.all():
                continue
            left, right = part[below], part[~below]
            saving = _padded_tokens(part) - _padded_tokens(left) - _padded_tokens(right)
            best = max(best, (saving, left, right), key=lambda split: split[0])
    return best


def _padded_tokens(part: NDArray[np.int64]) -> float:
    shared, answer = part.max(0)[:2]
    return float(len(part) * (shared + 2 * answer))


def _shapes(parts: Sequence[NDArray[np.int64]], budget: float) -> int:
    buckets = map(_bucket_of, parts)
    return sum(max(1, sum(count * bucket.tokens <= budget for count in GROUP_SIZES)) for bucket in buckets)


def _bucket_of(part: NDArray[np.int64]) -> PairSize:
    shared, answer, scored, scores_shared = part.max(0)
    rounded = [-(-int(most) // BUCKET_MULTIPLE) * BUCKET_MULTIPLE for most in (shared, answer, scored)]
    return PairSize(rounded[0], rounded[1], rounded[2], bool(scores_shared))
