"""Warns before a micro-batch for which memory may not suffice: on a CPU, the process would end without a word."""

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


class MemoryWatch:
    """Compares micro-batches with the memory that is free."""

    def __init__(self, model: nn.Module, way: Way) -> None:
        self.sizes = ModelSizes(model, way)
        self.way = way
        self._most_tried = 0

    def risk(self, pairs: Sequence[PreferencePair], step: int) -> str | None:
        """Return what to say before a micro-batch that may need more than is free, and more than any one before it.

        Raises:
            TrainingError: the gradient alone, which is there as a whole in the end, needs more than is free.
        """
        free = free_memory()
        if free is None:
            return None
        free += mx.get_cache_memory()  # what MLX has kept of arrays that are gone
        longest = max(pairs, key=lambda pair: pair.tokens).source or "a row without a source"
        if self.sizes.gradient > free:
            raise TrainingError(
                f"Step {step}: the gradient alone needs {self.sizes.gradient / 1e9:.2f} GB, but {free / 1e9:.2f} GB "
                "are free; train fewer parameters (train_type: lora, lower num_layers or rank) or free memory."
            )
        needed = bytes_for(self.sizes, pairs, self.way)
        if needed <= max(free, self._most_tried):
            return None
        self._most_tried = needed
        return (
            f"Step {step}: the micro-batch with {longest} may need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} "
            f"GB are free; if the process ends here without a word, {LOWER_THESE}."
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
