"""The exact gradient of long pairs, segment by segment: memory grows with a segment, not with the pair.

A first pass without gradient remembers keys and values. Then each segment, from the last to the first, is computed
again from what came before it, and its vector-Jacobian product turns the gradient by what later tokens remembered of
it into the gradient by the parameters and by what it remembered itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.caches import beginning, cache_arrays, forked, fresh_caches
from mlx_cpo_plugin.model.shared_prompt import Segment, SharedPair, SharedPromptScorer, share
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.gradients import Gradient, PairGradients, added, loss_slopes, one_by_one, weighted_sum
from mlx_cpo_plugin.training.objective import Objective


@dataclass(frozen=True)
class Chain:
    """Consecutive segments, what is remembered at the start of each, and the seed that each is computed with."""

    segments: list[Segment]
    starts: list[list[Any]]
    seeds: list[int]


@dataclass(frozen=True)
class ChainGradient:
    """The gradient of a chain's log-prob.

    Attributes:
        logps, logits: sums over the chain's scored tokens, float32 [].
        by_parameters: gradient by each trainable parameter, by name.
        by_start: gradient by each array that is remembered at the chain's start.
    """

    logps: mx.array
    logits: mx.array
    by_parameters: Gradient
    by_start: list[mx.array]


class SegmentGradients:
    """One pair at a time, in segments of at most ``step_size`` tokens, over a prompt that both answers share.

    The loss sees the model through the log-probs of the two answers only. So the gradient of each answer's log-prob is
    computed by itself, and scaled by the loss's slope once both log-probs are known.

    Args:
        step_size: ``None`` takes the shared tokens and each answer whole.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, scorer: SharedPromptScorer, step_size: int | None = None
    ) -> None:
        self.model = model
        self.objective = objective
        self.scorer = scorer
        self.step_size = step_size

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        return one_by_one(pairs, lambda pair: self.pair_gradients(pair, share(pair), step))

    def pair_gradients(self, pair: PreferencePair, cut: SharedPair, step: StepTotals) -> PairGradients:
        """Return loss, scores and gradient of one pair."""
        caches = fresh_caches(self.model)
        shared, shared_logps, shared_logits = self._remember_shared(cut.shared, caches)
        chosen, rejected = (
            self._gradient(self._remember_start(side, forked(caches)), mx.array(1.0))
            for side in (cut.chosen, cut.rejected)
        )
        logps = [(shared_logps + side.logps).reshape(1) for side in (chosen, rejected)]
        logits = [(shared_logits + side.logits).reshape(1) for side in (chosen, rejected)]
        losses, scores, slopes = loss_slopes(self.objective, pair, [*logps, *logits], step)

        by_shared = [
            (slopes[0] * x + slopes[1] * y).astype(x.dtype)
            for x, y in zip(chosen.by_start, rejected.by_start, strict=True)
        ]
        before = self._gradient(shared, (slopes[0] + slopes[1]).reshape(()), by_shared)
        answers = weighted_sum(slopes[0], chosen.by_parameters, slopes[1], rejected.by_parameters)
        return PairGradients(losses, scores, {**answers, **added(answers, before.by_parameters)})

    def _remember_shared(self, whole: Segment | None, caches: list[Any]) -> tuple[Chain, mx.array, mx.array]:
        """Run the shared tokens through ``caches``; return their chain, and the sums over those that are scored."""
        segments = pieces(whole, self.step_size) if whole is not None else []
        starts, logps, logits = [], mx.array(0.0), mx.array(0.0)
        seeds = [_drawn_seed() for _ in segments]
        for segment, seed in zip(segments, seeds, strict=True):
            starts.append(forked(caches))
            mx.random.seed(seed)
            segment_logps, segment_logits = self.scorer.segment_sums(segment, caches, differentiate=False)
            logps, logits = logps + segment_logps, logits + segment_logits
            mx.eval(logps, logits, cache_arrays(caches))
        return Chain(segments, [beginning(caches, start) for start in starts], seeds), logps, logits

    def _remember_start(self, whole: Segment, caches: list[Any]) -> Chain:
        """Run all but the last segment of an answer through ``caches``."""
        segments = pieces(whole, self.step_size)
        starts, seeds = [forked(caches)], [_drawn_seed() for _ in segments]
        for segment, seed in zip(segments[:-1], seeds, strict=False):
            mx.random.seed(seed)
            self.scorer.split.hidden(mx.array(segment.inputs), caches)
            starts.append(forked(caches))
            mx.eval(cache_arrays(caches))
        return Chain(segments, [beginning(caches, start) for start in starts], seeds)

    def _gradient(self, chain: Chain, slope: mx.array, by_end: list[mx.array] | None = None) -> ChainGradient:
        """Return the gradient of ``slope`` times the chain's log-prob, and what flows on from later chains.

        Args:
            by_end: gradient by what is remembered at the chain's end; ``None`` where nothing comes after it.
        """
        trainable = by_name(self.model.trainable_parameters())
        names, parameters = list(trainable), list(trainable.values())
        logps, logits = mx.array(0.0), mx.array(0.0)
        total: Gradient | None = None
        goes_on = by_end is not None
        for segment, start, seed in reversed(list(zip(chain.segments, chain.starts, chain.seeds, strict=True))):
            mx.random.seed(seed)  # dropout has to be that of the first pass

            def forward(
                *inputs: mx.array,
                segment: Segment = segment,
                start: list[Any] = start,
                goes_on: bool = goes_on,
            ) -> list[mx.array]:
                self.model.update(tree_unflatten(list(zip(names, inputs, strict=False))))
                caches = forked(start, iter(inputs[len(names) :]))
                sums = self.scorer.segment_sums(segment, caches, differentiate=True)
                return [*sums, *(cache_arrays(caches) if goes_on else [])]

            cotangents = [slope, mx.array(0.0), *(by_end or [])]
            sums, slopes = mx.vjp(forward, [*parameters, *cache_arrays(start)], cotangents)
            logps, logits = logps + sums[0], logits + sums[1]
            total = added(total, dict(zip(names, slopes, strict=False)))
            by_end, goes_on = slopes[len(names) :], True
            mx.eval(logps, logits, total, by_end)
        self.model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return ChainGradient(logps, logits, total or {}, by_end or [])


def pieces(segment: Segment, step_size: int | None) -> list[Segment]:
    """Cut a segment into consecutive ones of at most ``step_size`` tokens; ``None`` leaves it whole."""
    if step_size is None:
        return [segment]
    positions = segment.positions
    result = []
    for start in range(0, segment.inputs.shape[1], step_size):
        inside = np.flatnonzero((positions >= start) & (positions < start + step_size))
        result.append(
            Segment(segment.inputs[:, start : start + step_size], positions[inside] - start, segment.targets[inside])
        )
    return result


def _drawn_seed() -> int:
    drawn: Any = mx.random.randint(0, 2**31 - 1).item()
    return int(drawn)
