"""Several pairs in one pass without padding: prefixes and answers lie one behind the other in a single row.

All that a model does token by token it does for this row; attention and positions, which are those of each pair, are
told by the caches. Only the compiled kernels can do that, see :mod:`mlx_cpo_plugin.model.compiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.kernels.operations import Segment
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.logps import AnswerScores, sums_of_rows
from mlx_cpo_plugin.model.shared_prefix import SplitPair


@dataclass(frozen=True)
class Layout:
    """B pairs in one row of T tokens.

    Attributes:
        tokens: int32 [1, T].
        positions: int64 [T]; of each token in its own text.
        segments: which tokens see which.
        scored: int32 [S]; where scored tokens are predicted.
        targets: int32 [S]; the scored tokens.
        rows: int32 [S]; i for the i-th chosen answer, B + i for the i-th rejected one, 2 * B + i for what both share.
        token_counts: float32 [2 * B]; scored tokens of each answer, the shared ones included.
        angles: cosines and sines of the positions, which all layers share.
    """

    tokens: mx.array
    positions: NDArray[np.int64]
    segments: tuple[Segment, ...]
    scored: mx.array
    targets: mx.array
    rows: mx.array
    token_counts: mx.array
    angles: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Visible:
    """A mask by segments.

    Attributes:
        window: how many tokens, itself included, a token sees at most.
    """

    segments: Sequence[Segment]
    window: int | None


class PackedCache:
    """What a layer asks before it attends; nothing is remembered, since all keys are at hand."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def offset(self) -> Layout:
        """What the rotary embedding takes the positions from."""
        return self.layout

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values as they are."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Visible:
        """Return which tokens see which."""
        return Visible(self.layout.segments, window_size)


def lay_out(pairs: Sequence[SplitPair]) -> Layout:
    """Put pairs one behind the other: each with its prefix, its chosen and its rejected answer."""
    tokens, positions, scored, targets, rows = [], [], [], [], []
    segments: list[Segment] = []
    count, end = len(pairs), 0
    for number, pair in enumerate(pairs):
        start, shared = end, 0 if pair.prefix is None else len(pair.prefix)
        answers = ((number, pair.chosen, shared), (count + number, pair.rejected, shared))
        prefix = () if pair.prefix is None else ((2 * count + number, pair.prefix, 0),)
        for row, segment, before in (*prefix, *answers):
            segments.append(Segment(end, len(segment), start, before, end))
            tokens.append(segment.inputs[0])
            positions.append(np.arange(before, before + len(segment)))
            scored.append(segment.positions + end)
            targets.append(segment.targets)
            rows.append(np.full(len(segment.targets), row))
            end += len(segment)
    counts = np.array([pair.token_counts for pair in pairs], np.float32).T.reshape(-1)
    return Layout(
        tokens=_joined(tokens)[None],
        positions=np.concatenate(positions),
        segments=tuple(segments),
        scored=_joined(scored),
        targets=_joined(targets),
        rows=_joined(rows),
        token_counts=mx.array(counts),
    )


def _joined(parts: Sequence[NDArray[Any]]) -> mx.array:
    return mx.array(np.concatenate(parts).astype(np.int32))


def score_packed(split: SplitModel, layout: Layout, differentiate: bool = False) -> AnswerScores:
    """Return sums over the scored tokens of B pairs in one pass, each float32 [B]: log-probs and raw logits."""
    pairs = len(layout.token_counts) // 2
    hidden = split.hidden(layout.tokens, [PackedCache(layout) for _ in split.model.layers])[0]
    logps, logits = target_scores(split, hidden[layout.scored], layout.targets, differentiate)
    chosen, rejected, both = (slice(side * pairs, (side + 1) * pairs) for side in range(3))
    sums = [sums_of_rows(values, layout.rows, 3 * pairs) for values in (logps, logits)]
    totals = [values[side] + values[both] for values in sums for side in (chosen, rejected)]
    columns = (*totals, layout.token_counts[chosen], layout.token_counts[rejected])
    return AnswerScores(*columns)


def token_count(pair: SplitPair) -> int:
    """Return how many tokens of a pair go through the layers."""
    return sum(map(len, pair.segments))


def packed_groups(sizes: Sequence[int], budget: float) -> list[list[int]]:
    """Return which items, by number and in their order, share a pass: as many as the budget allows, evenly spread."""
    share = sum(sizes) / max(1, -(-sum(sizes) // max(1, int(budget))))
    groups: list[list[int]] = []
    filled = 0
    for number, size in enumerate(sizes):
        if not groups or filled + size > budget or filled + size / 2 > share:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return groups
