"""Runs with dropout and accumulation that are stopped, gone on with and compared to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import StoppedError
from mlx_cpo_plugin.training import held_out
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo
from support.tiny import add_adapter, build_model, build_pairs


class StopAt:
    """A training callback that sends this process a signal at a report."""

    def __init__(self, iteration: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.iteration, self.number = iteration, number

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] == self.iteration:
            os.kill(os.getpid(), self.number)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


def policy(**adapter: Any) -> nn.Module:
    """A small model with an adapter."""
    return add_adapter(build_model(num_hidden_layers=1), dropout=0.2, **adapter)


def train(
    folder: Path,
    pairs: list[PreferencePair] | None = None,
    model: nn.Module | None = None,
    optimizer: optimizers.Optimizer | None = None,
    callback: Any = None,
    val_pairs: list[PreferencePair] | None = None,
    **arguments: Any,
) -> dict[str, np.ndarray]:
    """Train with dropout and accumulation, and return the adapter that is left on disk."""
    model = model or policy()
    mx.random.seed(7)
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
        "iters": 10,
        "steps_per_report": 1,
        "steps_per_save": 2,
        "seed": 0,
        "adapter_file": str(folder / "adapters.safetensors"),
        "loss_type": "ipo",
        "beta": 0.5,
        "cpo_alpha": 0.5,
    }
    settings |= arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "ROWS", 2)  # scoring more of them takes as long as training
        train_cpo(
            model,
            optimizer or optimizers.AdamW(learning_rate=1e-2),
            pairs or build_pairs(11),
            val_pairs,
            args=CPOTrainingArgs(**settings),
            training_callback=callback,
        )
    return adapter_in(folder)


def adapter_in(folder: Path) -> dict[str, np.ndarray]:
    """The final adapter of a run."""
    return {name: np.array(value) for name, value in mx.load(str(folder / "adapters.safetensors")).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What the metrics file says, without what a clock says."""
    clocks = ("run", "time", "iterations_per_second", "tokens_per_second", "val_time", "peak_memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints of a run."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def stopped(folder: Path, iteration: int, number: signal.Signals = signal.SIGTERM, **arguments: Any) -> StoppedError:
    """Train until a signal at an iteration, and return what the run says."""
    with pytest.raises(StoppedError) as caught:
        train(folder, callback=StopAt(iteration, number), **arguments)
    return caught.value


def cut_short(checkpoint: Path) -> None:
    """Tear a file of a checkpoint."""
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
