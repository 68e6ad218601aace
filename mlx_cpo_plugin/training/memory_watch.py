"""Stops a run before a micro-batch for which there is no memory: on a CPU, the process would end without a word."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.training.alarms import LOWER_THESE, TrainingError
from mlx_cpo_plugin.training.memory_estimate import ModelSizes, Way, bytes_for

# Share of an estimate that a micro-batch takes at least, as estimates go: what has less than that cannot be computed.
CERTAIN_SHARE = 0.7


class MemoryWatch:
    """Compares micro-batches with the memory that is free."""

    def __init__(self, model: nn.Module, way: Way) -> None:
        self.sizes = ModelSizes(model, way)
        self.way = way

    def check(self, pairs: Sequence[PreferencePair], step: int) -> None:
        """Stop before a micro-batch that cannot be computed.

        Raises:
            TrainingError: says what is needed, what is free, and which settings to lower.
        """
        free = free_memory()
        if free is None:
            return
        needed = bytes_for(self.sizes, pairs, self.way)
        if CERTAIN_SHARE * needed > free:
            longest = max(pairs, key=lambda pair: pair.tokens)
            raise TrainingError(
                f"Step {step}: the micro-batch with {longest.source or 'a row without a source'} needs about "
                f"{needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; {LOWER_THESE}"
            )


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still have, swap space included; ``None`` where that is not known.

    That is everywhere but on Linux, and wherever MLX computes on a GPU, which says so itself when memory is at an end.

    Args:
        root: of the file system.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    try:
        machine = _table(root / "proc/meminfo")
        free = 1024 * (machine["MemAvailable"] + machine["SwapFree"])
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([free, *_free_by_limits(root)]))


def _free_by_limits(root: Path) -> list[int]:
    """Return what the limits of the process and of its container leave."""
    free = []
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY:
        pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
        free.append(allowed - pages * os.sysconf("SC_PAGESIZE"))
    container = root / "sys/fs/cgroup"
    try:
        most = int((container / "memory.max").read_text(encoding="ascii"))
        # What files take can be had back.
        free.append(most - _table(container / "memory.stat")["anon"])
    except (OSError, KeyError, ValueError):
        pass  # there is no container, or none with a limit
    return free


def _table(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
