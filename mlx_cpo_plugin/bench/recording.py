"""What every measured process needs, whoever trains in it: a clock for its steps, and its memory.

Only the standard library is imported, as other trainers' Pythons run this, too.
"""

from __future__ import annotations

import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

# What a line of a process's output begins with that tells the number of finished iterations; REFERENCE counts pairs.
PROGRESS_MARK = "finished iteration "


class StepClock:
    """Keeps time from its making on, and tells each step that ends."""

    def __init__(self) -> None:
        self._stamps = [(time.perf_counter(), time.process_time())]

    def step(self) -> None:
        """Take note of a step's end."""
        self._stamps.append((time.perf_counter(), time.process_time()))
        tell_progress(len(self._stamps) - 1)

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [end[0] - start[0] for start, end in pairwise(self._stamps)]

    @property
    def processor_seconds(self) -> list[float]:
        """Of each step, summed over cores."""
        return [end[1] - start[1] for start, end in pairwise(self._stamps)]


def tell_progress(finished: int) -> None:
    """Let the process that waits for this one know how many iterations, or pairs, are done."""
    print(f"\n{PROGRESS_MARK}{finished}", flush=True)


def peak_resident() -> int:
    """Return the bytes that this process had in main memory at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # The kernel's own figure: that of getrusage starts from what the parent process had.
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
