"""Metrics on disk: one line of valid JSON a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.metrics import MetricsFile


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_every_report_is_a_line_of_valid_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "adapters" / "metrics.jsonl")

    file.append("train", {"iteration": 10, "train_loss": 0.5})
    file.append("train", {"iteration": 20, "train_loss": math.nan, "train_margins": -math.inf})

    lines = (tmp_path / "adapters" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["kind"], first["iteration"], first["train_loss"]) == ("train", 10, 0.5)
    assert (second["train_loss"], second["train_margins"]) == (None, None)


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(
        UserError, match=r"^.*metrics\.jsonl cannot be written \(.*\); free space or change adapter_path"
    ):
        MetricsFile(tmp_path / "metrics.jsonl").append("test", {"test_loss": 0.5})
