"""What must not go unnoticed while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.errors import TrainingError
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.training import optimizer_step
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.reporting import WINDOW, DisplacementAlarm
from mlx_cpo_plugin.training.trainer import train_cpo
from mlx_cpo_plugin.training.validation import BestSoFar


def train(folder: Path, model: nn.Module, *, rate: float | Callable[[mx.array], mx.array] = 0.1, **more: Any) -> None:
    loss = more.pop("loss_fn", None)
    val_pairs = more.pop("val_pairs", None)
    settings = {"batch_size": 2, "iters": 6, "steps_per_report": 1, "beta": 0.5, **more}
    train_cpo(
        model,
        optimizers.SGD(learning_rate=rate),
        build_pairs(8),
        val_pairs,
        CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), **settings),
        loss_fn=loss,
    )


def saved(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(folder / "adapters.safetensors")).items()}


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_rows(tmp_path: Path) -> None:
    model = add_adapter(build_model())
    steps: list[dict[str, np.ndarray]] = []

    def loss(chosen_logps: mx.array, rejected_logps: mx.array, **_: Any) -> mx.array:
        steps.append(parameters(model))
        return chosen_logps * (mx.nan if len(steps) > 2 * 2 else 1.0)

    with pytest.raises(TrainingError, match=r"^Step \d: the loss of row \d.* is not finite; look at these rows"):
        train(tmp_path, model, loss_fn=loss)

    assert_same(saved(tmp_path), parameters(model))
    assert all(np.isfinite(value).all() for value in saved(tmp_path).values())


def test_a_gradient_that_is_no_number_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_adapter(build_model())
    before = parameters(model)
    monkeypatch.setattr(optimizer_step, "gradient_norm", lambda gradient: float("inf"))

    with pytest.raises(TrainingError, match=r"^Step 1: the gradient of row \d, row \d is not finite, though the loss"):
        train(tmp_path, model)

    assert_same(saved(tmp_path), before)


def test_weights_that_an_optimizer_makes_no_numbers_are_those_from_before_the_step(tmp_path: Path) -> None:
    model = add_adapter(build_model())

    with pytest.raises(TrainingError, match=r"^Step 2: SGD makes \d+ of \d+ weights not finite, .* the gradient is"):
        train(tmp_path, model, rate=lambda step: mx.where(step > 0, mx.nan, 0.1))

    assert_same(saved(tmp_path), parameters(model))
    assert all(np.isfinite(value).all() for value in saved(tmp_path).values())


def test_an_adapter_that_cannot_learn_is_found_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^Step 1: none of \d+ trainable parameters changed; check num_layers"):
        train(tmp_path, add_adapter(build_model(), scale=0.0))


def test_a_warm_up_from_zero_and_a_loss_of_zero_are_no_alarm(tmp_path: Path) -> None:
    train(tmp_path, add_adapter(build_model()), rate=lambda step: 0.1 * mx.minimum(step, 1))
    train(tmp_path, add_adapter(build_model()), loss_fn=lambda chosen_logps, rejected_logps, **_: 0 * chosen_logps)


@pytest.mark.parametrize("logits", [30.0, 50.0, 90.0, 200.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "simpo"])
def test_a_first_step_whose_pairs_are_won_already_is_no_alarm(tmp_path: Path, logits: float, loss_type: str) -> None:
    losses = loss_types()
    options = {option.name: option.default for option in losses[loss_type].options}

    def of_margins_won(chosen_logps: mx.array, rejected_logps: mx.array, **_: Any) -> mx.array:
        won = (logits + 2) / float(options["beta"])
        return losses[loss_type].fn(chosen_logps - chosen_logps.mean() + won, 0 * rejected_logps, **options)

    train(tmp_path, add_adapter(build_model()), loss_fn=of_margins_won, iters=2)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(tmp_path: Path, max_norm: float) -> None:
    clipped, free = add_adapter(build_model()), add_adapter(build_model())
    before = parameters(free)
    train(tmp_path / "free", free, iters=1)
    train(tmp_path / "clipped", clipped, iters=1, max_grad_norm=max_norm)

    def moved(model: nn.Module) -> float:
        after = parameters(model)
        return float(np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before)))

    expected = min(moved(free), 0.1 * max_norm)
    assert moved(clipped) == pytest.approx(expected, rel=1e-3)


def scores(chosen: float, rejected: float) -> AnswerScores:
    zeros = mx.zeros(2)
    return AnswerScores(
        mx.array([chosen, chosen]), mx.array([rejected, rejected]), zeros, zeros, mx.ones(2), mx.ones(2)
    )


def told(chosen_slope: float, rejected_slope: float, cpo_alpha: float = 0.0) -> list[str]:
    """What the alarm says over a run whose log-probs go straight, with some noise."""
    alarm, rng = DisplacementAlarm(cpo_alpha), np.random.default_rng(0)
    lines = [
        alarm.warning(at, scores(*(-50 + slope * at + rng.normal(0, 2) for slope in (chosen_slope, rejected_slope))))
        for at in range(4 * WINDOW)
    ]
    return [line for line in lines if line is not None]


def test_margins_that_rise_while_the_chosen_answer_falls_are_told_once() -> None:
    (line,) = told(-1.0, -2.0)

    assert "(likelihood displacement)" in line
    assert "cpo_alpha: 1" in line
    assert "cpo_alpha" not in told(-1.0, -2.0, cpo_alpha=1.0)[0]


@pytest.mark.parametrize("slopes", [(1.0, -1.0), (-1.0, -1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_other_courses_are_no_displacement(slopes: tuple[float, float]) -> None:
    assert told(*slopes) == []


def test_the_displacement_alarm_goes_on_where_it_was() -> None:
    alarm, resumed = DisplacementAlarm(0.0), DisplacementAlarm(0.0)
    for at in range(WINDOW):
        alarm.warning(at, scores(-50 - at, -50 - 2 * at))
    resumed.restore(alarm.state())

    lines = [resumed.warning(at, scores(-50 - at, -50 - 2 * at)) for at in range(WINDOW, 2 * WINDOW)]

    assert lines[:-1] == [None] * (WINDOW - 1)
    assert lines[-1] is not None


def means(value: float) -> dict[str, float]:
    return {"margins": value, "accuracies": value, "loss": -value}


@pytest.mark.parametrize("measure", ["margin", "accuracy", "loss"])
def test_the_best_validation_is_the_first_of_the_highest(measure: str) -> None:
    best = BestSoFar(measure)

    improved = []
    for at, value in enumerate((1.0, 0.5, 2.0, 2.0, float("nan"))):
        improved.append(best.is_best(means(value)))
        best.add(at, means(value))

    assert improved == [True, False, True, False, False]
    assert (best.iteration, best.waited, best.out_of_patience) == (2, 2, False)


def test_patience_counts_validations_since_the_best() -> None:
    best = BestSoFar("margin", patience=2)

    exhausted = []
    for at, value in enumerate((1.0, 2.0, 0.0, 1.9)):
        best.add(at, means(value))
        exhausted.append(best.out_of_patience)

    assert exhausted == [False, False, False, True]


def test_a_run_with_validation_leaves_displacement_to_its_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DisplacementAlarm, "warning", lambda self, iteration, scores: "displaced")

    train(tmp_path / "validated", add_adapter(build_model()), val_pairs=build_pairs(4, seed=5))
    assert "displaced" not in capsys.readouterr().out
    train(tmp_path / "not", add_adapter(build_model()))
    assert "displaced" in capsys.readouterr().out


def test_the_best_adapter_is_kept_and_patience_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A rate far too large: the margin on other pairs is best at the start or nowhere.
    train(
        tmp_path,
        add_adapter(build_model()),
        rate=3.0,
        val_pairs=build_pairs(4, seed=5),
        iters=40,
        steps_per_eval=1,
        save_best="margin",
        early_stopping_patience=4,
    )

    printed = capsys.readouterr().out
    assert "stopping, no validation since" in printed
    best = mx.load(str(tmp_path / "best" / "adapters.safetensors"))
    assert best.keys() == saved(tmp_path).keys()
    assert any(not np.array_equal(np.array(best[name]), value) for name, value in saved(tmp_path).items())
