"""Model and batch -> log-probs of the answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.batches import Batch


class AnswerScores(NamedTuple):
    """What the policy makes of the answers in a batch of B pairs; every array is float32 [B].

    Attributes:
        chosen_logps, rejected_logps: summed log-probs of the scored tokens, or their means if length-normalised.
        chosen_logits, rejected_logits: mean raw logit of the scored tokens.
    """

    chosen_logps: mx.array
    rejected_logps: mx.array
    chosen_logits: mx.array
    rejected_logits: mx.array


def score_answers(model: nn.Module, batch: Batch, length_normalised: bool = False) -> AnswerScores:
    """Return the log-probs that ``model`` gives the scored tokens of a batch of pairs.

    Whatever the model's dtype, log-probs are computed and summed in float32.
    """
    logps, logits = score_rows(model, batch)
    if length_normalised:
        logps = logps / batch.token_counts
    logits = logits / batch.token_counts
    pairs = len(batch.token_counts) // 2
    return AnswerScores(logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:])


def score_rows(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the summed log-probs and summed raw logits of the scored tokens of each row, both float32 [rows]."""
    logits = model(batch.tokens[:, :-1])
    scored = logits.reshape(-1, logits.shape[-1])[batch.scored_positions].astype(mx.float32)
    target_logits = mx.take_along_axis(scored, batch.targets[:, None], axis=-1).squeeze(-1)
    logps = target_logits - mx.logsumexp(scored, axis=-1)
    # One row more than there are catches the padding entries.
    rows = len(batch.token_counts)
    totals = mx.zeros((rows + 1, 2), mx.float32).at[batch.target_rows].add(mx.stack([logps, target_logits], axis=-1))
    return totals[:rows, 0], totals[:rows, 1]


@contextmanager
def compile_where_it_pays(wanted: bool | None = None) -> Iterator[None]:
    """Switch ``mx.compile`` off while on the CPU, where it needs a C++ compiler and many seconds for every shape.

    Args:
        wanted: force it on or off; ``None`` decides by the device.
    """
    off = not wanted if wanted is not None else mx.default_device().type == mx.DeviceType.cpu
    # A user who switched compilation off for the whole process keeps it off afterwards.
    if not off or "MLX_DISABLE_COMPILE" in os.environ:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def device_memory_limit() -> int | None:
    """Return the bytes that Metal recommends to keep wired, or ``None`` where there is no such limit."""
    info: dict[str, Any] = mx.device_info()
    limit = info.get("max_recommended_working_set_size")
    return int(limit) if limit else None
