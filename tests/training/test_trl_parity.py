"""The same numbers as TRL's CPOTrainer: loss, rewards and gradients on the same weights and rows.

``make_trl_reference.py`` made the file that is read here; it says how, and the file says with which versions.
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
from support.tiny import assert_same

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.training.gradient_methods import BatchGradients
from mlx_cpo_plugin.training.gradients import gradients_for
from mlx_cpo_plugin.training.metrics import PairMeans
from mlx_cpo_plugin.training.objective import Objective, objective_for

ARRAYS, METADATA = mx.load(str(Path(__file__).with_name("trl_reference.safetensors")), return_metadata=True)
CASES: list[dict[str, Any]] = json.loads(METADATA["cases"])
TOLERANCE = 1e-5


def arrays(prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in ARRAYS.items() if name.startswith(prefix)}


def build_model() -> nn.Module:
    config = json.loads(METADATA["model"])
    model = llama.Model(llama.ModelArgs(model_type="llama", **config))
    model.load_weights(list(arrays("weights.").items()))
    return model


def build_pairs() -> list[PreferencePair]:
    pairs = []
    for row in json.loads(METADATA["rows"]):
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


def test_the_reference_names_the_versions_that_made_it() -> None:
    versions = json.loads(METADATA["versions"])

    assert versions["trl"].startswith("1.16.")
    assert set(versions) == {"trl", "torch", "transformers"}
