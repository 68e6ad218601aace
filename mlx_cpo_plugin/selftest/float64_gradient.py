"""The gradient that both trainers are compared with, computed in float64.

In float32 a sum over a large vocabulary or a long row is itself off by more than the two trainers should differ, so
neither can tell how good the other is. This is the plainest way to the same gradient: one answer at a time through
``model(tokens)``, with no padding, no cache and no code of either trainer's losses.

All parameters, products and sums are in float64. MLX computes a few functions of float64 arrays (``exp``, ``sigmoid``,
the normalisations, the angles of rotary embeddings) with float32 inside; their errors of about 1e-7 remain.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.settings.config import RunSettings


@dataclass(frozen=True)
class ReferenceLoss:
    """One of the losses that both trainers have.

    Attributes:
        loss_type: ``sigmoid``, ``hinge``, ``ipo`` or ``dpop``.
        beta, delta: as in the settings.
    """

    loss_type: str
    beta: float
    delta: float

    @classmethod
    def from_settings(cls, settings: RunSettings) -> ReferenceLoss:
        """Take the loss from the settings of a run."""
        return cls(settings.dpo_cpo_loss_type, settings.beta, settings.delta)

    @property
    def takes_means(self) -> bool:
        """Whether an answer's log-prob is the mean of its tokens' instead of their sum."""
        return self.loss_type == "ipo"

    def slope(self, gap: float) -> float:
        """Return the derivative of a pair's loss by ``gap``, which is ``chosen_logps - rejected_logps``.

        The gap is all that these losses see of the model, the penalty of ``dpop`` included.
        """
        if self.loss_type == "hinge":
            return -self.beta if self.beta * gap < 1 else 0.0
        if self.loss_type == "ipo":
            return 2 * (gap - 1 / (2 * self.beta))
        # sigmoid(-x) as exp(-log(1 + exp(x))), for which no x is too large
        of_sigmoid = -self.beta * math.exp(-np.logaddexp(0.0, self.beta * gap))
        if self.loss_type == "dpop":
            return of_sigmoid - (self.delta if gap < 0 else 0.0)
        return of_sigmoid


def reference_gradient(
    model: nn.Module, pairs: Sequence[PreferencePair], loss: ReferenceLoss, finished: Callable[[int], None]
) -> dict[str, mx.array]:
    """Return the gradient of the mean loss of ``pairs`` by parameter name, float64.

    Args:
        model: is converted to float64 and stays so.
        finished: is told the number of pairs that are done.

    Raises:
        ValueError: the model is quantised, too large for this machine in float64, or leaves float64 on the way.
    """
    # Only CPUs have float64.
    with mx.stream(mx.cpu):
        convert(model)
        total: dict[str, mx.array] = {}
        with checkpointed_layers(model):
            for number, pair in enumerate(pairs, 1):
                chosen, by_chosen = answer_gradient(
                    model, pair.prompt, pair.chosen, pair.chosen_scored, loss.takes_means
                )
                rejected, by_rejected = answer_gradient(
                    model, pair.prompt, pair.rejected, pair.rejected_scored, loss.takes_means
                )
                weight = loss.slope(chosen - rejected) / len(pairs)
                for name, value in by_chosen.items():
                    total[name] = total.get(name, 0) + weight * (value - by_rejected[name])
                mx.eval(total)
                finished(number)
    return total


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
