"""Trains one run again and again, killed by SIGKILL at chosen moments and resumed, each time in a process of its own.

Started by tests as ``python killed_runs.py FOLDER KILLS``. A moment is a number of Python function calls, so a run can
end anywhere: in a gradient, between two files of a checkpoint, before a rename. Processes are forked before MLX has
computed anything, since its threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["MLX_DISABLE_COMPILE"] = "1"

import mlx.core as mx
import mlx.optimizers as optimizers
from conftest import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo

SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 3,
    "iters": 14,
    "steps_per_report": 4,
    "steps_per_eval": 5,
    "steps_per_save": 1,
    "beta": 0.5,
    "loss_type": "ipo",
    "save_best": "margin",
    "max_grad_norm": 20.0,
    "resume": "auto",
}


def train(folder: Path) -> None:
    """Train to the end, from wherever the last checkpoint in ``folder`` is."""
    model = add_adapter(build_model(), dropout=0.2)
    mx.random.seed(7)
    schedule = optimizers.cosine_decay(1e-2, 6)
    settings = CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), **SETTINGS)
    pairs = build_pairs(11, longest=12)
    train_cpo(model, optimizers.AdamW(learning_rate=schedule), pairs, build_pairs(3, seed=9, longest=12), settings)


def in_a_process(work: Callable[[], None]) -> int:
    """Do ``work`` in a process of its own, and return the number of the signal that ended it, or 0."""
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    work()
    os._exit(0)


def killed_at(moment: int, folder: Path) -> None:
    """Train, and be killed at the given function call."""
    calls = count(1)

    def at_each_call(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(at_each_call)
    train(folder)


def calls_of_a_whole_run(folder: Path) -> int:
    """Return how many function calls a run has that is not killed."""
    reader, writer = os.pipe()

    def counted() -> None:
        calls = count()

        def at_each_call(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                next(calls)

        sys.setprofile(at_each_call)
        train(folder)
        sys.setprofile(None)
        os.write(writer, str(next(calls)).encode())

    in_a_process(counted)
    return int(os.read(reader, 100))


def main() -> None:
    """Kill a run so many times, beginning anew whenever it got to its end, and print what came of it."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    whole = calls_of_a_whole_run(folder / "whole")
    moments = random.Random(0)
    killed, finished = 0, []
    for number in count():
        run = folder / f"killed{number}"
        # Most runs are killed several times on their way.
        while in_a_process(partial(killed_at, moments.randrange(1, whole), run)) == signal.SIGKILL:
            killed += 1
        finished.append(run.name)
        if killed >= kills:
            break
    print(json.dumps({"calls": whole, "killed": killed, "finished": finished}))


if __name__ == "__main__":
    main()
