"""A long run: 5,000 steps on a small real model, and what memory and step time do meanwhile.

``python tests/tools/soak.py MODEL DATA [--steps 5000]`` trains through the host's ``run``, prints a line every 500
steps, and ends with exit code 1 where memory at the end is more than 5 % over that of step 500. Time is that of the
processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

import mlx_cpo_plugin

EVERY = 500
ALLOWED_GROWTH = 0.05


def resident() -> int:
    """Return the bytes of this process that are in main memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


class Watch:
    """A training callback that keeps memory and time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: dict[int, tuple[int, int]] = {}
        self.last = time.process_time()

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        now, step = time.process_time(), info["iteration"]
        self.seconds.append(now - self.last)
        self.last = now
        if step % EVERY == 0:
            self.memory[step] = (mx.get_active_memory(), resident())
            active, whole = (size / 1e6 for size in self.memory[step])
            milliseconds = 1000 * median(self.seconds[-EVERY:])
            line = f"\nsoak: step {step}: {milliseconds:.1f} ms, {active:.2f} MB of arrays, {whole:.0f} MB in all"
            print(line, flush=True)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.last = time.process_time()


def main() -> int:
    """Train, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    watch = Watch()
    mlx_cpo_plugin.activate()
    from mlx_lm_lora.train import run

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": str(arguments.model),
            "data": str(arguments.data),
            "train": True,
            "train_mode": "cpo",
            "adapter_path": folder,
            "iters": arguments.steps,
            "batch_size": 2,
            "beta": 0.05,
            "learning_rate": 1e-5,
            "max_seq_length": 128,
            "steps_per_report": 1,
            "steps_per_eval": 1000,
            "save_every": 250,
            "val_batches": 4,
            "fuse": False,
        }
        run(SimpleNamespace(**settings), watch)
    first, last = watch.memory[EVERY], watch.memory[max(watch.memory)]
    growth = [end / start - 1 for start, end in zip(first, last, strict=True)]
    early, late = (median(part) for part in (watch.seconds[EVERY : 2 * EVERY], watch.seconds[-EVERY:]))
    print(f"soak: arrays {growth[0]:+.1%}, process {growth[1]:+.1%}, a step {late / early - 1:+.1%}")
    return int(max(growth) > ALLOWED_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
