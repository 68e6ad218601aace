"""What one measured process is told and what it answers, as files in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair

HOST = "mlx-lm-lora"
PLUGIN = "mlx-cpo-plugin"
# No trainer: computes the gradient that the two are compared with.
REFERENCE = "float64"

# What a line of a process's output begins with that tells the number of finished iterations; REFERENCE counts pairs.
PROGRESS_MARK = "finished iteration "

_PARTS = ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored")


@dataclass(frozen=True)
class Job:
    """What one process has to do.

    Attributes:
        trainer: :data:`HOST`, :data:`PLUGIN` or :data:`REFERENCE`.
        task: ``time`` measures seconds and memory; ``count`` counts work and keeps the first gradient; ``gradient``,
            for :data:`REFERENCE`, computes the gradient of the first batch.
        settings: every resolved setting by name.
        model_config: as in :class:`mlx_cpo_plugin.bench.cases.Case`.
        batches: indices of the pairs of each iteration.
        pairs_file: written by :func:`save_pairs`.
    """

    trainer: str
    task: str
    settings: Mapping[str, Any]
    model_config: Mapping[str, Any] | None
    batches: Sequence[Sequence[int]]
    pairs_file: str

    def save(self, folder: Path) -> None:
        """Write the job into ``folder``, where its results will be written as well."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads((folder / "job.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Measurement:
    """What one process found.

    Attributes:
        seconds: of each iteration, from its trainer's own report.
        processor_seconds: of each iteration, summed over cores.
        scored_tokens: of each iteration, from its trainer's own report.
        peak_memory: peak bytes allocated by MLX, the model included.
        peak_resident: peak resident bytes of the process.
        backbone_tokens, head_positions: work of the second iteration; ``None`` unless counted.
        weights: weights of the layers' matrices; ``None`` if a token does not pass through all of them.
        head_weights: vocabulary times hidden size.
        patches: what mlx-lm-lora needed in order to run here, one sentence each.
    """

    seconds: list[float]
    processor_seconds: list[float]
    scored_tokens: list[int]
    peak_memory: int
    peak_resident: int
    weights: int | None
    head_weights: int | None
    patches: list[str]
    backbone_tokens: int | None = None
    head_positions: float | None = None

    def save(self, folder: Path) -> None:
        """Write the results into the folder of their job."""
        (folder / "measurement.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Measurement:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads((folder / "measurement.json").read_text(encoding="utf-8")))


def gradient_file(folder: Path) -> Path:
    """Where a process leaves the gradient of the first batch, float32 by parameter name; those that time have none."""
    return folder / "gradient.safetensors"


def save_pairs(file: Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs into one ``.npz`` file: tokens end to end, with the length of each part of each pair."""
    arrays = {part: np.concatenate([getattr(pair, part) for pair in pairs]) for part in _PARTS}
    lengths = {f"{part}_lengths": np.array([len(getattr(pair, part)) for pair in pairs]) for part in _PARTS}
    np.savez(file, **(arrays | lengths))  # type: ignore[arg-type]  # no array is called allow_pickle


def load_pairs(file: Path) -> list[PreferencePair]:
    """Read what :func:`save_pairs` wrote."""
    with np.load(file) as stored:
        columns = [np.split(stored[part], np.cumsum(stored[f"{part}_lengths"])[:-1]) for part in _PARTS]
    return [PreferencePair(*parts) for parts in zip(*columns, strict=True)]
