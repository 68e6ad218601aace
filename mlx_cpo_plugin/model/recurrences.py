"""Recurrent layers whose states are computed again in the backward pass, a chunk of tokens after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.host import memory_safe_recurrences
from mlx_cpo_plugin.model.layers import Call
from mlx_cpo_plugin.model.recompute import checkpointed_call

# Methods of the mixers of Mamba and Jamba: a sequence with the states before it, and the steps in it.
_SEQUENCE, _STEP = "_process_sequence", "ssm_step"


@contextmanager
def recurrences_in_chunks(model: nn.Module, chunk_size: int) -> Iterator[None]:
    """Use the host's memory-bounded recurrences, and own ones for Mamba and Jamba, until the context ends.

    In the host's for these two, parameters of the recurrence itself get no gradient.
    """
    mixers = [module for module in model.modules() if hasattr(type(module), _SEQUENCE) and hasattr(type(module), _STEP)]
    own = [(mixer, getattr(type(mixer), _SEQUENCE), getattr(type(mixer), _STEP)) for mixer in mixers]
    with memory_safe_recurrences(model, chunk_size, print if is_first_rank() else lambda _: None):
        for mixer, sequence, step in own:
            setattr(mixer, _SEQUENCE, partial(_in_chunks, sequence, chunk_size, mixer))
            setattr(mixer, _STEP, partial(step, mixer))
        try:
            yield
        finally:
            for mixer in mixers:
                delattr(mixer, _SEQUENCE)
                delattr(mixer, _STEP)


def _in_chunks(
    sequence: Call, chunk_size: int, mixer: nn.Module, x: mx.array, convolved: Any, state: Any
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """Return what ``sequence`` returns for all tokens of ``x``, [B, T, D], and the two states behind them.

    With dropout nothing is computed again, since it would be with other draws.
    """
    draws = any(isinstance(module, nn.Dropout) and module.training and module._p_1 < 1 for module in mixer.modules())
    call = sequence if draws else checkpointed_call(sequence)
    outputs = []
    for start in range(0, x.shape[1], chunk_size):
        output, (convolved, state) = call(mixer, x[:, start : start + chunk_size], convolved, state)
        outputs.append(output)
    return mx.concatenate(outputs, axis=1), (convolved, state)
