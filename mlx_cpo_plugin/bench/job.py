"""What one measured process is told and what it answers, as files in a folder.

Only the standard library is imported, as other trainers' Pythons read and write these files, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOST = "mlx-lm-lora"
PLUGIN = "mlx-cpo-plugin"
TRL = "TRL"
UNSLOTH = "unsloth-zoo"
# No trainer: computes the gradient that the two are compared with.
REFERENCE = "float64"

# Tasks, each the first word of what a process is said to do.
COUNT, TIME, EPOCH = "count", "time", "epoch"


@dataclass(frozen=True)
class Job:
    """What one process has to do.

    Attributes:
        trainer: :data:`HOST`, :data:`PLUGIN`, :data:`TRL`, :data:`UNSLOTH` or :data:`REFERENCE`.
        task: ``time`` measures seconds and memory on given batches, ``epoch`` on those that the trainer draws itself;
            ``count`` counts work and keeps the first gradient; ``gradient``, for :data:`REFERENCE`, computes the
            gradient of the first batch.
        settings: every resolved setting by name.
        model_config: as in :class:`mlx_cpo_plugin.bench.cases.Case`.
        batches: indices of the pairs of each iteration.
        pairs_file: written by :func:`mlx_cpo_plugin.bench.cases.save_pairs`.
        rows: for trainers that read no pairs: ``prompt``, ``chosen`` and ``rejected``, text or messages, in order.
    """

    trainer: str
    task: str
    settings: Mapping[str, Any]
    model_config: Mapping[str, Any] | None
    batches: Sequence[Sequence[int]]
    pairs_file: str
    rows: Sequence[Mapping[str, Any]] = ()

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
        scored_tokens: of each iteration.
        peak_memory: peak bytes allocated by MLX, the model included; ``None`` on torch, which does not tell it.
        peak_resident: peak resident bytes of the process.
        backbone_tokens, head_positions: work of the second iteration; ``None`` unless counted.
        weights: weights of the layers' matrices; ``None`` if a token does not pass through all of them.
        head_weights: vocabulary times hidden size.
        patches: what mlx-lm-lora needed in order to run here, one sentence each.
        losses: of each iteration.
        blas: name of the library that multiplies matrices; empty where that cannot be told.
        dtype: of the weights, those of adapters aside.
        row_tokens: both sides of each row, for trainers that tokenise themselves, as in
            :func:`mlx_cpo_plugin.bench.host_trainer.host_row`.
    """

    seconds: list[float]
    processor_seconds: list[float]
    scored_tokens: list[int]
    peak_memory: int | None
    peak_resident: int
    weights: int | None = None
    head_weights: int | None = None
    patches: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    blas: str = ""
    dtype: str = ""
    row_tokens: list[dict[str, Any]] | None = None
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
