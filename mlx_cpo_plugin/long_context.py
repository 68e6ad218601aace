"""The exact gradient of long pairs, segment by segment: memory grows with a segment, not with the pair.

A first pass without gradient remembers the keys and values of every token. Then each segment, from the last to the
first, is computed again from what came before it, and its vector-Jacobian product turns the gradient by what later
tokens remembered of it into the gradient by the parameters and by what it remembered itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_cpo_plugin.caches import beginning, cache_arrays, forked, fresh_caches
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.gradients import PairGradients, loss_slopes, one_by_one
from mlx_cpo_plugin.objective import Objective
from mlx_cpo_plugin.scoring import AnswerScores
from mlx_cpo_plugin.shared_prompt import Segment, SharedPromptScorer, share


@dataclass(frozen=True)
class Chain:
    """Consecutive segments after their first pass.

    Attributes:
        starts: what is remembered at the start of each segment.
        end: what is remembered after the last one.
        logps, logits: sums over the scored tokens, float32 [].
    """

    segments: list[Segment]
    starts: list[list[Any]]
    end: list[Any]
    logps: mx.array
    logits: mx.array


class SegmentGradients:
    """One pair at a time, in segments of at most ``step_size`` tokens, over a prompt that both answers share."""

    def __init__(self, model: nn.Module, objective: Objective, scorer: SharedPromptScorer, step_size: int) -> None:
        self.model = model
        self.objective = objective
        self.scorer = scorer
        self.step_size = step_size

    def __call__(self, pairs: Sequence[PreferencePair], step_pairs: int, quantised: bool = False) -> PairGradients:
        return one_by_one(pairs, lambda pair: self._pair(pair, step_pairs))

    def _pair(self, pair: PreferencePair, step_pairs: int) -> PairGradients:
        cut = share(pair)
        shared = self._first_pass(cut.shared, fresh_caches(self.model))
        chosen, rejected = (self._first_pass(side, forked(shared.end)) for side in (cut.chosen, cut.rejected))
        logps = [(shared.logps + side.logps).reshape(1) for side in (chosen, rejected)]
        logits = [(shared.logits + side.logits).reshape(1) for side in (chosen, rejected)]
        losses, scores, (chosen_slope, rejected_slope) = loss_slopes(
            self.objective, pair, AnswerScores(*logps, *logits), step_pairs
        )

        gradient: dict[str, mx.array] = {}
        by_shared = [mx.zeros_like(array) for array in cache_arrays(shared.end)]
        for side, slope in ((chosen, chosen_slope), (rejected, rejected_slope)):
            by_start = self._backward(side, slope, [mx.zeros_like(array) for array in cache_arrays(side.end)], gradient)
            by_shared = [x + y for x, y in zip(by_shared, by_start, strict=True)]
        self._backward(shared, chosen_slope + rejected_slope, by_shared, gradient)
        return PairGradients(losses, scores, tree_unflatten(list(gradient.items())))

    def _first_pass(self, whole: Segment | None, caches: list[Any]) -> Chain:
        segments = [] if whole is None else pieces(whole, self.step_size)
        starts, logps, logits = [], mx.array(0.0), mx.array(0.0)
        for segment in segments:
            starts.append(forked(caches))
            segment_logps, segment_logits = self.scorer.segment_sums(segment, caches, differentiate=False)
            logps, logits = logps + segment_logps, logits + segment_logits
            mx.eval(logps, logits, cache_arrays(caches))
        return Chain(segments, [beginning(caches, start) for start in starts], caches, logps, logits)

    def _backward(
        self, chain: Chain, slope: mx.array, by_end: list[mx.array], gradient: dict[str, mx.array]
    ) -> list[mx.array]:
        """Add the chain's gradient by each parameter to ``gradient``; return that by what is remembered at its start.

        Args:
            slope: derivative of the loss by the chain's log-prob, [1].
            by_end: gradient by what is remembered at its end.
        """
        flat: list[tuple[str, mx.array]] = tree_flatten(self.model.trainable_parameters())  # type: ignore[assignment]
        names, parameters = [name for name, _ in flat], [value for _, value in flat]
        for segment, start in zip(reversed(chain.segments), reversed(chain.starts), strict=True):

            def forward(*inputs: mx.array, segment: Segment = segment, start: list[Any] = start) -> list[mx.array]:
                self.model.update(tree_unflatten(list(zip(names, inputs, strict=False))))
                caches = forked(start, iter(inputs[len(names) :]))
                logps, _ = self.scorer.segment_sums(segment, caches, differentiate=True)
                return [logps, *cache_arrays(caches)]

            _, slopes = mx.vjp(forward, [*parameters, *cache_arrays(start)], [slope.reshape(()), *by_end])
            for name, value in zip(names, slopes, strict=False):
                gradient[name] = gradient[name] + value if name in gradient else value
            by_end = slopes[len(names) :]
            mx.eval(gradient, by_end)
        self.model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return by_end


def pieces(segment: Segment, step_size: int) -> list[Segment]:
    """Cut a segment into consecutive ones of at most ``step_size`` tokens."""
    positions = np.array(segment.positions)
    result = []
    for start in range(0, segment.inputs.shape[1], step_size):
        inside = np.flatnonzero((positions >= start) & (positions < start + step_size))
        at = mx.array(inside.astype(np.int32))
        result.append(
            Segment(segment.inputs[:, start : start + step_size], segment.positions[at] - start, segment.targets[at])
        )
    return result
