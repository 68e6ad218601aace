"""Scores pairs over a shared prefix that is computed once: one at a time, or several padded in one pass.

Gradients flow back through the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, PairSize
from mlx_cpo_plugin.model.caches import cache_arrays, continued, forked, fresh_caches, repeated
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.logps import AnswerScores, normalised, scores_of_rows
from mlx_cpo_plugin.model.packed import lay_out, packed_groups, score_packed, token_count
from mlx_cpo_plugin.model.remembered import go_back, state_of, with_room
from mlx_cpo_plugin.model.shared_prefix import Segment, SplitPair, pieces, split_shared_prefix

# Products with few rows leave a processor waiting for the weights; long answers fill it by themselves.
LONGEST_SIDE_BY_SIDE = 256
PADDING_ALLOWED = 0.25


def can_batch_sides(*lengths: int) -> bool:
    """Whether answers are so short and alike that one larger product beats the padding and memory it costs."""
    return max(lengths) <= LONGEST_SIDE_BY_SIDE and 2 * max(lengths) <= (1 + PADDING_ALLOWED) * sum(lengths)


class SharedBatch(NamedTuple):
    """B pairs as arrays, all padded on the right with zeros.

    Attributes:
        shared: int32 [B, P]; the shared prefix of each pair.
        shared_lengths: int32 [B].
        answers: int32 [2 * B, N]; row i is the rest of the i-th chosen answer, row B + i that of the i-th rejected one.
        positions: int32 [S]; where scored tokens are predicted, in the rows of ``answers`` one after the other, before
            them those of ``shared`` where the bucket has scored tokens there.
        targets: int32 [S]; the scored tokens.
        rows: int32 [S]; the row of ``answers`` of each, 2 * B + i in the prefix of the i-th pair, and 3 * B where the
            entry is padding.
        token_counts: float32 [2 * B]; scored tokens of each answer, the shared ones included.
    """

    shared: mx.array
    shared_lengths: mx.array
    answers: mx.array
    positions: mx.array
    targets: mx.array
    rows: mx.array
    token_counts: mx.array


def collate_shared(pairs: Sequence[SplitPair], bucket: PairSize) -> SharedBatch:
    """Lay out pairs that fit into ``bucket``."""
    count = len(pairs)
    shared, answers = np.zeros((count, bucket.shared), np.int32), np.zeros((2 * count, bucket.answer), np.int32)
    lengths = np.zeros(count, np.int32)
    entries = np.zeros((3, count * bucket.scored), np.int32)
    entries[2] = 3 * count
    token_counts = np.zeros(2 * count, np.float32)
    used = 0

    def enter(segment: Segment, tokens: np.ndarray, start: int, row: int) -> int:
        tokens[: len(segment)] = segment.inputs[0]
        end = used + len(segment.targets)
        entries[:, used:end] = segment.positions + start, segment.targets, np.full(len(segment.targets), row)
        return end

    before_answers = shared.size if bucket.scores_shared else 0
    for number, pair in enumerate(pairs):
        for row, side in ((number, pair.chosen), (count + number, pair.rejected)):
            used = enter(side, answers[row], before_answers + row * bucket.answer, row)
        token_counts[[number, count + number]] = pair.token_counts
        if pair.prefix is not None:
            lengths[number] = len(pair.prefix)
            used = enter(pair.prefix, shared[number], number * bucket.shared, 2 * count + number)
    return SharedBatch(*(mx.array(array) for array in (shared, lengths, answers, *entries, token_counts)))


class SharedPromptScorer:
    """Scores pairs over shared prefixes.

    Attributes:
        grouping: which pairs may share a pass.
        packs: whether they lie one behind the other there, without padding, as the compiled kernels can have it.

    Raises:
        LookupError: the model's parts or caches are not known; score it the plain way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.split = SplitModel(model)
        self.grouping = PAIR_BY_PAIR
        self.packs = False

    def found(self) -> dict[str, float | bool]:
        """Return what tests have shown of this model, for a resumed run to go on with."""
        return {"overhead": self.grouping.overhead, "budget": self.grouping.budget, "packs": self.packs}

    def scored_groups(
        self, pairs: Sequence[PreferencePair], length_normalised: bool = False
    ) -> Iterator[tuple[list[int], AnswerScores]]:
        """Yield the pairs of each pass, by number, and their scores."""
        splits = [split_shared_prefix(pair) for pair in pairs]
        if self.packs:
            for group in self.packed_groups(splits):
                sums = self.score_packed([splits[number] for number in group])
                yield group, normalised(sums, length_normalised)
            return
        sizes = [PairSize.of(split) for split in splits]
        for group in self.grouping.groups(sizes):
            if len(group) == 1:
                yield group, normalised(self.score(splits[group[0]]), length_normalised)
                continue
            bucket = self.grouping.bucket_for([sizes[number] for number in group])
            batch = collate_shared([splits[number] for number in group], bucket)
            yield group, normalised(self.score_batch(batch, bucket.scores_shared), length_normalised)

    def score(self, pair: SplitPair, differentiate: bool = False) -> AnswerScores:
        """Return sums over the scored tokens of one pair, each float32 [1]: log-probs and raw logits.

        Args:
            differentiate: whether a gradient with respect to the log-probs follows.
        """
        caches, logps, logits = fresh_caches(self.model), mx.array(0.0), mx.array(0.0)
        if pair.prefix is not None:
            logps, logits = self.segment_sums(pair.prefix, caches, differentiate)
        sides = (pair.chosen, pair.rejected)
        if can_batch_sides(*map(len, sides)):
            sums = self._side_by_side(sides, caches, differentiate)
        else:
            sums = [self.segment_sums(side, forked(caches), differentiate) for side in sides]
        return sums_of_pair(pair, (logps, logits), sums)

    def score_in_segments(self, pair: SplitPair, step_size: int | None) -> AnswerScores:
        """Return what :meth:`score` does, evaluated, with the activations of at most ``step_size`` tokens at a time.

        Keys and values are remembered for the prefix and the longer answer. No gradient flows back. ``None`` takes the
        prefix and each answer whole.
        """
        prefix = [] if pair.prefix is None else pieces(pair.prefix, step_size)
        room = sum(map(len, prefix)) + max(len(pair.chosen), len(pair.rejected))
        caches = with_room(fresh_caches(self.model), room)

        def sums_of(segments: Sequence[Segment]) -> tuple[mx.array, mx.array]:
            logps, logits = mx.array(0.0), mx.array(0.0)
            for segment in segments:
                sums = self.segment_sums(segment, caches, differentiate=False)
                logps, logits = logps + sums[0], logits + sums[1]
                mx.eval(logps, logits, cache_arrays(caches))
            return logps, logits

        shared, end, sides = sums_of(prefix), state_of(caches), []
        for side in (pair.chosen, pair.rejected):
            go_back(caches, end)
            sides.append(sums_of(pieces(side, step_size)))
        return sums_of_pair(pair, shared, sides)

    def score_batch(self, batch: SharedBatch, scores_shared: bool, differentiate: bool = False) -> AnswerScores:
        """Return sums as :meth:`score` does, of B pairs in one padded pass, each float32 [B].

        Args:
            scores_shared: that of the batch's bucket.
        """
        caches = fresh_caches(self.model)
        shared = self.split.hidden(batch.shared, caches)
        hidden = self.split.hidden(batch.answers, continued(caches, batch.shared_lengths, sides=2))
        size = hidden.shape[-1]
        hidden = hidden.reshape(-1, size)
        if scores_shared:
            hidden = mx.concatenate([shared.reshape(-1, size), hidden])
        logps, logits = target_scores(self.split, hidden[batch.positions], batch.targets, differentiate)
        return scores_of_rows(logps, logits, batch.rows, batch.token_counts)

    def packed_groups(self, splits: Sequence[SplitPair]) -> list[list[int]]:
        """Return which pairs, by number and in their order, are packed into a pass."""
        return packed_groups([token_count(split) for split in splits], self.grouping.budget)

    def score_packed(self, pairs: Sequence[SplitPair], differentiate: bool = False) -> AnswerScores:
        """Return sums as :meth:`score` does, of B pairs in one pass without padding, each float32 [B]."""
        return score_packed(self.split, lay_out(pairs), differentiate)

    def segment_sums(self, segment: Segment, caches: list[Any], differentiate: bool) -> tuple[mx.array, mx.array]:
        """Return summed log-probs and raw logits of a segment, float32 []; ``caches`` take its tokens in."""
        hidden = self.split.hidden(mx.array(segment.inputs), caches)[0]
        if segment.positions.size == 0:
            return mx.array(0.0), mx.array(0.0)
        positions, targets = mx.array(segment.positions), mx.array(segment.targets)
        logps, logits = target_scores(self.split, hidden[positions], targets, differentiate)
        return logps.sum(), logits.sum()

    def _side_by_side(
        self, sides: Sequence[Segment], caches: list[Any], differentiate: bool
    ) -> list[tuple[mx.array, mx.array]]:
        """Compute both answers as two rows, the shorter one padded on the right."""
        width = max(map(len, sides))
        rows = [np.pad(side.inputs, [(0, 0), (0, width - len(side))]) for side in sides]
        hidden = self.split.hidden(mx.array(np.concatenate(rows)), repeated(caches, len(sides)))
        scored = mx.concatenate([hidden[row, mx.array(side.positions)] for row, side in enumerate(sides)])
        targets = mx.array(np.concatenate([side.targets for side in sides]))
        logps, logits = target_scores(self.split, scored, targets, differentiate)
        border = len(sides[0].targets)
        return [(logps[part].sum(), logits[part].sum()) for part in (slice(border), slice(border, None))]


def sums_of_pair(
    pair: SplitPair, shared: tuple[mx.array, mx.array], sides: Sequence[tuple[mx.array, mx.array]]
) -> AnswerScores:
    """Return the sums of a pair, each float32 [1].

    Args:
        shared: log-probs and raw logits, each float32 [], summed over the scored tokens that both answers share.
        sides: the same over the rest of the chosen and of the rejected answer.
    """
    totals = [both + own for both, owns in zip(shared, zip(*sides, strict=True), strict=True) for own in owns]
    columns = (*totals, *(mx.array(float(count)) for count in pair.token_counts))
    return AnswerScores(*(column.reshape(1) for column in columns))
