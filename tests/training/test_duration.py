"""How long a run takes is told from a few of its own micro-batches, by a clock that the tests pretend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.optimizers as optimizers
import pytest
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.training import duration
from mlx_cpo_plugin.training.duration import MEASURED, Forecast, expected_seconds, spoken
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo


def told(tokens: list[int], seconds: Callable[[int], float], done: int = 0) -> dict[int, str]:
    """What is said after which iteration where each takes so many seconds."""
    now = 0.0
    forecast = Forecast(tokens, done, clock=lambda: now)
    lines = {}
    for iteration in range(done + 1, len(tokens) + 1):
        now += seconds(iteration)
        if line := forecast.line(iteration):
            lines[iteration] = line
    return lines


def test_the_rest_is_told_once_without_the_first_iteration_which_compiles() -> None:
    lines = told([10] * 106, lambda iteration: 500.0 if iteration == 1 else 2.0)

    assert lines == {6: "About 3 min of training are left, by the tokens and the time of iterations 2 to 6."}


def test_longer_rows_to_come_take_longer() -> None:
    (line,) = told([10] * 6 + [100] * 100, lambda _: 2.0).values()

    assert line.startswith("About 33 min ")


def test_a_resumed_run_measures_its_own_iterations() -> None:
    lines = told([10] * 200, lambda _: 2.0, done=50)

    assert lines == {
        51 + MEASURED: "About 5 min of training are left, by the tokens and the time of iterations 52 to 56."
    }


def test_a_short_run_says_nothing() -> None:
    assert told([10] * 30, lambda _: 2.0) == {}
    assert told([10] * 3, lambda _: 1000.0) == {}


def test_time_is_linear_between_measurements_and_proportional_outside() -> None:
    measured = [(100, 3.0), (50, 1.0)]

    assert expected_seconds(measured, [50, 100]) == 4.0
    assert expected_seconds(measured, [75]) == 2.0
    assert expected_seconds(measured, [25]) == 0.5
    assert expected_seconds(measured, [200]) == 6.0
    assert expected_seconds([(10, 1.0)], [5, 10, 20]) == 3.5
    assert expected_seconds([(10, 1.0)], []) == 0.0


@pytest.mark.parametrize(("seconds", "text"), [(40.4, "40 s"), (89, "89 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_durations_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert spoken(seconds) == text


def test_a_run_says_how_long_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "WORTH_SAYING", 0.0)
    args = CPOTrainingArgs(iters=8, batch_size=1, adapter_file=str(tmp_path / "adapters.safetensors"))

    train_cpo(add_adapter(build_model()), optimizers.SGD(learning_rate=0.01), build_pairs(4), None, args)

    assert "s of training are left, by the tokens and the time of iterations 2 to 6.\n" in capsys.readouterr().out
