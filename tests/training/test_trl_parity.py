"""The same numbers as TRL's CPOTrainer: loss, rewards and gradients on the same weights and rows, and the same steps.

``make_trl_reference.py`` and ``make_trl_trajectory.py`` made the files that are read here; they say how, and the files
say with which versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers
from support.tiny import assert_same, parameters

from mlx_cpo_plugin.cli import main
from mlx_cpo_plugin.data.batches import StepTotals, epoch_order
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.run.building import build_optimizer, optimizer_steps
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.gradient_methods import BatchGradients
from mlx_cpo_plugin.training.gradients import gradients_for
from mlx_cpo_plugin.training.metrics import PairMeans
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.trainer import train_cpo

ARRAYS, METADATA = mx.load(str(Path(__file__).with_name("trl_reference.safetensors")), return_metadata=True)
CASES: list[dict[str, Any]] = json.loads(METADATA["cases"])
TOLERANCE = 1e-5
TRAJECTORY, ITS_METADATA = mx.load(str(Path(__file__).with_name("trl_trajectory.safetensors")), return_metadata=True)
TRAJECTORIES: dict[str, dict[str, Any]] = json.loads(ITS_METADATA["cases"])
STEPS = 10
# Rounding errors add up over the steps; what is computed in another way differs by a hundred times that and more.
TOLERANCE_AFTER_STEPS = 1e-4


def arrays(prefix: str, file: dict[str, mx.array] = ARRAYS) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in file.items() if name.startswith(prefix)}


def build_model() -> nn.Module:
    config = json.loads(METADATA["model"])
    model = llama.Model(llama.ModelArgs(model_type="llama", **config))
    model.load_weights(list(arrays("weights.").items()))
    return model


def build_pairs(rows: list[dict[str, list[int]]] | None = None) -> list[PreferencePair]:
    pairs = []
    for row in rows or json.loads(METADATA["rows"]):
        prompt, chosen, rejected = (np.array(row[part], np.int32) for part in ("prompt", "chosen", "rejected"))
        pairs.append(PreferencePair(prompt, chosen, rejected, np.ones(len(chosen), bool), np.ones(len(rejected), bool)))
    return pairs


def objective_of(settings: dict[str, Any]) -> Objective:
    options = {name: value for name, value in settings.items() if name not in ("loss_type", "cpo_alpha")}
    return objective_for(settings["loss_type"], options, cpo_alpha=settings["cpo_alpha"])


def name_of(case: dict[str, Any]) -> str:
    settings = case["settings"]
    return f"{settings['loss_type']}-{settings['cpo_alpha']:g}-{settings.get('label_smoothing', 0):g}"


@pytest.mark.parametrize("scoring", ["plain", "shared"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_loss_rewards_and_gradients_are_those_of_trl(number: int, scoring: str) -> None:
    case, model, pairs = CASES[number], build_model(), build_pairs()
    objective = objective_of(case["settings"])
    method = BatchGradients(model, objective)
    if scoring == "shared":
        scorer = choose_scorer(model, pairs, "shared")
        method = gradients_for(model, objective, scorer, pairs)

    result = method(pairs, StepTotals.of(pairs))
    means = PairMeans(objective)
    means.add(result.losses, result.scores, tokens=0)

    reported, theirs = means.over_ranks()[0], case["metrics"]
    assert reported["loss"] == pytest.approx(case["loss"], rel=TOLERANCE)
    for ours, name in (
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
        ("margins", "rewards/margins"),
        ("accuracies", "rewards/accuracies"),
        ("policy_chosen_logps", "logps/chosen"),
        ("policy_rejected_logps", "logps/rejected"),
    ):
        assert reported[ours] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name
    if case["settings"]["cpo_alpha"]:  # TRL reports 0 where it does not weigh it
        assert reported["nll_loss"] == pytest.approx(theirs["nll_loss"], rel=TOLERANCE)
    expected = arrays(f"{number}.")
    as_numpy = [{name: np.array(value) for name, value in tree.items()} for tree in (result.gradient, expected)]
    assert_same(*as_numpy, tolerance=TOLERANCE)


def test_every_loss_of_trl_is_compared_with_and_without_each_option() -> None:
    compared = {name_of(case) for case in CASES}

    assert compared == {
        f"{loss}-{cpo_alpha}-{smoothing}"
        for loss in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
        for cpo_alpha in (0, 1)
        for smoothing in (0, 0.1)
        if not smoothing or loss not in ("hinge", "ipo")
    }


def test_the_rows_of_the_reference_hold_pairs_that_are_right_and_pairs_that_are_wrong() -> None:
    accuracies = {case["settings"]["loss_type"]: case["metrics"]["rewards/accuracies"] for case in CASES}

    assert all(0 < accuracy < 1 for accuracy in accuracies.values())


def converted(config: dict[str, Any], folder: Path, rows: int) -> RunSettings:
    """What the command makes of a configuration of TRL."""
    file = folder / "trl.json"
    file.write_text(json.dumps(config))
    main(["convert", str(file), "--output", str(folder / "cpo.yaml"), "--rows", str(rows)])
    return resolve({"config": str(folder / "cpo.yaml"), "steps_per_report": 1}).settings


def in_order_of_training(rows: list[Any], seed: int) -> list[Any]:
    """The rows so that a run takes them in the order in which they are given."""
    placed = dict(zip(epoch_order(len(rows), seed, 0), rows, strict=True))
    return [placed[index] for index in range(len(rows))]


def adapter_from(model: nn.Module, settings: RunSettings) -> None:
    """Give a model the adapter that TRL started from."""
    model.freeze()
    linear_to_lora_layers(model, settings.num_layers, settings.lora_parameters)
    initial = arrays("initial.", TRAJECTORY)
    assert initial.keys() == parameters(model).keys()
    model.load_weights(list(initial.items()), strict=False)


def learned(adapter: dict[str, Any]) -> dict[str, np.ndarray]:
    """B·A of each module, which is zero at the start."""
    modules = {name.rpartition(".")[0] for name in adapter}
    return {module: np.array(adapter[f"{module}.lora_a"]) @ np.array(adapter[f"{module}.lora_b"]) for module in modules}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_ten_steps_are_those_of_trl(name: str, tmp_path: Path) -> None:
    case, rows = TRAJECTORIES[name], json.loads(ITS_METADATA["rows"])
    settings = converted(case["config"], tmp_path, len(rows))
    model = build_model()
    adapter_from(model, settings)
    pairs = build_pairs(in_order_of_training(rows, settings.seed))
    settings.iters = len(case["steps"])
    args = CPOTrainingArgs.from_settings(settings, tmp_path / "adapters" / "adapters.safetensors")

    train_cpo(model, build_optimizer(settings, optimizer_steps(settings, pairs)), pairs, None, args)

    lines = [json.loads(line) for line in (tmp_path / "adapters" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "train"]
    for ours, theirs in (
        ("train_loss", "loss"),
        ("train_policy_chosen_logps", "chosen_logps"),
        ("train_policy_rejected_logps", "rejected_logps"),
        ("train_margins", "margins"),
    ):
        # Each takes the micro-batches of a step in an order of its own.
        reported, expected = (
            np.reshape([values[name] for values in of], (STEPS, -1)).mean(axis=1)
            for of, name in ((found, ours), (case["steps"], theirs))
        )
        np.testing.assert_allclose(reported, expected, TOLERANCE_AFTER_STEPS, TOLERANCE_AFTER_STEPS, err_msg=theirs)
    assert_same(learned(parameters(model)), learned(arrays(f"{name}.", TRAJECTORY)), tolerance=TOLERANCE_AFTER_STEPS)


@pytest.mark.parametrize("metadata", [METADATA, ITS_METADATA], ids=["gradients", "steps"])
def test_the_references_name_the_versions_that_made_them(metadata: dict[str, str]) -> None:
    versions = json.loads(metadata["versions"])

    assert versions["trl"].startswith("1.16.")
    assert {"trl", "torch", "transformers"} <= versions.keys()
