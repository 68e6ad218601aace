"""Scoring pair by pair: what both answers share is computed once, and each answer goes on from there.

Nothing is padded: the tokens that are computed are those that there are. Gradients flow back through the shared part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.caches import forked, fresh_caches, repeated
from mlx_cpo_plugin.model.grouping import PAIR_BY_PAIR
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.logps import AnswerScores

# Products with few rows leave a processor waiting for the weights; long answers fill it by themselves.
TOGETHER_UP_TO = 256
PADDING_ALLOWED = 0.25


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens, and which of them are scored from within.

    Attributes:
        inputs: int32 [1, n]; what the model reads.
        positions: int32 [m]; the inputs whose hidden state predicts a scored token.
        targets: int32 [m]; the scored tokens.
    """

    inputs: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class SharedPair:
    """A pair cut where its answers part: shared tokens, then the rest of each answer.

    The last shared token is read by the answers' segments, since it predicts the first token of each.
    """

    shared: Segment | None
    chosen: Segment
    rejected: Segment

    @property
    def token_counts(self) -> tuple[int, int]:
        """Scored tokens of the chosen and of the rejected answer, the shared ones included."""
        shared = 0 if self.shared is None else len(self.shared.targets)
        return shared + len(self.chosen.targets), shared + len(self.rejected.targets)


def share(pair: PreferencePair) -> SharedPair:
    """Cut a pair after its prompt and whatever its answers have in common, down to their last token each."""
    common = _common_start(pair)
    prefix = np.concatenate([pair.prompt, pair.chosen[:common]])
    scored = np.concatenate([np.zeros(len(pair.prompt), bool), pair.chosen_scored[:common]])
    return SharedPair(
        shared=_segment(prefix, scored) if len(prefix) > 1 else None,
        chosen=_segment(_from_last(prefix, pair.chosen[common:]), _from_last([False], pair.chosen_scored[common:])),
        rejected=_segment(
            _from_last(prefix, pair.rejected[common:]), _from_last([False], pair.rejected_scored[common:])
        ),
    )


def _common_start(pair: PreferencePair) -> int:
    longest = min(len(pair.chosen), len(pair.rejected)) - 1
    same = (pair.chosen[:longest] == pair.rejected[:longest]) & (
        pair.chosen_scored[:longest] == pair.rejected_scored[:longest]
    )
    return int(np.argmin(np.append(same, False)))


def _from_last(prefix: Sequence[Any] | NDArray[Any], rest: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.asarray(prefix)[-1:], rest])


def _segment(tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> Segment:
    at = np.flatnonzero(scored)
    return Segment(
        inputs=tokens[None, :-1].astype(np.int32),
        positions=(at - 1).astype(np.int32),
        targets=tokens[at].astype(np.int32),
    )


def fit_together(chosen: Segment, rejected: Segment) -> bool:
    """Whether two answers are short and alike enough that one larger product beats the padding and memory it costs."""
    lengths = chosen.inputs.shape[1], rejected.inputs.shape[1]
    return max(lengths) <= TOGETHER_UP_TO and 2 * max(lengths) <= (1 + PADDING_ALLOWED) * sum(lengths)


def normalised_pair(sums: AnswerScores, pair: PreferencePair, length_normalised: bool) -> AnswerScores:
    """Divide the sums of one pair by its scored tokens; see :func:`normalised`."""
    return normalised(sums, pair.chosen_tokens, int(pair.rejected_scored.sum()), length_normalised)


def normalised(
    sums: AnswerScores, chosen: int | mx.array, rejected: int | mx.array, length_normalised: bool
) -> AnswerScores:
    """Divide sums by the scored tokens of the answers: the raw logits always, the log-probs if they are to be means."""
    by_chosen: int | mx.array
    by_rejected: int | mx.array
    by_chosen, by_rejected = (chosen, rejected) if length_normalised else (1, 1)
    return AnswerScores(
        sums.chosen_logps / by_chosen,
        sums.rejected_logps / by_rejected,
        sums.chosen_logits / chosen,
        sums.rejected_logits / rejected,
        sums.chosen_tokens,
        sums.rejected_tokens,
    )


class SharedPromptScorer:
    """Scores pairs one at a time over a prompt that is computed once.

    Attributes:
        grouping: which pairs may be scored together instead, see :mod:`mlx_cpo_plugin.model.shared_batch`.

    Raises:
        LookupError: the model's parts or caches are not known; score it the plain way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.split = SplitModel(model)
        self.grouping = PAIR_BY_PAIR

    def score(self, pair: SharedPair, differentiate: bool = False) -> AnswerScores:
        """Return sums over the scored tokens, each float32 [1]: log-probs and raw logits of both answers."""
        caches, logps, logits = fresh_caches(self.model), mx.array(0.0), mx.array(0.0)
        if pair.shared is not None:
            logps, logits = self.segment_sums(pair.shared, caches, differentiate)
        sides = (pair.chosen, pair.rejected)
        if fit_together(*sides):
            sums = self._sums_together(sides, caches, differentiate)
        else:
            sums = [self.segment_sums(side, forked(caches), differentiate) for side in sides]
        (chosen_logps, chosen_logits), (rejected_logps, rejected_logits) = sums
        totals = (logps + chosen_logps, logps + rejected_logps, logits + chosen_logits, logits + rejected_logits)
        columns = (*totals, *(mx.array(float(count)) for count in pair.token_counts))
        return AnswerScores(*(column.reshape(1) for column in columns))

    def _sums_together(
        self, sides: Sequence[Segment], caches: list[Any], differentiate: bool
    ) -> list[tuple[mx.array, mx.array]]:
        """Compute both answers as two rows, the shorter one padded on its right."""
        width = max(side.inputs.shape[1] for side in sides)
        rows = [np.pad(side.inputs, [(0, 0), (0, width - side.inputs.shape[1])]) for side in sides]
        hidden = self.split.hidden(mx.array(np.concatenate(rows)), repeated(caches, len(sides)))
        scored = mx.concatenate([hidden[row, mx.array(side.positions)] for row, side in enumerate(sides)])
        targets = mx.array(np.concatenate([side.targets for side in sides]))
        logps, logits = target_scores(self.split, scored, targets, differentiate)
        border = len(sides[0].targets)
        return [(logps[:border].sum(), logits[:border].sum()), (logps[border:].sum(), logits[border:].sum())]

    def segment_sums(self, segment: Segment, caches: list[Any], differentiate: bool) -> tuple[mx.array, mx.array]:
        """Return summed log-probs and raw logits of a segment, float32 []; ``caches`` take its tokens in."""
        hidden = self.split.hidden(mx.array(segment.inputs), caches)[0]
        if segment.positions.size == 0:
            return mx.array(0.0), mx.array(0.0)
        positions, targets = mx.array(segment.positions), mx.array(segment.targets)
        logps, logits = target_scores(self.split, hidden[positions], targets, differentiate)
        return logps.sum(), logits.sum()
