"""Several pairs in one pass without padding: prefixes and answers lie one behind the other in a single row.

All that a model does token by token it does for this row; attention and positions, which are those of each pair, are
told by the caches. Only the compiled kernels can do that, see :mod:`mlx_cpo_plugin.model.compiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.kernels.operations import Segment
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.layers import Call, overridden_calls
from mlx_cpo_plugin.model.logps import AnswerScores, scores_of_rows
from mlx_cpo_plugin.model.shared_prefix import SplitPair


@dataclass(frozen=True)
class Row:
    """Tokens of several texts, one behind the other.

    Attributes:
        positions: int64 [T]; of each token in its own text.
        segments: which tokens see which.
        angles: cosines and sines of the positions, which all layers share.
    """

    positions: NDArray[np.int64]
    segments: tuple[Segment, ...]
    angles: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """B pairs in one row of T tokens.

    Attributes:
        tokens: int32 [1, T].
        row: where they are.
        read: int32 [R]; the tokens whose last hidden states are read: those of the answers, and of a prefix those from
            the first one that predicts a scored token.
        read_row: where these are; their segments see keys of the whole row.
        scored: int32 [S]; the places in ``read`` where scored tokens are predicted.
        targets: int32 [S]; the scored tokens.
        rows: int32 [S]; i for the i-th chosen answer, B + i for the i-th rejected one, 2 * B + i for what both share.
        token_counts: float32 [2 * B]; scored tokens of each answer, the shared ones included.
    """

    tokens: mx.array
    row: Row
    read: mx.array
    read_row: Row
    scored: mx.array
    targets: mx.array
    rows: mx.array
    token_counts: mx.array


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

    def __init__(self, row: Row) -> None:
        self.row = row

    @property
    def offset(self) -> Row:
        """What the rotary embedding takes the positions from."""
        return self.row

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values as they are."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Visible:
        """Return which tokens see which."""
        return Visible(self.row.segments, window_size)


class LastCache(PackedCache):
    """That of the last layer: it keeps the keys and values of the whole row for a second call."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.kept: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the first keys and values."""
        self.kept = self.kept or (keys, values)
        return self.kept


def lay_out(pairs: Sequence[SplitPair]) -> Layout:
    """Put pairs one behind the other: each with its prefix, its chosen and its rejected answer."""
    tokens, positions, read, scored, targets, rows = [], [], [], [], [], []
    segments: list[Segment] = []
    read_segments: list[Segment] = []
    count, end, read_end = len(pairs), 0, 0
    for number, pair in enumerate(pairs):
        start, shared = end, 0 if pair.prefix is None else len(pair.prefix)
        answers = ((number, pair.chosen, shared, 0), (count + number, pair.rejected, shared, 0))
        unread = 0 if pair.prefix is None else min(pair.prefix.positions, default=shared)
        prefix = () if pair.prefix is None else ((2 * count + number, pair.prefix, 0, int(unread)),)
        for row, segment, before, skipped in (*prefix, *answers):
            segments.append(Segment(end, len(segment), start, before, end))
            tokens.append(segment.inputs[0])
            positions.append(np.arange(before, before + len(segment)))
            if skipped < len(segment):
                queries = len(segment) - skipped
                read_segments.append(Segment(read_end, queries, start, before + skipped, end + skipped))
                read.append(np.arange(end + skipped, end + len(segment)))
                scored.append(segment.positions - skipped + read_end)
                targets.append(segment.targets)
                rows.append(np.full(len(segment.targets), row))
                read_end += queries
            end += len(segment)
    counts = np.array([pair.token_counts for pair in pairs], np.float32).T.reshape(-1)
    all_positions = np.concatenate(positions)
    return Layout(
        tokens=_joined(tokens)[None],
        row=Row(all_positions, tuple(segments)),
        read=_joined(read),
        read_row=Row(all_positions[np.concatenate(read)], tuple(read_segments)),
        scored=_joined(scored),
        targets=_joined(targets),
        rows=_joined(rows),
        token_counts=mx.array(counts),
    )


def _joined(parts: Sequence[NDArray[Any]]) -> mx.array:
    return mx.array(np.concatenate(parts).astype(np.int32))


def score_packed(split: SplitModel, layout: Layout, differentiate: bool = False) -> AnswerScores:
    """Return sums over the scored tokens of B pairs in one pass, each float32 [B]: log-probs and raw logits."""
    layers = split.model.layers
    caches = [*(PackedCache(layout.row) for _ in layers[1:]), LastCache(layout.row)]
    with overridden_calls([(layers[-1], _call_for_read(type(layers[-1]).__call__, layout))]):
        hidden = split.hidden(layout.tokens, caches)[0]
    logps, logits = target_scores(split, hidden[layout.scored], layout.targets, differentiate)
    return scores_of_rows(logps, logits, layout.rows, layout.token_counts)


def _call_for_read(original: Call, layout: Layout) -> Call:
    """Return the call of the last layer, of which other tokens than those that are read need keys and values alone."""

    def of_read(argument: Any) -> Any:
        if isinstance(argument, LastCache):
            argument.row = layout.read_row
        elif isinstance(argument, Visible):
            return replace(argument, segments=layout.read_row.segments)
        elif isinstance(argument, mx.array) and argument.shape[:2] == layout.tokens.shape:
            return argument[:, layout.read]
        return argument

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        # Of the first call MLX evaluates what the second one uses, keys and values, and of the second all else.
        original(layer, *args, **kwargs)
        return original(layer, *map(of_read, args), **{name: of_read(value) for name, value in kwargs.items()})

    return call


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
