"""Everything that a run needs to go on from where it was, to the bit, as arrays and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.checkpoints.adapter import describe_adapter, write_atomically
from mlx_cpo_plugin.checkpoints.folder import Checkpoint, CheckpointFolder, read_checkpoint
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.exchange import of_all_ranks
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep

AUTO = "auto"
CHECKPOINTS = "checkpoints"
STARTED = "started.json"

# What a resumed run may change: none of these has a part in the weights that come out.
FREE_TO_CHANGE = frozenset(
    {
        "iters",
        "val_batches",
        "steps_per_report",
        "steps_per_eval",
        "steps_per_save",
        "adapter_file",
        "reference_model_path",
        "max_seq_length",  # the data say it
        "loss_options",  # one by one instead
        "resume",
        "keep_checkpoints",
        "save_best",
        "early_stopping_patience",
        "run_settings",
    }
)
# Steps at which a schedule of learning rates is looked at.
_SCHEDULE_STEPS = (0, 1, 10, 100, 1000, 10_000)
_SAMPLED = 32


class Stateful(Protocol):
    """A part of a run that remembers something."""

    def state(self) -> dict[str, Any]:
        """Return it as plain values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""


class TrainingState:
    """What training changes: the weights, the optimizer, the gradient so far, the random generator, and the parts.

    Attributes:
        iteration: micro-batches that are done.
    """

    def __init__(self, model: nn.Module, step: OptimizerStep, parts: Mapping[str, Stateful]) -> None:
        self.model = model
        self.step = step
        self.parts = parts
        self.iteration = 0

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """Return the arrays by file and name."""
        return {
            "adapters": self.step.masters.weights(),
            "optimizer": by_name(self.step.optimizer.state),
            "gradient": dict(self.step.total or {}),
        }

    def values(self) -> dict[str, Any]:
        """Return the plain values by name."""
        return {
            "iteration": self.iteration,
            "optimizer_step": self.step.number,
            "random_seed": random_seed(),
            **{name: part.state() for name, part in self.parts.items()},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over everything from a checkpoint of a run that has the same parameters and parts."""
        values = checkpoint.values
        self.iteration, self.step.number = values["iteration"], values["optimizer_step"]
        self.step.masters.set(checkpoint.arrays("adapters"))
        _update_in_place(self.step.optimizer.state, tree_unflatten(list(checkpoint.arrays("optimizer").items())))
        self.step.total = checkpoint.arrays("gradient") or None
        for name, part in self.parts.items():
            part.restore(values[name])
        mx.random.seed(values["random_seed"])


class RunCheckpoints:
    """Saves a run's state into its adapter folder, and finds the one to go on from.

    Each rank has a folder of its own, since gradient, sums and random numbers differ.

    Args:
        adapter_folder: where the run leaves its adapter.
        keep: checkpoints to keep; of several ranks, two at least.
        identity: see :func:`identity`.
    """

    def __init__(self, adapter_folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        # A rank may die before it has written what the others have: the one before is what all of them have.
        keep = max(keep, 2) if mx.distributed.init().size() > 1 else keep
        self.folder = CheckpointFolder(_folder_of_rank(adapter_folder), keep)
        self.identity = identity

    def begin(self, state: TrainingState) -> None:
        """Write down how things were before the first micro-batch, for a run that ends before its first checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        parts = json.dumps({name: part.state() for name, part in state.parts.items()})
        write_atomically(self.folder.folder / STARTED, lambda partial: partial.write_text(parts, encoding="utf-8"))

    def save(self, state: TrainingState) -> Path:
        """Write everything; see :meth:`CheckpointFolder.save`."""
        return self.folder.save(state.iteration, state.arrays(), {"identity": self.identity, **state.values()})

    def resume(self, wanted: str, state: TrainingState, say: Callable[[str], None]) -> None:
        """Restore ``state`` from the newest whole checkpoint, if there is one.

        Args:
            wanted: ``auto``, or another run's adapter folder, or one of its checkpoints.

        Raises:
            ConfigError: the folder has no checkpoint, or that of a run with other settings.
        """
        checkpoint = self._wanted_checkpoint(wanted, say)
        if checkpoint is None:
            if wanted == AUTO:
                self._forget(state)
                say(f"There is no checkpoint in {self.folder.folder} to resume; training from the beginning.")
                return
            raise ConfigError(f"resume is {wanted!r}, but there is no whole checkpoint in it; give another, or auto.")
        check_identity(checkpoint.values.get("identity", {}), self.identity, checkpoint)
        state.restore(checkpoint)
        say(f"Resuming after iteration {state.iteration} from {checkpoint.folder}.")

    def _forget(self, state: TrainingState) -> None:
        """Take back what a run has told that ended before its first checkpoint."""
        try:
            started = json.loads((self.folder.folder / STARTED).read_text(encoding="utf-8"))
            for name, part in state.parts.items():
                part.restore(started[name])
        except (OSError, ValueError, TypeError, KeyError):
            return  # there was none, or it ended while it wrote this: it had told nothing yet

    def _wanted_checkpoint(self, wanted: str, say: Callable[[str], None]) -> Checkpoint | None:
        if wanted != AUTO and Path(wanted).name.isdecimal():
            return read_checkpoint(Path(wanted))
        folder = self.folder if wanted == AUTO else CheckpointFolder(_folder_of_rank(Path(wanted)), keep=1)
        return _newest_of_all_ranks(folder, say)


def _folder_of_rank(adapter_folder: Path) -> Path:
    rank = mx.distributed.init().rank()
    return adapter_folder / (CHECKPOINTS if rank == 0 else f"{CHECKPOINTS}-rank-{rank}")


def _newest_of_all_ranks(folder: CheckpointFolder, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that every rank has whole."""
    at_most: int | None = None
    while True:
        checkpoint = folder.newest(say, at_most)
        iterations = of_all_ranks(-1 if checkpoint is None else checkpoint.iteration)
        at_most = min(iterations)
        if at_most < 0:
            return None
        if at_most == max(iterations):
            return checkpoint


def random_seed() -> int:
    """Return the seed with which MLX's generator would be in its present state."""
    state: Any = mx.random.state  # a list of one key of two words
    high, low = (int(word) for word in np.array(state[0]))
    return high << 32 | low


def _update_in_place(old: Any, new: Any) -> None:
    """Put the arrays of one tree into another, whose own containers a compiled step may hold."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        if isinstance(value, dict | list) and value and isinstance(old[key], dict | list):
            _update_in_place(old[key], value)
        elif not isinstance(value, dict | list):
            old[key] = value


def identity(
    args: Any, model: nn.Module, optimizer: optimizers.Optimizer, pairs: Sequence[PreferencePair]
) -> dict[str, Any]:
    """Return what a run is made of, as plain values by key: all that has a part in the weights that come out."""
    settings = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in FREE_TO_CHANGE}
    settings |= {f"loss option {name}": value for name, value in args.loss_options.items() if name not in settings}
    adapter = describe_adapter(model)
    return {
        **{name: value if _is_plain(value) or value is None else repr(value) for name, value in settings.items()},
        "train_type": adapter["fine_tune_type"],
        "lora_parameters": repr(adapter["lora_parameters"]),
        "model": _model_digest(model),
        "data": _data_digest(pairs),
        "optimizer": _optimizer_description(optimizer),
        "ranks": mx.distributed.init().size(),
    }


def check_identity(saved: Mapping[str, Any], present: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to go on with something else than what was begun.

    Raises:
        ConfigError: names the keys that differ.
    """
    differing = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    if not differing:
        return
    told = ", ".join(
        f"{key} (was {saved.get(key)}, is {present.get(key)})" if key not in ("model", "data", "optimizer") else key
        for key in differing
    )
    raise ConfigError(
        f"The run in {checkpoint.folder} cannot be resumed with other settings: {told}; set them back, or start anew "
        "with another adapter_path, from its weights with resume_adapter_file."
    )


def _model_digest(model: nn.Module) -> str:
    """Digest the names, shapes and dtypes of the frozen parameters, and some numbers of each."""
    trainable = set(by_name(model.trainable_parameters()))
    digest = hashlib.sha256()
    for name, value in sorted(by_name(model.parameters()).items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        if name not in trainable and value.size:
            step = max(1, value.size // _SAMPLED)
            digest.update(np.array(value.reshape(-1)[::step][:_SAMPLED].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def _data_digest(pairs: Iterable[PreferencePair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected, pair.chosen_scored, pair.rejected_scored):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def _optimizer_description(optimizer: optimizers.Optimizer) -> str:
    """Return the class, its numbers, and its learning rate, or where there is a schedule some of its values."""
    numbers = {key: value for key, value in sorted(vars(optimizer).items()) if _is_plain(value) and key[0] != "_"}
    schedule = getattr(optimizer, "_schedulers", {}).get("learning_rate")
    rates = (
        [float(schedule(mx.array(step))) for step in _SCHEDULE_STEPS] if schedule else [float(optimizer.learning_rate)]
    )
    return f"{type(optimizer).__name__} {numbers} {rates}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | list)
