"""Training models of half precision: updates too small for their weights add up in float32 and survive saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_map
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR
from mlx_cpo_plugin.model.logps import score_answers
from mlx_cpo_plugin.model.rounding import dithered
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.memory_estimate import MemoryEstimate
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep, in_float32
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

HALVES = [mx.bfloat16, mx.float16]


def model_in(dtype: mx.Dtype, kind: str = "full") -> nn.Module:
    """A llama whose weights are numbers of bfloat16, in ``dtype``; ``kind`` says what of it is trained."""
    model = build_model(hidden_size=64)
    model.update(tree_map(lambda value: value.astype(mx.bfloat16).astype(dtype), model.parameters()))
    if kind == "dora":
        add_adapter(model, dora=True)
        model.update(tree_map(lambda value: value.astype(dtype), model.trainable_parameters()))
    elif kind == "last layer":
        model.freeze()
        model.layers[-1].unfreeze()
    return model


def trained(model: nn.Module, folder: Path, rate: float, iters: int, **arguments: Any) -> nn.Module:
    args = CPOTrainingArgs(iters=iters, batch_size=4, adapter_file=str(folder / "adapters.safetensors"), **arguments)
    train_cpo(model, optimizers.Adam(rate), build_pairs(8), args=args)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each optimizer step was given and left: gradient, and weights before and after."""
    taken: list[dict[str, Any]] = []
    apply = OptimizerStep.apply

    def apply_and_note(step: OptimizerStep) -> float:
        note = {"gradient": dict(step.total or {}), "before": step.masters.weights()}
        norm = apply(step)
        taken.append(note | {"after": step.masters.weights()})
        return norm

    monkeypatch.setattr(OptimizerStep, "apply", apply_and_note)
    return taken


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["full", "last layer", "dora", "full with QAT"])
def test_one_step_at_a_tiny_rate_moves_every_weight_that_has_a_gradient(
    tmp_path: Path, steps: list[dict[str, Any]], dtype: mx.Dtype, kind: str
) -> None:
    trained(model_in(dtype, kind), tmp_path, 1e-7, 1, qat_enable="QAT" in kind)

    (step,) = steps
    assert step["gradient"]
    for name, gradient in step["gradient"].items():
        assert step["after"][name].dtype == mx.float32
        before, after = np.array(step["before"][name], np.float64), np.array(step["after"][name], np.float64)
        has_gradient = np.abs(np.array(gradient.astype(mx.float32))) > 1e-6
        # A float32 near 1 has a resolution of 6e-8: what Adam moves by 1e-7 shows.
        movable = has_gradient & (np.abs(before) < 1)
        assert np.all(before[movable] != after[movable]), name


def movement(dtype: mx.Dtype, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the chosen minus those of the rejected answers, before and after a training of many small steps."""
    batch, model = collate(build_pairs(8)), model_in(dtype)

    def margins() -> np.ndarray:
        scores = score_answers(model, batch)
        return np.array(scores.chosen_logps - scores.rejected_logps, np.float64)

    before = margins()
    trained(model, folder, 1e-5, 24)
    return before, margins()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> float:
    """By how much the margin moves in float32."""
    before, after = movement(mx.float32, tmp_path_factory.mktemp("wide"))
    return float((after - before).mean())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.slow
def test_many_small_steps_end_where_those_in_float32_end(tmp_path: Path, dtype: mx.Dtype, learned: float) -> None:
    before, after = movement(dtype, tmp_path)

    learned_narrow = (after - before).mean()
    assert learned > 0.05
    assert learned_narrow == pytest.approx(learned, rel=0.1)


def test_adapter_and_model_keep_the_precision_of_the_model(tmp_path: Path) -> None:
    model = trained(model_in(mx.bfloat16), tmp_path, 1e-4, 2, steps_per_save=1)

    adapter: Any = mx.load(str(tmp_path / "adapters.safetensors"))
    masters: Any = mx.load(str(tmp_path / "checkpoints" / "0000002" / "adapters.safetensors"))
    for name, value in by_name(model.parameters()).items():
        assert value.dtype == adapter[name].dtype == mx.bfloat16
        assert mx.array_equal(value, adapter[name])
        assert masters[name].dtype == mx.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.slow
def test_a_resumed_run_goes_on_from_the_float32_weights(
    tmp_path: Path, steps: list[dict[str, Any]], dtype: mx.Dtype
) -> None:
    whole = trained(model_in(dtype), tmp_path / "whole", 1e-5, 4, steps_per_save=4)
    expected = steps[-1]["after"]
    trained(model_in(dtype), tmp_path / "parts", 1e-5, 2, steps_per_save=2)
    resumed = trained(model_in(dtype), tmp_path / "parts", 1e-5, 4, steps_per_save=2, resume="auto")

    for name, value in steps[-1]["after"].items():
        assert mx.array_equal(value, expected[name])
    for name, value in by_name(resumed.parameters()).items():
        assert mx.array_equal(value, by_name(whole.parameters())[name])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [0.75, -0.75, 1.0, -1.0, 3e-5, 0.0])
def test_rounding_keeps_what_is_on_the_grid_and_the_mean_of_what_is_not(dtype: mx.Dtype, value: float) -> None:
    on_grid = mx.full((40_000,), value).astype(dtype)
    start = np.array(on_grid.astype(mx.float32), np.float64)
    assert mx.array_equal(dithered(on_grid.astype(mx.float32), dtype, "weight"), on_grid)

    # A tenth of the distance to the next number of the grid.
    bits = np.array(on_grid[:1].view(mx.uint16))
    step = abs(float(mx.array(bits + 1).view(dtype).astype(mx.float32).item())) - abs(start[0])
    moved = start + np.where(value < 0, -1, 1) * step / 10
    rounded = np.array(dithered(mx.array(moved.astype(np.float32)), dtype, "weight").astype(mx.float32), np.float64)

    assert set(np.unique(np.abs(rounded - start) / step).round(6)) == {0.0, 1.0}
    assert np.abs(rounded - start).mean() == pytest.approx(step / 10, rel=0.06)


def test_what_is_no_number_stays_none(tmp_path: Path) -> None:
    values = mx.array([float("nan"), float("inf"), -float("inf")])

    assert np.array(dithered(values, mx.bfloat16, "w").astype(mx.float32)).tolist()[1:] == [np.inf, -np.inf]
    assert mx.isnan(dithered(values, mx.bfloat16, "w")[0]).item()


def test_the_estimate_counts_float32_copies_and_moments() -> None:
    narrow, wide = model_in(mx.bfloat16), model_in(mx.float32)

    def estimate(model: nn.Module) -> Any:
        optimizer = optimizers.Adam(1e-3)
        optimizer.init(in_float32(model.trainable_parameters()))
        return MemoryEstimate(model, optimizer, build_pairs(4), CPOTrainingArgs(batch_size=1), PAIR_BY_PAIR)

    size = sum(value.size for value in by_name(narrow.parameters()).values())
    assert estimate(narrow).weights == 2 * size + 4 * size
    assert estimate(wide).weights == 4 * size
    assert estimate(narrow).optimizer == estimate(wide).optimizer
