"""Attention that keeps its inputs and its output for the backward pass, and no scores.

The scores of a head grow with the square of the tokens. For the gradient they are computed again, for a block of
queries at a time and only over the keys visible to it (FlashAttention, Dao et al. 2022, arXiv 2205.14135, with blocks
of queries alone); ``delta`` is the row sum of grad_out * output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.model.exponential import LOG_2, PER_LOG_2, power_of_two

QUERY_BLOCK = 128
# Where keys are many a block has fewer queries, so that it has no more scores than this.
MOST_SCORES, FEWEST_QUERIES = 2**25, 8

# What is added to the score of a masked key: far below every score, and far from what overflows.
_MASKED = -1e30

Mask = mx.array | str | None


def lean_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask = None) -> mx.array:
    """Return attention [B, H, N, V] in the dtype of ``queries``, as ``mx.fast.scaled_dot_product_attention`` does.

    Args:
        queries: [B, H, N, D].
        keys, values: [B, H / G, S, D] and [B, H / G, S, V]; G heads of queries share one of them.
        mask: ``causal`` lines the last query up with the last key; an array is boolean (true is visible) or is added to
            the scores, and broadcasts to [B, H, N, S]; ``None`` shows everything. What is added has a gradient, too: it
            may be a part of the scores, as that of the positions is in DeepSeek's attention.
    """
    fused = current_device().attention != "ours"
    is_added = isinstance(mask, mx.array) and mx.issubdtype(mask.dtype, mx.floating)

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask = mask) -> tuple[mx.array, mx.array]:
        if fused:  # one kernel, which keeps no scores either
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask), mx.zeros(0)
        queries = queries * (scale * PER_LOG_2)
        outputs, logs = [], []
        for block in _blocks(queries, keys, mask):
            scores = block.scores(queries, keys)
            highest = scores.max(axis=-1, keepdims=True)
            powers = power_of_two(scores - highest)
            totals = powers.sum(axis=-1, keepdims=True)
            summed = powers.astype(values.dtype) @ values[:, :, : block.visible]
            outputs.append(block.by_head((summed / totals).astype(values.dtype)))
            logs.append(block.by_head(highest + mx.log2(totals)))
        return mx.concatenate(outputs, axis=2), mx.concatenate(logs, axis=2)

    @attend.vjp
    def attend_vjp(
        primals: tuple[mx.array, ...], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, ...]:
        (queries, keys, values, *added), (grad_out, _), (output, logs) = primals, cotangents, outputs
        queries = queries * (scale * PER_LOG_2)
        delta = (grad_out.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
        grad_q, by_scores = [], []
        grad_k, grad_v = mx.zeros_like(keys), mx.zeros_like(values)
        for block in _blocks(queries, keys, added[0] if added else mask):
            scores, grad_block = block.scores(queries, keys), block.rows(grad_out)
            weights = power_of_two(scores - block.rows(logs)) if logs.size else mx.softmax(scores * LOG_2, axis=-1)
            grad_weights = grad_block @ values[:, :, : block.visible].swapaxes(-1, -2)
            grad_scores = (weights * (grad_weights - block.rows(delta))).astype(queries.dtype)
            grad_q.append(block.by_head(grad_scores @ keys[:, :, : block.visible]) * scale)
            grad_k = grad_k.at[:, :, : block.visible].add(grad_scores.swapaxes(-1, -2) @ block.rows(queries))
            grad_v = grad_v.at[:, :, : block.visible].add(weights.astype(values.dtype).swapaxes(-1, -2) @ grad_block)
            by_scores.append(block.by_head(grad_scores))
        grad_added = [_summed_to(mx.concatenate(by_scores, axis=2), array) for array in added]
        return mx.concatenate(grad_q, axis=2), grad_k * LOG_2, grad_v, *grad_added

    result: Any = attend(queries, keys, values, mask) if is_added else attend(queries, keys, values)
    return result[0]


@dataclass(frozen=True)
class _Block:
    """Consecutive queries, with the heads that share keys stacked into the rows of one product: [B, H / G, G * n, D].

    Attributes:
        start, stop: the queries.
        visible: how many of the keys, from the first, they can see.
        key_heads: H / G.
        mask: what is added to their scores.
    """

    start: int
    stop: int
    visible: int
    key_heads: int
    mask: mx.array | None

    def rows(self, array: mx.array) -> mx.array:
        """Take this block's part of [B, H, N, D] and stack it."""
        part = array[:, :, self.start : self.stop]
        return part.reshape(part.shape[0], self.key_heads, -1, part.shape[-1])

    def by_head(self, rows: mx.array) -> mx.array:
        """Turn stacked rows into [B, H, n, D] again."""
        return rows.reshape(rows.shape[0], -1, self.stop - self.start, rows.shape[-1])

    def scores(self, queries: mx.array, keys: mx.array) -> mx.array:
        """Return the scores of scaled queries, to base 2, float32 [B, H / G, G * n, visible]."""
        scores = (self.rows(queries) @ keys[:, :, : self.visible].swapaxes(-1, -2)).astype(mx.float32)
        if self.mask is not None:
            scores = (self.by_head(scores) + self.mask).reshape(scores.shape)
        return scores


def _blocks(queries: mx.array, keys: mx.array, mask: Mask) -> list[_Block]:
    """Cut the queries into blocks of :func:`query_block`."""
    count, total = queries.shape[2], keys.shape[2]
    size = query_block(queries.shape[0] * queries.shape[1] * total)
    offset = total - count
    blocks = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        visible, part = total, None
        if isinstance(mask, str):
            visible = offset + stop
            part = (mx.arange(start, stop) + offset)[:, None] >= mx.arange(visible)
        elif mask is not None:
            part = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
        blocks.append(_Block(start, stop, visible, keys.shape[1], _added_mask(part)))
    return blocks


def query_block(scores: int) -> int:
    """Return how many queries a block has, of so many scores each in all rows and heads."""
    return max(FEWEST_QUERIES, min(QUERY_BLOCK, MOST_SCORES // scores))


def _summed_to(gradient: mx.array, added: mx.array) -> mx.array:
    """Return the gradient of an array that was broadcast to [B, H, N, S]."""
    shape = (1,) * (gradient.ndim - added.ndim) + added.shape
    axes = [axis for axis, (whole, size) in enumerate(zip(gradient.shape, shape, strict=True)) if whole != size]
    return gradient.sum(axis=axes, keepdims=True).reshape(added.shape).astype(added.dtype)


def _added_mask(mask: mx.array | None) -> mx.array | None:
    if mask is None:
        return None
    if mask.dtype == mx.bool_:
        return mx.where(mask, mx.array(0.0), mx.array(_MASKED))
    return mx.maximum(mask.astype(mx.float32) * PER_LOG_2, _MASKED)
