"""Before its first step a run says what it is going to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.tokens import Lengths, TruncatedPair
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.run_settings import recorded_settings
from mlx_cpo_plugin.training import trainer
from mlx_cpo_plugin.training.summary import acting
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

PAIRS = 9
Summary = Callable[..., dict[str, str]]


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Summary:
    """The lines of the summary by what they are about, of a run that ends before it begins."""
    monkeypatch.setattr(trainer, "begin", lambda run: False)

    def printed(loss_fn: Any = None, model: Any = None, **arguments: Any) -> dict[str, str]:
        args = CPOTrainingArgs(**{"iters": 4, "adapter_file": str(tmp_path / "adapters.safetensors"), **arguments})
        model = model or add_adapter(build_model())
        train_cpo(model, optimizers.SGD(0.1), build_pairs(PAIRS), build_pairs(3, 1), args, loss_fn)
        lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
        return {about: text for about, colon, text in lines if colon}

    return printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "Sigmoid, -log sigmoid(beta * logits); beta 0.1"),
        (
            {"loss_type": "dpop", "beta": 0.05},
            "DPOP, -log sigmoid(beta * logits) + delta * max(0, rejected_logps - chosen_logps); beta 0.05, delta 50.0",
        ),
        (
            {"loss_type": "simpo", "beta": 2.0, "loss_options": {"label_smoothing": 0.1}},
            "SimPO, -log sigmoid(beta * logits - simpo_gamma), log-probs averaged over tokens; "
            "beta 2.0, simpo_gamma 0.5",
        ),
        (
            {"cpo_alpha": 1.0},
            "Sigmoid, -log sigmoid(beta * logits), plus 1 times the chosen answers' nll; beta 0.1",
        ),
    ],
)
def test_the_loss_has_its_name_its_formula_and_the_options_in_it(
    summary: Summary, arguments: dict[str, Any], line: str
) -> None:
    assert summary(**arguments)["Objective"] == line


def test_a_loss_that_the_call_gives_is_named(summary: Summary) -> None:
    def my_own(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
        return beta * (rejected_logps - chosen_logps)

    assert summary(my_own, beta=0.3)["Objective"] == "the function my_own, given by the call; beta 0.3"


@pytest.mark.parametrize(
    ("arguments", "step", "run"),
    [
        (
            {"batch_size": 2, "gradient_accumulation_steps": 3, "iters": 10},
            "2 pairs x 3 accumulated = 6 pairs",
            # 9 pairs are 3 and 2 micro-batches, in two steps
            "10 iterations, 4 optimizer steps, 2 epochs of 9 pairs",
        ),
        (
            {"batch_size": 1, "iters": 1},
            "1 pair x 1 accumulated = 1 pair",
            "1 iteration, 1 optimizer step, 0.111 epochs of 9 pairs",
        ),
        (
            {"batch_tokens": 10_000, "iters": 2},
            "at most 10,000 tokens x 1 accumulated",
            "2 iterations, 2 optimizer steps, 2 epochs of 9 pairs",
        ),
    ],
)
def test_a_step_and_the_length_of_the_run_are_counted(
    summary: Summary, arguments: dict[str, Any], step: str, run: str
) -> None:
    found = summary(**arguments)

    assert (found["Step"], found["Run"]) == (step, run)


def test_what_is_trained_is_counted(summary: Summary) -> None:
    models = {"LoRA, rank: 4, scale: 10.0, dropout: 0.0": add_adapter(build_model()), "full weights": build_model()}
    total = sum(array.size for _, array in tree_flatten(build_model().parameters()))

    for kind, model in models.items():
        trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
        share = f"{100 * trained / total:.2f}%"
        line = f"{trained:,} parameters, {share} of the model's {total:,}; {kind}"
        assert summary(model=model)["Trained"] == line


def test_no_line_looks_like_a_report_of_training(summary: Summary) -> None:
    lines = summary(loss_type="dpop")

    # What MLX LoRA Studio takes for one.
    reports = ("loss", "memory:", "peak mem", "peak_mem", "it/s")
    told = [f"{about}: {lines[about]}" for about in ("Objective", "Step", "Run", "Trained", "Set")]
    assert not [line for line in told if any(part in line.lower() for part in reports)]


def acting_in(call: dict[str, Any], val_pairs: PreferenceDataset | None = None) -> dict[str, Any]:
    """What a run with the settings of a call tells of them."""
    settings = config.resolve({"train_mode": "cpo", "train": True, **call}).settings
    validation = PreferenceDataset(split="valid") if val_pairs is None else val_pairs
    return acting(recorded_settings(settings), settings.dpo_cpo_loss_type, validation)


@pytest.mark.parametrize(
    "call",
    [
        {"seed": 3, "max_seq_length": 512},
        {"learning_rate": 2e-5, "optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 0.1}}},
        {"label_smoothing": 0.1},
        {"qat_enable": True, "qat_bits": 4},
        {"efficient_long_context": True, "seq_step_size": 64},
        {"test": True, "test_batches": 5},
        {"fuse": False},
        {"report_to": ["trackio"], "run_name": "one"},
        {"scoring": "plain", "max_grad_norm": 1.0},
        {"lr_schedule": {"name": "cosine"}, "learning_rate": 2e-5},
    ],
    ids=lambda call: next(iter(call)),
)
def test_every_option_that_acts_and_differs_from_its_default_is_told(call: dict[str, Any]) -> None:
    told = acting_in(call)

    assert set(told) == set(call)
    if "optimizer_config" in call:
        assert told["optimizer_config"] == {"weight_decay": 0.1}


@pytest.mark.parametrize(
    ("call", "silent"),
    [
        ({"qat_bits": 4}, "qat_bits"),
        ({"qat_enable": True, "qat_mode": "mxfp4", "qat_group_size": 32}, "qat_group_size"),
        ({"seq_step_size": 64}, "seq_step_size"),
        ({"test_batches": 5}, "test_batches"),
        ({"fuse": False, "fuse_bits": 4}, "fuse_bits"),
        ({"run_name": "one"}, "run_name"),
        ({"reference_model_path": "a"}, "reference_model_path"),
        ({"steps_per_eval": 5, "save_best": "margin", "early_stopping_patience": 2}, "steps_per_eval"),
        ({"valid_fraction": 0.1}, "valid_fraction"),
        (
            {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 10]}, "learning_rate": 2e-5},
            "learning_rate",
        ),
        ({"optimizer_config": {"sgd": {"momentum": 0.9}}}, "optimizer_config"),
        ({"seed": 0}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_does_not_act_is_not_told(call: dict[str, Any], silent: str) -> None:
    assert silent not in acting_in(call)


def test_options_of_validation_act_where_there_are_validation_pairs() -> None:
    pairs = [TruncatedPair(pair, Lengths.of(pair)) for pair in build_pairs(2)]
    drawn, _ = PreferenceDataset(pairs).split_off(0.5, 0)[::-1]

    for val_pairs, fraction in ((drawn, {"valid_fraction"}), (PreferenceDataset(pairs, "valid"), set())):
        assert set(acting_in({"steps_per_eval": 5, "valid_fraction": 0.5}, val_pairs)) == {"steps_per_eval"} | fraction
