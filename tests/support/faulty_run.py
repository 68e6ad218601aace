"""One run of the command in which the machine takes something away after a chosen iteration.

``python -m support.faulty_run FAULT ITERATION ADAPTER_PATH CONFIG`` ends with the command's exit code, too.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.cli import main as command
from mlx_cpo_plugin.training.reporting import ProgressReporter

# Bytes that still can be had after memory has run out: less than the longest row needs.
LEFT = 8 * 2**20


def limit(kind: int, size: int) -> None:
    """Let this process have no more than ``size`` bytes of something."""
    resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))


def out_of_memory(folder: Path) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + LEFT)


def disk_full_for_a_checkpoint(folder: Path) -> None:
    limit(resource.RLIMIT_FSIZE, (folder / "adapters.safetensors").stat().st_size - 1)


def disk_full_for_a_line(folder: Path) -> None:
    limit(resource.RLIMIT_FSIZE, (folder / "metrics.jsonl").stat().st_size)


def read_only(folder: Path) -> None:
    for path in (folder, folder / "checkpoints"):
        path.chmod(0o555)


FAULTS = {
    fault.__name__: fault for fault in (out_of_memory, disk_full_for_a_checkpoint, disk_full_for_a_line, read_only)
}


def main(fault: str, iteration: str, folder: str, config: str) -> int:
    """Run the command on a configuration, and return its exit code."""
    report_training = ProgressReporter.report_training

    def report_then_harm(self: ProgressReporter, at: int, *arguments: Any) -> None:
        report_training(self, at, *arguments)
        if at == int(iteration):
            FAULTS[fault](Path(folder))

    ProgressReporter.report_training = report_then_harm  # type: ignore[method-assign]  # the fault
    return command(["train", "--config", config])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
