"""The exact gradient of long pairs, segment by segment: memory grows with a segment, and by keys and values alone.

A first pass without gradient remembers keys and values. Then each segment, from the last to the first, is computed
again from what came before it, and its vector-Jacobian product turns the gradient with respect to what later tokens
remembered of it into that with respect to the parameters and to what it remembered itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.caches import cache_arrays, can_be_padded, forked, fresh_caches
from mlx_cpo_plugin.model.remembered import State, go_back, read_from, state_of, with_room
from mlx_cpo_plugin.model.shared_prefix import Segment, SplitPair, pieces, split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, sums_of_pair
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

# An answer's last segment is computed once more, to be remembered like the others, where the prefix has so many times
# its tokens: appending it to them would take their memory once more.
FAR = 8


@dataclass(frozen=True)
class Chain:
    """Consecutive segments, where each starts in what is remembered, and the seed that it is computed with.

    Attributes:
        logps, logits: sums over the scored tokens of those that were computed for them, float32 [].
    """

    segments: list[Segment]
    starts: list[State]
    seeds: list[int]
    logps: mx.array
    logits: mx.array


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
        before = [] if split.prefix is None else pieces(split.prefix, self.step_size)
        sides = [pieces(side, self.step_size) for side in (split.chosen, split.rejected)]
        caches, start = fresh_caches(self.model), sum(map(len, before))
        is_far = can_be_padded(caches) and start >= FAR * max(len(segments[-1]) for segments in sides)
        remembered = [len(segments) if is_far else len(segments) - 1 for segments in sides]
        rest = max(sum(map(len, segments[:count])) for segments, count in zip(sides, remembered, strict=True))
        caches = with_room(caches, start + rest)

        prefix = self._remember(before, len(before), caches)
        end = state_of(caches)
        chosen = self._gradient(self._remember(sides[0], remembered[0], caches, scored=False), caches, mx.array(1.0))
        go_back(caches, end)
        chain = self._remember(sides[1], remembered[1], caches, scored=is_far)
        rejected = chain if is_far else self._gradient(chain, caches, mx.array(1.0))

        own = [(side.logps, side.logits) for side in (chosen, rejected)]
        sums = sums_of_pair(split, (prefix.logps, prefix.logits), own)
        losses, scores, slopes = loss_grads_wrt_logps(self.objective, sums, step)

        if isinstance(rejected, ChainGradient):
            answers = weighted_sum(slopes, chosen.grad_parameters, rejected.grad_parameters)
            grad_end = [
                (slopes[0] * x + slopes[1] * y).astype(x.dtype)
                for x, y in zip(chosen.taken_grad_start(), rejected.taken_grad_start(), strict=True)
            ]
        else:  # with its slope known, the gradient is added to that of the other answer layer by layer
            length = start + sum(map(len, chain.segments))
            scaled = [_extended((slopes[0] * x).astype(x.dtype), length) for x in chosen.taken_grad_start()]
            both = self._gradient(chain, caches, slopes[1].reshape(()), scaled)
            answers = weighted_sum((slopes[0], mx.array(1.0)), chosen.grad_parameters, both.grad_parameters)
            grad_end = both.taken_grad_start()
        whole = self._gradient(prefix, caches, (slopes[0] + slopes[1]).reshape(()), grad_end)
        return PairGradients(losses, scores, {**answers, **added(answers, whole.grad_parameters)})

    def _remember(self, segments: list[Segment], count: int, caches: list[object], scored: bool = True) -> Chain:
        """Run the first ``count`` segments through ``caches``, and sum over their scored tokens if wanted."""
        starts, seeds = [], [_drawn_seed() for _ in segments]
        logps, logits = mx.array(0.0), mx.array(0.0)
        for number, (segment, seed) in enumerate(zip(segments, seeds, strict=True)):
            starts.append(state_of(caches))
            if number == count:
                break
            mx.random.seed(seed)
            if scored:
                sums = self.scorer.segment_sums(segment, caches, differentiate=False)
                logps, logits = logps + sums[0], logits + sums[1]
            else:
                self.scorer.split.hidden(mx.array(segment.inputs), caches)
            mx.eval(logps, logits, cache_arrays(caches))
        return Chain(segments, starts, seeds, logps, logits)

    def _gradient(
        self, chain: Chain, caches: list[object], slope: mx.array, grad_end: list[mx.array] | None = None
    ) -> ChainGradient:
        """Return the gradient of ``slope`` times the chain's log-prob, and what flows on from later chains.

        Args:
            caches: hold the chain's text, but for a last segment that was not remembered.
            grad_end: gradient with respect to what is remembered at the chain's end, which is used up; ``None``:
                nothing comes after it.
        """
        logps, logits = mx.array(0.0), mx.array(0.0)
        total: Gradient | None = None
        for segment, start, seed in reversed(list(zip(chain.segments, chain.starts, chain.seeds, strict=True))):
            mx.random.seed(seed)  # dropout has to be that of the first pass
            sums, gradient, grad_end = self._vjp(segment, read_from(caches, start, self.model), slope, grad_end)
            logps, logits = logps + sums[0], logits + sums[1]
            total = added(total, gradient)
            del sums, gradient  # so that MLX frees gradients of keys and values layer by layer
            mx.eval(logps, logits, total, grad_end)
        return ChainGradient(logps, logits, total or {}, grad_end or [])

    def _vjp(
        self, segment: Segment, caches: list[object], slope: mx.array, grad_end: list[mx.array] | None
    ) -> tuple[list[mx.array], Gradient, list[mx.array]]:
        """Return the sums over a segment's scored tokens, and gradients w.r.t. parameters and what came before."""
        trainable = by_name(self.model.trainable_parameters())
        names, goes_on = list(trainable), grad_end is not None

        def forward(*inputs: mx.array) -> list[mx.array]:
            self.model.update(tree_unflatten(list(zip(names, inputs, strict=False))))
            read = forked(caches, map(_without_gradient_of_ids, inputs[len(names) :]))
            sums = self.scorer.segment_sums(segment, read, differentiate=True)
            return [*sums, *(cache_arrays(read) if goes_on else [])]

        cotangents = [slope, mx.array(0.0), *(grad_end or [])]
        if grad_end is not None:
            grad_end.clear()
        sums, grads = mx.vjp(forward, [*trainable.values(), *cache_arrays(caches)], cotangents)
        self.model.update(tree_unflatten(list(trainable.items())))
        return sums[:2], dict(zip(names, grads, strict=False)), grads[len(names) :]


def _extended(gradient: mx.array, length: int) -> mx.array:
    """Return the gradient of keys or values with zeros for the tokens up to ``length``."""
    return mx.pad(gradient, [(0, 0), (0, 0), (0, length - gradient.shape[2]), (0, 0)])


def _without_gradient_of_ids(remembered: mx.array) -> mx.array:
    """Return what a cache holds; token ids, as embeddings of several tokens remember them, have no gradient."""
    return remembered if mx.issubdtype(remembered.dtype, mx.inexact) else mx.stop_gradient(remembered)


def _drawn_seed() -> int:
    return int(mx.random.randint(0, 2**31 - 1))
