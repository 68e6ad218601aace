"""Log-prob and gradient of one answer, computed in float64 in the plainest way.

In float32 a sum over a large vocabulary or a long row is itself off by more than two ways to it should differ. This one
is ``model(tokens)``, with no padding, no cache and no code of any trainer's losses.

All parameters, products and sums are in float64. MLX computes a few functions of float64 arrays (``exp``, ``sigmoid``,
the normalisations, the angles of rotary embeddings) with float32 inside; their errors of about 1e-7 remain.
"""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.parameters import by_name


def convert(model: nn.Module) -> None:
    """Turn every weight of ``model`` into float64.

    Raises:
        ValueError: the model is quantised, or too large for this machine in float64.
    """
    if any("scales" in module for module in model.modules()):
        raise ValueError("the model has quantised weights, with which MLX does not multiply in float64")
    size = sum(value.size * mx.float64.size for value in by_name(model.parameters()).values())
    if size > physical_memory():
        raise ValueError(f"the model takes {size / 1e9:.1f} GB in float64, more than the memory of this machine")
    model.set_dtype(mx.float64)
    mx.eval(model.parameters())


def physical_memory() -> int:
    """Return the bytes of main memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def answer_gradient(
    model: nn.Module, prompt: np.ndarray, answer: np.ndarray, scored: np.ndarray, mean: bool
) -> tuple[float, dict[str, mx.array]]:
    """Return the log-prob of one answer and its gradient by parameter name, float64.

    Args:
        mean: average over the scored tokens in place of their sum.

    Raises:
        ValueError: the model's logits are not float64.
    """
    tokens = mx.array(np.concatenate([prompt, answer]))[None]
    targets, counts = mx.array(answer)[:, None], mx.array(scored)

    def answer_logp(model: nn.Module) -> mx.array:
        logits = model(tokens[:, :-1])[0, len(prompt) - 1 :]
        if logits.dtype != mx.float64:
            raise ValueError(f"the model turns float64 into {logits.dtype} on the way to its logits")
        logps = mx.take_along_axis(logits, targets, axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        total = mx.where(counts, logps, 0).sum()
        return total / int(scored.sum()) if mean else total

    logp, gradient = nn.value_and_grad(model, answer_logp)(model)
    mx.eval(logp, gradient)
    return float(logp.item()), by_name(gradient)
