"""Model and batch -> log-probs of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.batches import Batch
from mlx_cpo_plugin.model.exponential import exponential

# On a CPU MLX adds up one number after the other, and thousands of them in float32 lose digits.
SUM_PART = 128


class AnswerScores(NamedTuple):
    """The policy's scores of the answers of B pairs; every array is float32 [B].

    Attributes:
        chosen_logps, rejected_logps: summed log-probs of the scored tokens, or their means if length-normalised.
        chosen_logits, rejected_logits: mean raw logit of the scored tokens.
        chosen_tokens, rejected_tokens: how many tokens of the answers are scored.
    """

    chosen_logps: mx.array
    rejected_logps: mx.array
    chosen_logits: mx.array
    rejected_logits: mx.array
    chosen_tokens: mx.array
    rejected_tokens: mx.array


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode until the context ends; one without modes stays as it is."""
    was_training = getattr(model, "training", None)
    if was_training is None:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def score_answers(model: nn.Module, batch: Batch, length_normalised: bool = False) -> AnswerScores:
    """Return the log-probs that ``model`` gives the scored tokens of a batch of pairs.

    Whatever the model's dtype, log-probs are computed and summed in float32.
    """
    pairs = len(batch.token_counts) // 2
    columns = (*score_rows(model, batch), batch.token_counts)
    sums = AnswerScores(*(side for column in columns for side in (column[:pairs], column[pairs:])))
    return normalised(sums, length_normalised)


def normalised(sums: AnswerScores, length_normalised: bool) -> AnswerScores:
    """Divide sums by the scored tokens of the answers: raw logits always, log-probs if they are to be means."""
    if length_normalised:
        sums = sums._replace(
            chosen_logps=sums.chosen_logps / sums.chosen_tokens,
            rejected_logps=sums.rejected_logps / sums.rejected_tokens,
        )
    return sums._replace(
        chosen_logits=sums.chosen_logits / sums.chosen_tokens,
        rejected_logits=sums.rejected_logits / sums.rejected_tokens,
    )


def score_rows(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the summed log-probs and summed raw logits of the scored tokens of each row, both float32 [rows]."""
    logits = model(batch.tokens[:, :-1])
    scored = logits.reshape(-1, logits.shape[-1])[batch.scored_positions].astype(mx.float32)
    target_logits = mx.take_along_axis(scored, batch.targets[:, None], axis=-1).squeeze(-1)
    logps = target_logits - log_normaliser(scored)
    rows = len(batch.token_counts)
    return sums_of_rows(logps, batch.target_rows, rows), sums_of_rows(target_logits, batch.target_rows, rows)


def log_normaliser(logits: mx.array) -> mx.array:
    """Return log(sum(exp(logits))) over the vocabulary, float32 [N], of logits float32 [N, V].

    Summed one after the other, SmolLM2's vocabulary of 49,152 tokens would shift each log-prob by 4e-5.
    """
    normaliser: Any = _log_normaliser(logits)
    return normaliser


@mx.custom_function
def _log_normaliser(logits: mx.array) -> mx.array:
    return mx.logsumexp(mx.logsumexp(in_parts(logits, -mx.inf), axis=-1), axis=-1)


@_log_normaliser.vjp
def _log_normaliser_vjp(logits: mx.array, cotangent: mx.array, normaliser: mx.array) -> mx.array:
    probabilities: Any = exponential(logits - normaliser[:, None])
    return cotangent[:, None] * probabilities


def sum_over_vocabulary(values: mx.array) -> mx.array:
    """Add up float32 [N, V] over the vocabulary, to [N]."""
    return in_parts(values, 0).sum(axis=-1).sum(axis=-1)


def in_parts(values: mx.array, padding: float) -> mx.array:
    """Return float32 [N, V] as [N, parts, SUM_PART], filled up with ``padding``."""
    missing = -values.shape[-1] % SUM_PART
    padded = mx.pad(values, [(0, 0), (0, missing)], constant_values=padding) if missing else values
    return padded.reshape(len(values), -1, SUM_PART)


def scores_of_rows(logps: mx.array, logits: mx.array, rows: mx.array, token_counts: mx.array) -> AnswerScores:
    """Add up B pairs, each float32 [B].

    Args:
        logps, logits: of scored tokens, float32 [N].
        rows: of these tokens, int32 [N]: those of chosen answers come first, then those of rejected ones, then of what
            both sides have; 3 B is padding.
        token_counts: of chosen, then of rejected answers, float32 [2 B].
    """
    pairs = len(token_counts) // 2
    chosen, rejected, both = (slice(side * pairs, (side + 1) * pairs) for side in range(3))
    sums = [sums_of_rows(values, rows, 3 * pairs) for values in (logps, logits)]
    totals = [values[side] + values[both] for values in sums for side in (chosen, rejected)]
    columns = (*totals, token_counts[chosen], token_counts[rejected])
    return AnswerScores(*columns)


def sums_of_rows(values: mx.array, rows: mx.array, count: int) -> mx.array:
    """Add up values float32 [N] by their rows, int32 [N]; return [count], without row ``count``, which is padding."""
    return mx.zeros(count + 1, mx.float32).at[rows].add(values)[:count]
