"""One optimizer step: the gradient summed over its micro-batches and ranks, then applied to float32 weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, TrainingError
from mlx_cpo_plugin.exchange import sum_over_ranks
from mlx_cpo_plugin.model.layers import HALF_PRECISION
from mlx_cpo_plugin.model.logps import SUM_PART, AnswerScores, in_parts
from mlx_cpo_plugin.model.rounding import dithered
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.gradient_methods import Gradient, GradientMethod, added

# Optimizers that treat every number alike, whatever array it is in.
_ELEMENTWISE = {
    optimizers.SGD,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.Adamax,
    optimizers.Adagrad,
    optimizers.AdaDelta,
    optimizers.Lion,
    optimizers.RMSprop,
}
# Numbers of an array, on average, up to which starting an operation takes longer than copying what it works on.
_SMALL = 1 << 16
# Numbers of arrays that are joined into one: an update holds some ten times as many at once.
_JOINED = 1 << 18
# A loss, in nats, below which a pair's slopes are as good as zero; see objective.LEAST_SLOPE.
_SATISFIED = 1e-10
# Rows that an error names.
_NAMED = 3


class MasterWeights:
    """The weights that the optimizer updates: float32 copies of those of half precision, and the others themselves.

    An update below the resolution of half precision so adds up instead of vanishing. Source: Micikevicius et al. 2018,
    arXiv 1710.03740, section 3.1.

    Attributes:
        copies: the float32 copies by name; the model holds them rounded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        narrow = {name: value for name, value in by_name(model.trainable_parameters()).items() if _is_half(value)}
        self._dtypes = {name: value.dtype for name, value in narrow.items()}
        self.copies = {name: value.astype(mx.float32) for name, value in narrow.items()}

    def weights(self) -> dict[str, mx.array]:
        """Return every trained weight by name, in float32 where the model's own is narrower."""
        return by_name(self._model.trainable_parameters()) | self.copies

    def set(self, weights: Mapping[str, mx.array]) -> None:
        """Set the trained weights by name, and give the model what it computes with."""
        self.copies.update({name: weights[name].astype(mx.float32) for name in self.copies})
        rounded = {
            name: dithered(self.copies[name], self._dtypes[name], name) if name in self.copies else value
            for name, value in weights.items()
        }
        self._model.update(tree_unflatten(list(rounded.items())))


class ByName:
    """Arrays as an optimizer takes them: each by itself, in the model's tree."""

    def tree(self, arrays: Mapping[str, mx.array]) -> Any:
        return tree_unflatten(list(arrays.items()))

    def arrays(self, tree: Any) -> dict[str, mx.array]:
        return by_name(tree)


class Joined(ByName):
    """Arrays as an optimizer takes them: joined into a few, so that it starts fewer operations."""

    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self._shapes = {name: array.shape for name, array in arrays.items()}
        groups = np.cumsum([array.size for array in arrays.values()]) // _JOINED
        numbered = groupby(zip(arrays, groups, strict=True), itemgetter(1))
        self._groups = [[name for name, _ in group] for _, group in numbered]

    def tree(self, arrays: Mapping[str, mx.array]) -> dict[str, list[mx.array]]:
        return {"joined": [mx.concatenate([arrays[name].reshape(-1) for name in group]) for group in self._groups]}

    def arrays(self, tree: Mapping[str, list[mx.array]]) -> dict[str, mx.array]:
        apart: dict[str, mx.array] = {}
        for names, joined in zip(self._groups, tree["joined"], strict=True):
            shapes = [self._shapes[name] for name in names]
            parts = mx.split(joined, np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist())
            apart |= {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return apart


def layout_for(optimizer: optimizers.Optimizer, weights: Mapping[str, mx.array]) -> ByName:
    """Return how an optimizer takes weights: joined if it treats all alike, they are small, and it is as when made."""
    small = sum(array.size for array in weights.values()) <= _SMALL * len(weights)
    of_one_dtype = len({array.dtype for array in weights.values()}) == 1
    is_new = not any(name.partition(".")[0] in optimizer.state for name in weights)
    is_plain = type(optimizer) in _ELEMENTWISE and not any(map(callable, vars(optimizer).values()))
    if is_plain and small and of_one_dtype and is_new:
        return Joined(weights)
    return ByName()


class OptimizerStep:
    """Adds up the gradient of a step micro-batch by micro-batch, then applies it.

    The loss of a step is a mean over all its pairs, and with ``cpo_alpha`` also over the tokens of all their chosen
    answers. Each micro-batch adds its share of these means, so nothing has to be rescaled at the end.

    Args:
        gradients: computes the gradients of micro-batches.
        max_norm: gradients are scaled down to it; ``None``: they are not.

    Raises:
        ConfigError: the model has no trainable parameters.

    Attributes:
        number: of the current step, from 1.
        total: its gradient so far; ``None`` before the first micro-batch.
        masters: the weights that are updated.
        layout: how the optimizer takes them.
        optimizer_is_whole: whether no failed step may have changed a part of the optimizer's state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        gradients: GradientMethod,
        max_norm: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.gradients = gradients
        self.max_norm = max_norm
        self.number = 1
        self.total: Gradient | None = None
        self.optimizer_is_whole = True
        self._pairs: list[PreferencePair] = []
        self._all_satisfied = True
        self.masters = MasterWeights(model)
        weights = self.masters.weights()
        if not weights:
            raise ConfigError(
                "The model has no trainable parameters; give it an adapter, or unfreeze what is to learn."
            )
        self.layout = layout = layout_for(optimizer, weights)
        # Without this the first two steps would be traced as two different ones.
        optimizer.init(layout.tree(weights))
        changed = [model.state, optimizer.state, self.masters.copies]

        @partial(mx.compile, inputs=changed, outputs=changed)
        def update(gradient: Gradient, scale: mx.array) -> None:
            weights = self.masters.weights()
            slopes = {name: value.astype(weights[name].dtype) for name, value in gradient.items()}
            scaled = tree_map(lambda value: (scale * value).astype(value.dtype), layout.tree(slopes))
            updated = optimizer.apply_gradients(scaled, layout.tree(weights))
            self.masters.set(layout.arrays(updated))

        self._update = update

    def add(
        self, pairs: Sequence[PreferencePair], totals: StepTotals, quantised: bool = False
    ) -> tuple[mx.array, AnswerScores]:
        """Add the gradient of a micro-batch; return the preference losses [B] and the scores of its B pairs.

        Args:
            totals: of the whole step.

        Raises:
            TrainingError: a loss is not finite; nothing was added.
        """
        result = self.gradients(pairs, totals, quantised)
        total = added(self.total, result.gradient)
        mx.eval(result.losses, result.scores, total)
        check_losses(result.losses, pairs, self.number)
        self.total = total  # only now, so that nothing is half done where memory ends
        self._pairs += pairs
        self._all_satisfied &= bool((np.abs(np.array(result.losses)) < _SATISFIED).all())
        return result.losses, result.scores

    def apply(self) -> float:
        """Take the optimizer step over all ranks and return the norm of its gradient, before it was scaled down.

        Raises:
            TrainingError: the gradient is not finite, or would make weights that are not, or the first step changes
                nothing; the weights are as before, the optimizer's state is where :attr:`optimizer_is_whole`.
        """
        weights = self.masters.weights()
        # A rank may have had no pair in the whole step. Ranks exchange arrays by their order, not by their names.
        total = {name: self.total[name] if self.total else mx.zeros_like(value) for name, value in weights.items()}
        if mx.distributed.init().size() > 1:  # ranks have to exchange the same dtypes, too
            total = sum_over_ranks({name: value.astype(weights[name].dtype) for name, value in total.items()})
        norm = gradient_norm(by_name(self.layout.tree(total)))
        check_gradient(norm, self._pairs, self.number)
        before = weights if self.number == 1 else {}
        scale = mx.array(1.0 if self.max_norm is None else min(1.0, self.max_norm / max(norm, 1e-30)))
        self.optimizer_is_whole = False
        try:
            self._update(total, scale)
            mx.eval(self.model.state, self.optimizer.state, self.masters.copies)
            check_weights(self.masters.weights(), self.optimizer, self.number)
            if before:
                after, rate = self.masters.weights(), float(self.optimizer.learning_rate.item())
                check_first_update(before, after, rate, self._all_satisfied)
        except BaseException:
            self.masters.set(weights)
            raise
        self.optimizer_is_whole = True
        self.total, self._pairs = None, []
        self.number += 1
        return norm


def _is_half(value: mx.array) -> bool:
    return value.dtype in HALF_PRECISION


def learning_rates(optimizer: optimizers.Optimizer, steps: Iterable[int]) -> list[float]:
    """Return the learning rate of each step, counted from 0: that of the schedule, if there is one."""
    schedule = getattr(optimizer, "_schedulers", {}).get("learning_rate", lambda _: optimizer.learning_rate)
    return [float(schedule(mx.array(step))) for step in steps]


def in_float32(parameters: dict) -> dict:
    """Return a tree of parameters with those of half precision in float32, for the optimizer's state."""
    return tree_map(lambda value: value.astype(mx.float32) if _is_half(value) else value, parameters)


def bytes_of_copies(model: nn.Module) -> int:
    """Return the size of the float32 copies of :class:`MasterWeights`."""
    return sum(4 * value.size for value in by_name(model.trainable_parameters()).values() if _is_half(value))


def gradient_norm(gradient: Gradient) -> float:
    """Return the Euclidean norm over all parameters, of their gradient or of themselves."""
    squares = [_sum(mx.square(value.astype(mx.float32))) for value in gradient.values()]
    norm: Any = mx.sqrt(mx.stack(squares).sum()).item()
    return float(norm)


def _sum(values: mx.array) -> mx.array:
    """Add up float32 numbers row by row and then in parts: of millions that are added in turn, digits are lost."""
    sums = (values.sum(axis=-1) if values.ndim > 1 else values).reshape(1, -1)
    while sums.size > SUM_PART:
        sums = in_parts(sums, 0).sum(axis=-1)
    return sums.sum()


def check_losses(losses: mx.array, pairs: Sequence[PreferencePair], step: int) -> None:
    """Raise a TrainingError that names the rows before a non-finite loss corrupts the weights."""
    bad = np.flatnonzero(~np.isfinite(np.array(losses))).tolist()
    if bad:
        raise TrainingError(
            f"Step {step}: the loss of {_rows([pairs[number] for number in bad])} is not finite; look at these rows, "
            "lower the learning rate or beta. The weights from before this step are kept."
        )


def check_gradient(norm: float, pairs: Sequence[PreferencePair], step: int) -> None:
    """Raise a TrainingError that names the step's rows before a non-finite gradient corrupts the weights."""
    if not np.isfinite(norm):
        raise TrainingError(
            f"Step {step}: the gradient of {_rows(pairs)} is not finite, though the losses are; lower the learning "
            "rate, set max_grad_norm, or load the model in a wider precision. The weights from before this step are "
            "kept."
        )


def check_weights(weights: Mapping[str, mx.array], optimizer: optimizers.Optimizer, step: int) -> None:
    """Raise a TrainingError where an optimizer has made weights that are not finite of a gradient that is."""
    if np.isfinite(gradient_norm(dict(weights))):  # in a third of the time that a look at each takes
        return
    broken = [name for name, value in weights.items() if not mx.isfinite(value).all()]
    if broken:
        raise TrainingError(
            f"Step {step}: {type(optimizer).__name__} makes {len(broken)} of {len(weights)} weights not finite, "
            f"{broken[0]} for one, though the gradient is; lower the learning rate, or correct optimizer_config, such "
            "as an eps of 0. The weights from before this step are kept."
        )


def check_first_update(
    before: Mapping[str, mx.array], after: Mapping[str, mx.array], learning_rate: float, all_satisfied: bool
) -> None:
    """Raise a TrainingError where no parameter changed, which logs would not show.

    Args:
        before, after: the trainable parameters by name.
        all_satisfied: whether every loss was as good as zero, which leaves nothing to learn.
    """
    if learning_rate == 0 or all_satisfied:
        return
    if all(bool(mx.array_equal(value, after[name]).item()) for name, value in before.items()):
        raise TrainingError(
            f"Step 1: none of {len(before)} trainable parameters changed; check num_layers, lora_parameters (a scale "
            "above 0) and that the learning rate is not too small for the model's precision."
        )


def _rows(pairs: Sequence[PreferencePair]) -> str:
    named = [pair.source or "a row without a source" for pair in pairs[:_NAMED]]
    more = len(pairs) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
