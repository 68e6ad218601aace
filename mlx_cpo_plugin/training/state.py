"""Everything that a run needs to continue from where it was, to the bit, as arrays and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.checkpoints.folder import Checkpoint
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
from mlx_cpo_plugin.types import Values


class Resumable:
    """A part of a run whose attributes named in ``remembered``, plain values or Resumables, go into checkpoints."""

    remembered: ClassVar[tuple[str, ...]]

    def state(self) -> Values:
        """Return these attributes as plain values."""
        values = {name: getattr(self, name) for name in self.remembered}
        return {name: value.state() if isinstance(value, Resumable) else copy(value) for name, value in values.items()}

    def restore(self, state: Values) -> None:
        """Set these attributes to what :meth:`state` returned."""
        for name in self.remembered:
            part = getattr(self, name)
            if isinstance(part, Resumable):
                part.restore(state[name])
            else:
                setattr(self, name, copy(state[name]))


class TrainingState:
    """What training changes: weights, optimizer, the gradient so far, the random generator, and the resumable parts.

    Attributes:
        iteration: of the last complete micro-batch.
    """

    def __init__(self, model: nn.Module, step: OptimizerStep, parts: Mapping[str, Resumable]) -> None:
        self.model, self.step, self.parts, self.iteration = model, step, parts, 0
        self._before: tuple[dict[str, mx.array], Values] | None = None

    @contextmanager
    def computing(self, iteration: int) -> Iterator[None]:
        """Compute an iteration inside; until it is complete, arrays and values are those from before it."""
        self._before = dict(self.step.total or {}), self.values()
        yield
        self.iteration, self._before = iteration, None

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """Return the arrays by file and name."""
        return {
            "adapters": self.step.masters.weights(),
            "optimizer": by_name(self.step.optimizer.state),
            "gradient": dict(self.step.total or {}) if self._before is None else self._before[0],
        }

    def values(self) -> Values:
        """Return the plain values by name."""
        if self._before is not None:
            return self._before[1]
        return {
            "iteration": self.iteration,
            "optimizer_step": self.step.number,
            "random_seed": random_seed(),
            **{name: part.state() for name, part in self.parts.items()},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything from a checkpoint of a run that has the same parameters and parts.

        Raises:
            ConfigError: another version of the plugin wrote it.
        """
        values = checkpoint.values
        try:
            for name, part in self.parts.items():
                part.restore(values[name])
            _update_in_place(self.step.optimizer.state, tree_unflatten(list(checkpoint.arrays("optimizer").items())))
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"The checkpoint {checkpoint.folder} was written by another version of mlx-cpo-plugin; continue with "
                "that version, or start anew with another adapter_path, from its weights with resume_adapter_file.",
                key="resume",
                place=str(checkpoint.folder),
            ) from error
        self.iteration, self.step.number = values["iteration"], values["optimizer_step"]
        self.step.masters.set(checkpoint.arrays("adapters"))
        self.step.total = checkpoint.arrays("gradient") or None
        mx.random.seed(values["random_seed"])
        # The files may be moved before anything is computed with them.
        mx.eval(self.model.trainable_parameters(), self.step.optimizer.state, self.step.total or {})


def can_resume(values: Values, iters: int, extends_from: int) -> bool:
    """Return whether a run of ``iters`` iterations can continue from a checkpoint with these values.

    The last optimizer step of a run may hold fewer micro-batches than the others, whose gradients then weigh more. With
    other ``iters`` it is another step, so the run continues from before it, unless it is over already.

    Args:
        extends_from: up to where the run does what one with more iterations does.
    """
    iteration: int = values["iteration"]
    return values["iters"] == iters or iteration >= iters or iteration <= min(values["extends_from"], extends_from)


def random_seed() -> int:
    """Return the seed with which MLX's generator would be in its present state."""
    state: Any = mx.random.state  # a list of one key of two words
    high, low = (int(word) for word in np.array(state[0]))
    return high << 32 | low


def _update_in_place(old: Any, new: Any) -> None:
    """Copy the arrays of one tree into another, whose containers a compiled step may hold."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        if isinstance(value, dict | list) and value and isinstance(old[key], dict | list):
            _update_in_place(old[key], value)
        elif not isinstance(value, dict | list):
            old[key] = value
