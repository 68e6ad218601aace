"""Means over pairs, what is reported of them, and one line of valid JSON a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.training.metrics import MetricsFile, PairMeans
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.reporting import ProgressReporter

EQUAL = AnswerScores(*(mx.array([value]) for value in (-2.0, -2.0, 1.0, 1.0, 2.0, 2.0)))


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_a_pair_whose_answers_are_equally_probable_is_not_right() -> None:
    means = PairMeans(objective_for("sigmoid", {}))

    means.add(mx.array([0.7]), EQUAL, tokens=4)

    assert means.over_ranks()[0]["accuracies"] == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_the_likelihood_is_a_mean_over_tokens_and_has_its_share_in_the_loss(loss_type: str) -> None:
    means = PairMeans(objective_for(loss_type, {}, cpo_alpha=0.5))
    per_token, tokens = np.array([1.0, 4.0, 2.0]), np.array([10.0, 2.0, 4.0])
    chosen = -per_token if loss_type == "simpo" else -per_token * tokens

    for part in (slice(0, 1), slice(1, 3)):
        arrays = [mx.array(values[part].astype(np.float32)) for values in [*[chosen] * 4, tokens, tokens]]
        means.add(mx.array([0.7, 0.1, 0.4])[part], AnswerScores(*arrays), tokens=99)

    reported, _ = means.over_ranks()
    nll = (1.0 * 10 + 4.0 * 2 + 2.0 * 4) / 16
    assert reported["nll_loss"] == pytest.approx(nll)
    assert reported["loss"] == pytest.approx((0.7 + 0.1 + 0.4) / 3 + 0.5 * nll)


def test_a_report_means_over_what_came_since_the_last_one_and_counts_tokens_and_steps_from_the_start(
    tmp_path: Path,
) -> None:
    reporter = ProgressReporter(objective_for("sigmoid", {}), None, MetricsFile(tmp_path / "metrics.jsonl", "run"))

    for number, norm in reporter.iterations_of([1.0, None, 3.0, 5.0], 4):
        reporter.add(mx.array([0.25 * number]), EQUAL, tokens=2)
        reporter.count_iteration(norm)
        if number > 2:
            reporter.report_training(number, learning_rate=0.01, epoch=0.5)

    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["train_gradient_norm"], second["train_gradient_norm"]) == (2.0, 5.0)
    assert (first["train_loss"], second["train_loss"]) == (0.5, 1.0)
    assert (first["trained_tokens"], second["trained_tokens"]) == (6, 8)
    assert (first["optimizer_steps"], second["optimizer_steps"]) == (2, 3)


def test_every_report_is_a_line_of_valid_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "adapters" / "metrics.jsonl", "run")

    file.append("train", {"iteration": 10, "train_loss": 0.5})
    file.append("train", {"iteration": 20, "train_loss": math.nan, "train_margins": -math.inf})

    lines = (tmp_path / "adapters" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["kind"], first["iteration"], first["train_loss"]) == ("train", 10, 0.5)
    assert (second["train_loss"], second["train_margins"]) == (None, None)


def test_a_test_beside_a_run_is_none_of_the_reports_that_its_checkpoints_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, "run")
    file.append("train", {"iteration": 10})
    MetricsFile(path, "run").append("test", {"test_loss": 0.5})
    file.append("train", {"iteration": 20})
    file.append("train", {"iteration": 30})

    later, note = MetricsFile(path, "run").resume(path, "run", rows=2, iteration=20)

    assert (later, note) == ({("train", 30)}, None)
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert [(row["kind"], row.get("iteration")) for row in rows] == [("train", 10), ("train", 20)]


def test_a_file_that_cannot_be_written_is_told_once_and_raises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", "run")

    for _ in range(2):
        metrics.append("test", {"test_loss": 0.5})

    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (") == 1
    assert metrics.rows == 0
