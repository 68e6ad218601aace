"""A run of a tiny model through the trainer, here or in a process of its own that is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.selftest.models import build_model, build_pairs
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo

ITERATIONS, SAVED_EVERY, KILLED_AT = 8, 3, 5
CHILD_SECONDS = 300


class _Reports:
    """A training callback that passes on what is reported of training."""

    def __init__(self, tell: Callable[[dict[str, Any]], object]) -> None:
        self.on_train_loss_report = tell

    def on_val_loss_report(self, info: Mapping[str, Any]) -> None:
        """Nothing is validated."""


def train(folder: Path, *, callback: Callable[[dict[str, Any]], object], resume: bool = False) -> None:
    """Train :data:`ITERATIONS` micro-batches, two of which make a step, and leave the adapter in ``folder``."""
    model = build_model()
    args = CPOTrainingArgs(
        batch_size=2,
        iters=ITERATIONS,
        gradient_accumulation_steps=2,
        steps_per_report=1,
        steps_per_save=SAVED_EVERY,
        adapter_file=str(folder / ADAPTER_FILE),
        resume="auto" if resume else None,
    )
    mx.random.seed(0)
    train_cpo(
        model, optimizers.Adam(learning_rate=1e-3), build_pairs(), None, args, training_callback=_Reports(callback)
    )


def run_in_child(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> list[dict[str, Any]]:
    """Train in a process of its own, which kills itself as it reports iteration ``kill_at``; return what it reports.

    Raises:
        UserError: it ended otherwise than it should; tells its last line.
    """
    call = f"main({str(folder)!r}, {kill_at}, {resume})"
    child = subprocess.run(
        [sys.executable, "-c", f"from mlx_cpo_plugin.selftest.tiny_run import main; {call}"],
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    lines = (child.stderr + child.stdout).strip().splitlines()
    if child.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise UserError(f"the run ended with code {child.returncode}: {lines[-1] if lines else 'it printed nothing'}")
    reports: list[dict[str, Any]] = json.loads(lines[-1]) if kill_at is None else []
    return reports


def main(folder: str, kill_at: int | None, resume: bool) -> None:
    """Train, as :func:`run_in_child` says, and print what was reported as a last line of JSON."""
    reports: list[dict[str, Any]] = []

    def take(info: dict[str, Any]) -> None:
        reports.append(info)
        if info["iteration"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(Path(folder), callback=take, resume=resume)
    print(json.dumps(reports))
