"""``mlx-cpo check --time`` measures a run's own micro-batches by a clock that the tests pretend."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.commands import check, timing
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
from mlx_cpo_plugin.training.qat import FakeQuantisation


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that a token of a micro-batch, an update, and a token of validation take; the first of each is slow.

    A token of a fake-quantised one takes ``rounded`` times as long, and before each such step is the ``rounding``.
    """
    takes = {"token": 0.5, "rounded": 1.0, "rounding": 0.0, "update": 10.0, "validated token": 0.25, "now": 0.0}
    add, apply, evaluate, measured = (
        OptimizerStep.add,
        OptimizerStep.apply,
        timing.evaluate_pairs,
        timing.measured_duration,
    )
    first: set[str] = set()

    def passes(kind: str, seconds: float) -> None:
        takes["now"] += seconds if kind in first else 10_000.0
        first.add(kind)

    def slow_add(self: OptimizerStep, pairs: Any, totals: Any, quantised: bool) -> Any:
        passes("add", takes["token"] * sum(pair.tokens for pair in pairs) * (takes["rounded"] if quantised else 1.0))
        return add(self, pairs, totals, quantised)

    def slow_apply(self: OptimizerStep) -> Any:
        passes("apply", takes["update"])
        return apply(self)

    def slow_evaluate(model: Any, pairs: Any, *arguments: Any, **named: Any) -> Any:
        takes["now"] += takes["validated token"] * sum(pair.tokens for pair in pairs)
        return evaluate(model, pairs, *arguments, **named)

    def slow_rounding(self: FakeQuantisation) -> None:
        takes["now"] += takes["rounding"]

    monkeypatch.setattr(FakeQuantisation, "update", slow_rounding)
    monkeypatch.setattr(OptimizerStep, "add", slow_add)
    monkeypatch.setattr(OptimizerStep, "apply", slow_apply)
    monkeypatch.setattr(timing, "evaluate_pairs", slow_evaluate)
    monkeypatch.setattr(check, "measured_duration", lambda run: measured(run, clock=lambda: takes["now"]))
    return takes


def timed(model: Path, data: Path, adapters: Path, **changed: Any) -> str:
    given = {"train_mode": "cpo", "train": True, "model": str(model), "data": str(data), "adapter_path": str(adapters)}
    settings = config.resolve({**given, **changed}).settings
    stream = io.StringIO()
    check.run_check(settings, train_modes()["cpo"], stream, examples=0, timed=True)
    assert not adapters.exists()
    (line,) = re.findall(r"^Time: .*", stream.getvalue(), re.M)
    return line


def test_steps_updates_and_validations_of_the_whole_run_count(
    model_folder: Path, data_folder: Path, tmp_path: Path, pretended: dict[str, float]
) -> None:
    pretended["token"] = 0.0
    pretended["validated token"] = 0.0

    line = timed(model_folder, data_folder, tmp_path / "a", iters=60, gradient_accumulation_steps=2)

    assert line.startswith("Time: about 5 min for 60 iterations, by micro-batches of "), "30 updates of 10 s"


def test_longer_micro_batches_take_longer(
    model_folder: Path, data_folder: Path, tmp_path: Path, pretended: dict[str, float]
) -> None:
    pretended["update"] = pretended["validated token"] = 0.0

    once, twice = (timed(model_folder, data_folder, tmp_path / "a", iters=10, batch_size=size) for size in (1, 2))

    minutes = [float(re.findall(r"about ([\d.]+) min", line)[0]) for line in (once, twice)]
    assert minutes[1] == pytest.approx(2 * minutes[0], rel=0.3)


@pytest.mark.parametrize(
    ("qat", "share"),
    [({}, 1.0), ({"qat_interval": 2}, 0.5), ({"qat_start_step": 31}, 0.25), ({"qat_start_step": 41}, 0.0)],
    ids=str,
)
def test_steps_take_longer_where_they_are_fake_quantised(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    pretended: dict[str, float],
    qat: dict[str, int],
    share: float,
) -> None:
    pretended["update"] = pretended["validated token"] = 0.0
    pretended["token"], pretended["rounded"] = 50.0, 5.0

    def hours(**settings: Any) -> tuple[float, str]:
        line = timed(model_folder, data_folder, tmp_path / "a", iters=40, batch_size=4, **settings)
        return float(re.findall(r"about ([\d.]+) h", line)[0]), line

    never, _ = hours()
    some, line = hours(qat_enable=True, qat_group_size=32, **qat)

    assert some == pytest.approx(never * (1 + 4 * share), rel=0.1)
    assert ("and fake-quantised ones of " in line) == (0 < share < 1)


def test_weights_are_rounded_before_each_fake_quantised_step(
    model_folder: Path, data_folder: Path, tmp_path: Path, pretended: dict[str, float]
) -> None:
    pretended["update"] = pretended["validated token"] = pretended["token"] = 0.0
    pretended["rounding"] = 60.0
    settings = {"iters": 40, "gradient_accumulation_steps": 2, "qat_enable": True, "qat_group_size": 32}

    every, second, none = (
        timed(model_folder, data_folder, tmp_path / "a", **settings, **qat)
        for qat in ({}, {"qat_interval": 2}, {"qat_start_step": 21})
    )

    assert every.startswith("Time: about 20 min ")
    assert second.startswith("Time: about 10 min ")
    assert none.startswith("Time: about 0 s ")


def test_validations_are_measured_in_the_segments_of_the_run(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    pretended: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int | None] = []
    evaluate = timing.evaluate_pairs

    def noted(*arguments: Any, step_size: int | None, **named: Any) -> Any:
        sizes.append(step_size)
        return evaluate(*arguments, step_size=step_size, **named)

    monkeypatch.setattr(timing, "evaluate_pairs", noted)

    timed(model_folder, data_folder, tmp_path / "a", efficient_long_context=True, seq_step_size=64)

    assert sizes
    assert set(sizes) == {64}


def test_validations_are_told_apart(
    model_folder: Path, data_folder: Path, tmp_path: Path, pretended: dict[str, float]
) -> None:
    pretended["update"] = pretended["token"] = 0.0

    few = timed(model_folder, data_folder, tmp_path / "a", iters=10, steps_per_eval=5)
    none = timed(model_folder, data_folder, tmp_path / "a", iters=10, val_batches=0)

    assert ", validations " in few
    assert none.startswith("Time: about 0 s for 10 iterations, by")


def test_the_command_has_an_option_for_it(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, data_folder: Path
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(check, "run_check", lambda settings, mode, timed: asked.append(timed))
    words = ["check", "--train-mode", "cpo", "--model", str(model_folder), "--data", str(data_folder)]

    assert [cli.main([*words, "--time"]), cli.main(words)] == [0, 0]
    assert asked == [True, False]
