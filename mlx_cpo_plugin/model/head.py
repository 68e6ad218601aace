"""Hidden states -> log-probs of their target tokens, without all their logits ever being in memory at once.

A frozen head is computed in blocks of its vocabulary or, where the cross-entropy of whole rows is one kernel, in blocks
of rows. Either way each log-prob is computed together with its gradient with respect to its own hidden state. What
arrives backwards for a log-prob is one number, and the gradient is that number times the one computed before: nothing
else has to be kept, and no logit is computed twice. A head that is trained is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.exponential import exponential
from mlx_cpo_plugin.model.logps import SUM_PART, log_normaliser, sum_over_vocabulary

# Logits of a block of the vocabulary, in elements: 1 MB in float32, a few times that with what their gradient needs.
BLOCK_ELEMENTS = 2**18
BLOCK_ROWS = 256
# Logits of a block of rows. Each of these reads the whole head, so it should hold enough rows to be worth that.
ROWS_ELEMENTS = 2**20
FEWEST_ROWS = 32
FEWEST_ROWS_ON_GPU = 256

Scores = tuple[mx.array, mx.array]
# Hidden states [N, D], targets [N] -> log-probs, raw logits, and the gradient [N, D] of the former.
GradHidden = Callable[[mx.array, mx.array], tuple[mx.array, mx.array, mx.array]]


def target_scores(split: SplitModel, hidden: mx.array, targets: mx.array, differentiate: bool) -> Scores:
    """Return the log-probs and the raw logits of the targets, both float32 [N].

    Args:
        hidden: [N, D], the states that predict the targets.
        targets: int32 [N].
        differentiate: whether a gradient with respect to the log-probs follows; the raw logits have none.
    """
    if not len(targets):
        return mx.zeros(0), mx.zeros(0)
    trained = differentiate and bool(split.head_parameters())
    weight = split.head_weight if library.in_use() and not trained else None
    if weight is not None:
        return operations.target_scores(hidden, targets, weight, differentiate)
    by_vocabulary = split.output_layer is not None and not current_device().fused_cross_entropy and not trained
    fewest = FEWEST_ROWS_ON_GPU if current_device().fused_cross_entropy else FEWEST_ROWS
    size = BLOCK_ROWS if by_vocabulary else max(fewest, ROWS_ELEMENTS // split.vocabulary)
    logps: list[mx.array] = []
    logits: list[mx.array] = []
    for start in range(0, len(targets), size):
        chunk, chunk_targets = hidden[start : start + size], targets[start : start + size]
        if logps:  # one chunk after the other, as below
            chunk = mx.depends(chunk, logps[-1])
        scores = _chunk_scores(split, chunk, chunk_targets, differentiate, by_vocabulary, trained)
        logps.append(scores[0])
        logits.append(scores[1])
    return mx.concatenate(logps), mx.concatenate(logits)


def _chunk_scores(
    split: SplitModel, hidden: mx.array, targets: mx.array, differentiate: bool, by_vocabulary: bool, trained: bool
) -> Scores:
    if trained:
        return _checkpointed_scores(split, hidden, targets)
    if by_vocabulary:
        if differentiate:
            return _scores_and_grad(hidden, targets, lambda *given: _blockwise_grad(split, *given))
        return _scores_by_vocabulary(split, hidden, targets)
    if differentiate:
        return _scores_and_grad(hidden, targets, lambda *given: _rowwise_grad(split, *given))
    return _scores(split, hidden, targets)


def _scores(split: SplitModel, hidden: mx.array, targets: mx.array) -> Scores:
    logits = split.logits(hidden)
    if not current_device().fused_cross_entropy:
        logits = logits.astype(mx.float32)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1).astype(mx.float32)
    if current_device().fused_cross_entropy:
        return -mx.fast.cross_entropy(logits, targets), target_logits
    return target_logits - log_normaliser(logits), target_logits


def _scores_and_grad(hidden: mx.array, targets: mx.array, with_grad: GradHidden) -> Scores:
    @mx.custom_function
    def scores(hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logps, logits, grad_hidden = with_grad(hidden, targets)
        # The log-probs wait for the gradient, so they can only be used after the logits are freed.
        return mx.depends(logps, grad_hidden), logits, grad_hidden

    @scores.vjp
    def scores_vjp(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return (cotangents[0][:, None] * outputs[2].astype(mx.float32)).astype(outputs[2].dtype)

    result: Any = scores(hidden)
    return result[0], result[1]


def _rowwise_grad(split: SplitModel, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    (logps, logits), (grad_hidden,) = mx.vjp(
        lambda states: list(_scores(split, states, targets)),
        [hidden],
        [mx.ones(len(targets)), mx.zeros(len(targets))],
    )
    return logps, logits, grad_hidden


def _blockwise_grad(split: SplitModel, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Sum exponentials and their derivatives over the vocabulary, relative to the highest logit so far.

    Each block waits for the one before, or all their logits would be computed together.
    """

    def over_rows(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        total, highest = _summed_exponentials(split, states)
        return total.sum(), total, highest  # rows do not depend on each other: each has its own gradient

    total_and_grad = mx.value_and_grad(over_rows)
    highest, total = mx.full(len(hidden), -mx.inf), mx.zeros(len(hidden))
    grad_hidden = mx.zeros(hidden.shape)
    for ids in _vocabulary_blocks(split, hidden):
        hidden = mx.depends(hidden, [total, grad_hidden])
        with split.vocabulary_slice(ids):
            (_, block_total, block_highest), block_grad = total_and_grad(hidden)
        before, highest = highest, mx.maximum(highest, block_highest)
        kept: Any = exponential(before - highest)
        new: Any = exponential(block_highest - highest)
        total = total * kept + block_total * new
        grad_hidden = grad_hidden * kept[:, None] + block_grad * new[:, None]
    with split.vocabulary_slice(targets):
        (logits,), (target_grad,) = mx.vjp(
            lambda states: [_target_logits(split, states)], [hidden], [mx.ones(len(hidden))]
        )
    grad_hidden = target_grad - grad_hidden / total[:, None]
    return logits - highest - mx.log(total), logits, grad_hidden.astype(hidden.dtype)


def _scores_by_vocabulary(split: SplitModel, hidden: mx.array, targets: mx.array) -> Scores:
    normaliser = mx.full(len(hidden), -mx.inf)
    for ids in _vocabulary_blocks(split, hidden):
        hidden = mx.depends(hidden, normaliser)
        with split.vocabulary_slice(ids):
            total, highest = _summed_exponentials(split, hidden)
        normaliser = mx.logaddexp(normaliser, mx.log(total) + highest)
    with split.vocabulary_slice(targets):
        logits = _target_logits(split, hidden)
    return logits - normaliser, logits


def _vocabulary_blocks(split: SplitModel, hidden: mx.array) -> list[slice]:
    size = BLOCK_ELEMENTS // len(hidden)
    size = size // SUM_PART * SUM_PART or size  # whole parts are summed without padding
    return [slice(start, start + size) for start in range(0, split.vocabulary, size)]


def _summed_exponentials(split: SplitModel, hidden: mx.array) -> tuple[mx.array, mx.array]:
    """Return the sum of ``exp(logit - highest)`` over the vocabulary slice, and the highest logit, float32 [N] each."""
    logits = split.logits(hidden).astype(mx.float32)
    highest = mx.stop_gradient(logits.max(axis=-1))
    exponentials: Any = exponential(logits - highest[:, None])
    return sum_over_vocabulary(exponentials), highest


def _target_logits(split: SplitModel, hidden: mx.array) -> mx.array:
    """Return the logit of each state for the token in its own place, float32 [N]."""
    return mx.diagonal(split.logits(hidden)).astype(mx.float32)


def _checkpointed_scores(split: SplitModel, hidden: mx.array, targets: mx.array) -> Scores:
    """Compute the logits again in the backward pass, for a head that is trained."""

    def scores(parameters: dict[str, mx.array], hidden: mx.array) -> Scores:
        split.model.update(tree_unflatten(list(parameters.items())))
        return _scores(split, hidden, targets)

    return mx.checkpoint(scores)(split.head_parameters(), hidden)
