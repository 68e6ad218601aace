"""Hidden states -> log-probs of their target tokens, in chunks whose logits are never all in memory at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.backbone import SplitModel

# Logits of a chunk, in elements: 16 MB in float32, a few times that with what the softmax and its gradient need.
CHUNK_ELEMENTS = 2**22
SMALLEST_CHUNK = 16


def target_scores(
    split: SplitModel, hidden: mx.array, targets: mx.array, vocabulary: int, differentiate: bool
) -> tuple[mx.array, mx.array]:
    """Return the log-probs and the raw logits of the targets, both float32 [N].

    Args:
        hidden: [N, D], the states that predict the targets.
        targets: int32 [N].
        vocabulary: size of the head's output; decides how many tokens make up a chunk.
        differentiate: whether a gradient by the log-probs follows; the raw logits have none.
    """
    size = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // vocabulary)
    logps: list[mx.array] = []
    logits: list[mx.array] = []
    for start in range(0, len(targets), size):
        chunk, chunk_targets = hidden[start : start + size], targets[start : start + size]
        if logps:  # one chunk after the other, or all their logits would be computed together
            chunk = mx.depends(chunk, logps[-1])
        scores = _chunk_scores(split, chunk, chunk_targets, differentiate)
        logps.append(scores[0])
        logits.append(scores[1])
    return mx.concatenate(logps), mx.concatenate(logits)


def _chunk_scores(
    split: SplitModel, hidden: mx.array, targets: mx.array, differentiate: bool
) -> tuple[mx.array, mx.array]:
    if not differentiate:
        return _scores(split, hidden, targets)
    if split.head_parameters():
        return _checkpointed_scores(split, hidden, targets)
    return _scores_with_slopes(split, hidden, targets)


def _scores(split: SplitModel, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    logits = split.logits(hidden)
    if not cross_entropy_is_fused():
        logits = logits.astype(mx.float32)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1).astype(mx.float32)
    if cross_entropy_is_fused():
        return -mx.fast.cross_entropy(logits, targets), target_logits
    return target_logits - mx.logsumexp(logits, axis=-1), target_logits


def cross_entropy_is_fused() -> bool:
    """Whether the device has a kernel for it, which sums in float32 whatever the dtype of the logits."""
    return mx.default_device().type == mx.DeviceType.gpu


def _scores_with_slopes(split: SplitModel, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Compute, together with each log-prob, its derivative by its own hidden state, so that the logits can go.

    What arrives backwards for a log-prob is one number, and the gradient is that number times the derivative. With a
    frozen head nothing else is needed, and no logit is computed twice.
    """

    @mx.custom_function
    def scores(hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        outputs, (slopes,) = mx.vjp(
            lambda states: list(_scores(split, states, targets)),
            [hidden],
            [mx.ones(len(targets)), mx.zeros(len(targets))],
        )
        # The log-probs wait for the slopes: whoever has the former knows that the logits are gone.
        return mx.depends(outputs[0], slopes), outputs[1], slopes

    @scores.vjp
    def scores_vjp(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return (cotangents[0][:, None] * outputs[2].astype(mx.float32)).astype(outputs[2].dtype)

    result: Any = scores(hidden)
    return result[0], result[1]


def _checkpointed_scores(split: SplitModel, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Compute the logits again in the backward pass, where the head itself is trained."""

    def scores(parameters: dict[str, mx.array], hidden: mx.array) -> tuple[mx.array, mx.array]:
        split.model.update(tree_unflatten(list(parameters.items())))
        return _scores(split, hidden, targets)

    return mx.checkpoint(scores)(split.head_parameters(), hidden)
