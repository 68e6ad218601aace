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
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlx_cpo_plugin.backbone import SplitModel
from mlx_cpo_plugin.caches import cache_arrays, forked, fresh_caches
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.head import target_scores
from mlx_cpo_plugin.scoring import AnswerScores


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens, and which of them are scored from within.

    Attributes:
        inputs: int32 [1, n]; what the model reads.
        positions: int32 [m]; the inputs whose hidden state predicts a scored token.
        targets: int32 [m]; the scored tokens.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array


@dataclass(frozen=True)
class SharedPair:
    """A pair cut where its answers part: shared tokens, then the rest of each answer.

    The last shared token is read by the answers' segments, since it predicts the first token of each.
    """

    shared: Segment | None
    chosen: Segment
    rejected: Segment


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
        inputs=mx.array(tokens[None, :-1].astype(np.int32)),
        positions=mx.array((at - 1).astype(np.int32)),
        targets=mx.array(tokens[at].astype(np.int32)),
    )


def normalised(sums: AnswerScores, pair: PreferencePair, length_normalised: bool) -> AnswerScores:
    """Divide a pair's sums by its scored tokens: the raw logits always, the log-probs if they are to be means."""
    chosen, rejected = int(pair.chosen_scored.sum()), int(pair.rejected_scored.sum())
    by_chosen, by_rejected = (chosen, rejected) if length_normalised else (1, 1)
    return AnswerScores(
        sums.chosen_logps / by_chosen,
        sums.rejected_logps / by_rejected,
        sums.chosen_logits / chosen,
        sums.rejected_logits / rejected,
    )


class SharedPromptScorer:
    """Scores pairs one at a time over a prompt that is computed once.

    Raises:
        LookupError: the model's parts or caches are not known; score it the plain way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.split = SplitModel(model)
        fresh_caches(model)
        self.vocabulary = self.split.logits(self.split.hidden(mx.zeros((1, 1), mx.int32))[0]).shape[-1]
        # The slopes of both answers are kept beside each other; with a whole model trained, they would be most of it.
        self.staged = _size(model.trainable_parameters()) * 8 <= _size(model.parameters())

    def score(self, pair: SharedPair, differentiate: bool = False) -> AnswerScores:
        """Return sums over the scored tokens, each float32 [1]: log-probs and raw logits of both answers."""
        caches, logps, logits = fresh_caches(self.model), mx.array(0.0), mx.array(0.0)
        if pair.shared is not None:
            logps, logits = self.segment_sums(pair.shared, caches, differentiate)
        sides = (pair.chosen, pair.rejected)
        if differentiate and self.staged:
            sums = self._staged_sums(sides, caches)
        else:
            sums = [self.segment_sums(side, forked(caches), differentiate) for side in sides]
        (chosen_logps, chosen_logits), (rejected_logps, rejected_logits) = sums
        totals = (logps + chosen_logps, logps + rejected_logps, logits + chosen_logits, logits + rejected_logits)
        return AnswerScores(*(total.reshape(1) for total in totals))

    def segment_sums(self, segment: Segment, caches: list[Any], differentiate: bool) -> tuple[mx.array, mx.array]:
        """Return summed log-probs and raw logits of a segment, float32 []; ``caches`` take its tokens in."""
        hidden = self.split.hidden(segment.inputs, caches)[0]
        if segment.positions.size == 0:
            return mx.array(0.0), mx.array(0.0)
        logps, logits = target_scores(
            self.split, hidden[segment.positions], segment.targets, self.vocabulary, differentiate
        )
        return logps.sum(), logits.sum()

    def _staged_sums(self, sides: Sequence[Segment], caches: list[Any]) -> list[tuple[mx.array, mx.array]]:
        """Compute each answer's log-prob together with its gradient, one answer after the other.

        What comes back for a log-prob is one number, so its gradient by the parameters and by the shared keys and
        values can be had at once and scaled later. The activations of one answer are gone before the next one begins.
        """
        flat: list[tuple[str, mx.array]] = tree_flatten(self.model.trainable_parameters())  # type: ignore[assignment]
        names, parameters = [name for name, _ in flat], [value for _, value in flat]
        remembered = cache_arrays(caches)

        def side_sums(side: Segment, inputs: Sequence[mx.array]) -> list[mx.array]:
            self._update(names, inputs)
            side_caches = forked(caches, iter(inputs[len(names) :]))
            return list(self.segment_sums(side, side_caches, differentiate=True))

        @mx.custom_function
        def answers(*inputs: mx.array) -> list[mx.array]:
            sums, slopes = [], []
            waiting = list(inputs)
            for side in sides:
                side_sum, side_slopes = mx.vjp(
                    lambda *arrays, side=side: side_sums(side, arrays), waiting, [mx.array(1.0), mx.array(0.0)]
                )
                waiting = mx.depends(waiting, side_slopes)
                sums += mx.depends(side_sum, side_slopes)
                slopes += side_slopes
            return sums + slopes

        @answers.vjp
        def answers_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
            slopes = outputs[4:]
            half = len(slopes) // 2
            by_chosen, by_rejected = cotangents[0], cotangents[2]
            return [
                (by_chosen * chosen + by_rejected * rejected).astype(chosen.dtype)
                for chosen, rejected in zip(slopes[:half], slopes[half:], strict=True)
            ]

        outputs: Any = answers(*parameters, *remembered)
        self._update(names, parameters)
        return [(outputs[0], outputs[1]), (outputs[2], outputs[3])]

    def _update(self, names: Sequence[str], values: Sequence[mx.array]) -> None:
        self.model.update(tree_unflatten(list(zip(names, values, strict=False))))


def _size(parameters: Any) -> int:
    flat: list[tuple[str, mx.array]] = tree_flatten(parameters)  # type: ignore[assignment]
    return sum(value.nbytes for _, value in flat)
