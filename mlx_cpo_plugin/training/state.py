"""Everything that a run needs to go on from where it was, to the bit, as arrays and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.checkpoints.adapter import describe_adapter
from mlx_cpo_plugin.checkpoints.folder import Checkpoint, CheckpointFolder, folder_of_rank
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep

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
        "run_identity",
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
        # The files may be put aside before anything is computed with them.
        mx.eval(self.model.trainable_parameters(), self.step.optimizer.state, self.step.total or {})


class RunCheckpoints:
    """Saves a run's state below its adapter folder.

    Each rank has a folder of its own, since gradient, sums and random numbers differ.

    Args:
        adapter_folder: where the run leaves its adapter.
        run: which run it is.
        keep: checkpoints to keep; of several ranks, two at least.
        last_step_start: the iteration before the run's last optimizer step; the checkpoint after it is kept besides.
        constants: what every checkpoint holds besides the state, by key.
    """

    def __init__(
        self, adapter_folder: Path, run: RunIdentity, keep: int, last_step_start: int, constants: Mapping[str, Any]
    ) -> None:
        # A rank may die before it has written what the others have: the one before is what all of them have.
        keep = max(keep, 2) if mx.distributed.init().size() > 1 else keep
        self.folder = CheckpointFolder(folder_of_rank(adapter_folder), run.id, keep, last_step_start)
        self.constants = {"run": run.plain(), "last_step_start": last_step_start, **constants}

    def save(self, state: TrainingState, files: Mapping[str, Path] | None = None) -> Path:
        """Write everything; see :meth:`CheckpointFolder.save`."""
        return self.folder.save(state.iteration, state.arrays(), {**self.constants, **state.values()}, files)


def can_go_on(values: Mapping[str, Any], iters: int, last_step_start: int) -> bool:
    """Return whether a run of ``iters`` iterations can go on from a checkpoint, given its values.

    The last optimizer step of a run may hold fewer micro-batches than the others, and their gradients weigh more from
    its beginning. With other ``iters`` it is another step, so the run goes on from before it; or it is over already.
    """
    same_plan: bool = values["iters"] == iters
    return (
        same_plan
        or values["iteration"] <= min(values["last_step_start"], last_step_start)
        or (bool(values["iteration"] >= iters))
    )


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
        "data": data_digest(pairs),
        "tokenizer": getattr(pairs, "tokenizer", ""),
        "optimizer": _optimizer_description(optimizer),
        "ranks": mx.distributed.init().size(),
    }


def check_identity(saved: Mapping[str, Any], present: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to go on with something else than what was begun.

    Raises:
        ConfigError: names the keys that differ.
    """
    differing = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    # What counts is the tokens; if they differ, the tokenizer may be why.
    if "tokenizer" in differing and ("data" not in differing or not saved.get("tokenizer")):
        differing.remove("tokenizer")
    if not differing:
        return
    in_words = {"model": "model", "data": "data", "optimizer": "optimizer", "tokenizer": "tokenizer or chat template"}
    told = ", ".join(in_words.get(key, f"{key} (was {saved.get(key)}, is {present.get(key)})") for key in differing)
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


def data_digest(pairs: Iterable[PreferencePair]) -> str:
    """Return what tells pairs from others, by their tokens and masks."""
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
