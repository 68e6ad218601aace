"""Scoring several pairs in one padded pass: all shared starts as rows, then all answers as rows after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.model.caches import continued, fresh_caches
from mlx_cpo_plugin.model.grouping import PairSize
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.logps import AnswerScores, sums_of_rows
from mlx_cpo_plugin.model.shared_prompt import Segment, SharedPair, SharedPromptScorer, normalised


class SharedBatch(NamedTuple):
    """B pairs as arrays, all padded on the right with zeros.

    Attributes:
        shared: int32 [B, P]; what both answers of each pair share.
        shared_lengths: int32 [B].
        answers: int32 [2 * B, N]; row i is what the i-th chosen answer goes on with, row B + i the i-th rejected one.
        positions: int32 [S]; where scored tokens are predicted, in the rows of ``answers`` one after the other, before
            them those of ``shared`` where some of the room's pairs have scored tokens there.
        targets: int32 [S]; the scored tokens.
        rows: int32 [S]; the row of ``answers`` of each, 2 * B + i for what both of the i-th pair share, and 3 * B where
            the entry is padding.
        token_counts: float32 [2 * B]; scored tokens of each answer, the shared ones included.
    """

    shared: mx.array
    shared_lengths: mx.array
    answers: mx.array
    positions: mx.array
    targets: mx.array
    rows: mx.array
    token_counts: mx.array


def collate_shared(cuts: Sequence[SharedPair], room: PairSize) -> SharedBatch:
    """Lay out pairs that ``room`` holds."""
    count = len(cuts)
    shared, answers = np.zeros((count, room.shared), np.int32), np.zeros((2 * count, room.answer), np.int32)
    lengths = np.zeros(count, np.int32)
    entries = np.zeros((3, count * room.scored), np.int32)
    entries[2] = 3 * count
    token_counts = np.zeros(2 * count, np.float32)
    used = 0

    def enter(segment: Segment, start: int, row: int) -> int:
        end = used + len(segment.targets)
        entries[:, used:end] = segment.positions + start, segment.targets, np.full(len(segment.targets), row)
        return end

    before_answers = shared.size if room.scores_shared else 0
    for number, cut in enumerate(cuts):
        for row, side in ((number, cut.chosen), (count + number, cut.rejected)):
            _fill(answers[row], side.inputs[0])
            used = enter(side, before_answers + row * room.answer, row)
        token_counts[[number, count + number]] = cut.token_counts
        if cut.shared is not None:
            lengths[number] = cut.shared.inputs.shape[1]
            _fill(shared[number], cut.shared.inputs[0])
            used = enter(cut.shared, number * room.shared, 2 * count + number)
    return SharedBatch(*(mx.array(array) for array in (shared, lengths, answers, *entries, token_counts)))


def _fill(row: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
    row[: len(tokens)] = tokens


def score_batch(
    scorer: SharedPromptScorer,
    batch: SharedBatch,
    *,
    scores_shared: bool,
    length_normalised: bool,
    differentiate: bool = False,
) -> AnswerScores:
    """Return the scores of B pairs, each float32 [B].

    Args:
        scores_shared: what the batch's room says.
        differentiate: whether a gradient by the log-probs follows.
    """
    pairs = len(batch.shared)
    caches = fresh_caches(scorer.model)
    shared = scorer.split.hidden(batch.shared, caches)
    hidden = scorer.split.hidden(batch.answers, continued(caches, batch.shared_lengths, sides=2))
    size = hidden.shape[-1]
    hidden = hidden.reshape(-1, size)
    if scores_shared:
        hidden = mx.concatenate([shared.reshape(-1, size), hidden])
    logps, logits = target_scores(scorer.split, hidden[batch.positions], batch.targets, differentiate)
    sums = [sums_of_rows(values, batch.rows, 3 * pairs) for values in (logps, logits)]
    chosen, rejected = slice(0, pairs), slice(pairs, 2 * pairs)
    in_both = [values[2 * pairs :] for values in sums]
    totals = [values[side] + both for values, both in zip(sums, in_both, strict=True) for side in (chosen, rejected)]
    counts = (batch.token_counts[chosen], batch.token_counts[rejected])
    columns = (*totals, *counts)
    return normalised(AnswerScores(*columns), *counts, length_normalised)


def score_together(
    scorer: SharedPromptScorer, cuts: Sequence[SharedPair], length_normalised: bool = False
) -> AnswerScores:
    """Return the scores of pairs in one pass, in the room that the scorer's grouping gives them."""
    room = scorer.grouping.room([PairSize.of(cut) for cut in cuts])
    batch = collate_shared(cuts, room)
    return score_batch(scorer, batch, scores_shared=room.scores_shared, length_normalised=length_normalised)
