"""The exact gradient of long pairs, segment by segment: memory grows with a segment, not with the pair.

A first pass without gradient remembers keys and values. Then each segment, from the last to the first, is computed
again from what came before it, and its vector-Jacobian product turns the gradient with respect to what later tokens
remembered of it into that with respect to the parameters and to what it remembered itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.caches import cache_arrays, forked, fresh_caches, prefix_views
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.model.shared_prefix import Segment, SplitPair, pieces, split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.gradient_methods import (
    Gradient,
    PairGradients,
    added,
    loss_grads_wrt_logps,
    summed_over_groups,
    weighted_sum,
)
from mlx_cpo_plugin.training.objective import Objective


@dataclass(frozen=True)
class Chain:
    """Consecutive segments, what is remembered at the start of each, and the seed that each is computed with."""

    segments: list[Segment]
    starts: list[list[object]]
    seeds: list[int]

    def seen_in(self, caches: list[object]) -> Chain:
        """Return the chain with keys and values that are views of those of ``caches``, which hold the same tokens."""
        return replace(self, starts=[prefix_views(caches, start) for start in self.starts])


@dataclass(frozen=True)
class ChainGradient:
    """The gradient of a chain's log-prob.

    Attributes:
        logps, logits: sums over the chain's scored tokens, float32 [].
        grad_parameters: gradient with respect to each trainable parameter, by name.
        grad_start: gradient with respect to each array that is remembered at the chain's start.
    """

    logps: mx.array
    logits: mx.array
    grad_parameters: Gradient
    grad_start: list[mx.array]

    def taken_grad_start(self) -> list[mx.array]:
        """Return ``grad_start``, and hold it no longer."""
        taken = list(self.grad_start)
        self.grad_start.clear()
        return taken


class SegmentGradients:
    """One pair at a time, in segments of at most ``step_size`` tokens, over a prefix that both answers share.

    The loss depends on the model through the log-probs of the two answers only. So the gradient of each answer's
    log-prob is computed by itself, and scaled by the loss's gradient once both log-probs are known.

    Args:
        step_size: ``None`` takes the prefix and each answer whole.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, scorer: SharedPromptScorer, step_size: int | None = None
    ) -> None:
        self.model, self.objective, self.scorer, self.step_size = model, objective, scorer, step_size

    def __call__(self, pairs: Sequence[PreferencePair], step: StepTotals, quantised: bool = False) -> PairGradients:
        return summed_over_groups(
            [[pair] for pair in pairs], lambda group: self.of_pair(split_shared_prefix(group[0]), step)
        )

    def of_pair(self, split: SplitPair, step: StepTotals) -> PairGradients:
        """Return loss, scores and gradient of one pair."""
        end = fresh_caches(self.model)
        prefix, prefix_logps, prefix_logits = self._remember_prefix(split.prefix, end)
        sides = []
        for side in (split.chosen, split.rejected):
            answer = self._remember_start(side, forked(end))
            # The answer's keys and values begin with those of the prefix, which are not to be held twice.
            prefix, end = prefix.seen_in(answer.starts[-1]), prefix_views(answer.starts[-1], end)
            sides.append(self._gradient(answer, mx.array(1.0)))
        logps = [(prefix_logps + side.logps).reshape(1) for side in sides]
        logits = [(prefix_logits + side.logits).reshape(1) for side in sides]
        counts = [mx.array([float(count)]) for count in split.token_counts]
        losses, scores, slopes = loss_grads_wrt_logps(self.objective, AnswerScores(*logps, *logits, *counts), step)

        before = self._gradient(
            prefix,
            (slopes[0] + slopes[1]).reshape(()),
            [
                (slopes[0] * x + slopes[1] * y).astype(x.dtype)
                for x, y in zip(*(side.taken_grad_start() for side in sides), strict=True)
            ],
        )
        answers = weighted_sum(slopes, sides[0].grad_parameters, sides[1].grad_parameters)
        return PairGradients(losses, scores, {**answers, **added(answers, before.grad_parameters)})

    def _remember_prefix(self, whole: Segment | None, caches: list[object]) -> tuple[Chain, mx.array, mx.array]:
        """Run the prefix through ``caches``; return its chain, and the sums over its scored tokens."""
        segments = pieces(whole, self.step_size) if whole is not None else []
        logps, logits = mx.array(0.0), mx.array(0.0)
        chain = Chain(segments, [], [_drawn_seed() for _ in segments])
        for segment, seed in zip(segments, chain.seeds, strict=True):
            chain.starts.append(forked(caches))
            mx.random.seed(seed)
            segment_logps, segment_logits = self.scorer.segment_sums(segment, caches, differentiate=False)
            logps, logits = logps + segment_logps, logits + segment_logits
            chain = chain.seen_in(caches)  # each start would keep all keys and values before it
            mx.eval(logps, logits, cache_arrays(caches))
        return chain, logps, logits

    def _remember_start(self, whole: Segment, caches: list[object]) -> Chain:
        """Run all but the last segment of an answer through ``caches``."""
        segments = pieces(whole, self.step_size)
        chain = Chain(segments, [forked(caches)], [_drawn_seed() for _ in segments])
        for segment, seed in zip(segments[:-1], chain.seeds, strict=False):
            mx.random.seed(seed)
            self.scorer.split.hidden(mx.array(segment.inputs), caches)
            chain.starts.append(forked(caches))
            chain = chain.seen_in(caches)
            mx.eval(cache_arrays(caches))
        return chain

    def _gradient(self, chain: Chain, slope: mx.array, grad_end: list[mx.array] | None = None) -> ChainGradient:
        """Return the gradient of ``slope`` times the chain's log-prob, and what flows on from later chains.

        Args:
            grad_end: gradient with respect to what is remembered at the chain's end; ``None``: nothing comes after it.
        """
        trainable = by_name(self.model.trainable_parameters())
        names, parameters = list(trainable), list(trainable.values())
        logps, logits = mx.array(0.0), mx.array(0.0)
        total: Gradient | None = None
        goes_on = grad_end is not None
        for segment, start, seed in reversed(list(zip(chain.segments, chain.starts, chain.seeds, strict=True))):
            mx.random.seed(seed)  # dropout has to be that of the first pass

            def forward(
                *inputs: mx.array,
                segment: Segment = segment,
                start: list[object] = start,
                goes_on: bool = goes_on,
            ) -> list[mx.array]:
                self.model.update(tree_unflatten(list(zip(names, inputs, strict=False))))
                caches = forked(start, iter(inputs[len(names) :]))
                sums = self.scorer.segment_sums(segment, caches, differentiate=True)
                return [*sums, *(cache_arrays(caches) if goes_on else [])]

            cotangents = [slope, mx.array(0.0), *(grad_end or [])]
            sums, grads = mx.vjp(forward, [*parameters, *cache_arrays(start)], cotangents)
            logps, logits = logps + sums[0], logits + sums[1]
            total = added(total, dict(zip(names, grads, strict=False)))
            grad_end, goes_on = grads[len(names) :], True
            del sums, cotangents  # so that MLX frees keys, values and their gradients layer by layer
            mx.eval(logps, logits, total, grad_end)
        self.model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return ChainGradient(logps, logits, total or {}, grad_end or [])


def _drawn_seed() -> int:
    return int(mx.random.randint(0, 2**31 - 1))
