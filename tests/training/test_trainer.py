"""Training: what a step is, what an epoch is, and that every way to compute it gives the same adapter."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx_lm.models import mamba
from support.refusals import refused
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, evaluate_cpo, train_cpo


class Recorder:
    """A training callback that keeps what it is told."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.valid.append(info)


def train(
    folder: Path,
    pairs: list[PreferencePair],
    model: nn.Module | None = None,
    val_pairs: list[PreferencePair] | None = None,
    callback: Recorder | None = None,
    optimizer: optimizers.Optimizer | None = None,
    **arguments: Any,
) -> dict[str, np.ndarray]:
    """Train and return the adapter; plain SGD, so that equal gradients give equal adapters."""
    model = model or add_adapter(build_model())
    defaults = {"iters": 3, "batch_size": 4, "adapter_file": str(folder / "adapters.safetensors")}
    train_cpo(
        model,
        optimizer or optimizers.SGD(learning_rate=0.05),
        pairs,
        val_pairs,
        CPOTrainingArgs(**(defaults | arguments)),
        training_callback=callback,
    )
    return parameters(model)


def test_training_that_is_broken_off_leaves_the_model_in_evaluation_mode(tmp_path: Path) -> None:
    class BreaksOff(Recorder):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    model = add_adapter(build_model(), dropout=0.5)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, build_pairs(4), model, callback=BreaksOff(), steps_per_report=1)

    assert not any(module.training for module in model.modules())


def test_a_step_follows_the_float64_gradient_of_the_mean_loss(tmp_path: Path) -> None:
    pairs, beta, rate = build_pairs(5), 0.3, 0.05
    model = add_adapter(build_model())
    before = parameters(model)

    def mean_loss(model: nn.Module) -> mx.array:
        losses = []
        for pair in pairs:
            sides = []
            for answer in (pair.chosen, pair.rejected):
                logits = model(mx.array(np.concatenate([pair.prompt, answer]))[None, :-1])[0, len(pair.prompt) - 1 :]
                picked = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
                sides.append((picked - mx.logsumexp(logits, axis=-1)).sum())
            losses.append(mx.log(1 + mx.exp(-mx.array(beta, logits.dtype) * (sides[0] - sides[1]))))
        return sum(losses) / len(losses)

    wide = add_adapter(build_model())
    with mx.stream(mx.cpu):
        wide.set_dtype(mx.float64)
        loss, gradient = nn.value_and_grad(wide, mean_loss)(wide)
        wide.update(gradient)
        reference = parameters(wide)
    callback = Recorder()

    after = train(tmp_path, pairs, model, iters=1, batch_size=8, beta=beta, callback=callback)

    assert callback.train[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    step = {name: (before[name] - after[name]) / rate for name in before}
    assert_same(step, reference, tolerance=1e-4)
    norm = np.sqrt(sum((value**2).sum() for value in reference.values()))
    assert callback.train[0]["train_gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "loss_type", "cpo_alpha"),
    [(1, 6, "ipo", 0.0), (2, 3, "sigmoid", 1.0), (4, 2, "simpo", 1.0)],
)
def test_accumulation_equals_one_large_batch(
    tmp_path: Path, batch_size: int, accumulation: int, loss_type: str, cpo_alpha: float
) -> None:
    pairs = build_pairs(15)
    large, micro = batch_size * accumulation, -(-15 // batch_size)
    goal = {"loss_type": loss_type, "beta": 0.5, "cpo_alpha": cpo_alpha}

    whole = train(tmp_path, pairs, batch_size=large, iters=-(-15 // large), **goal)
    parts = train(
        tmp_path,
        pairs,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        iters=micro,
        **goal,
    )

    assert_same(parts, whole, tolerance=1e-4)


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
def test_a_last_partial_window_is_applied_with_its_own_scale(tmp_path: Path, cpo_alpha: float) -> None:
    pairs = build_pairs(3)

    cut_short = train(tmp_path, pairs, batch_size=1, gradient_accumulation_steps=8, iters=3, cpo_alpha=cpo_alpha)
    whole = train(tmp_path, pairs, batch_size=3, iters=1, cpo_alpha=cpo_alpha)

    assert_same(cut_short, whole, tolerance=1e-4)


def test_fewer_pairs_than_the_batch_size_train(tmp_path: Path) -> None:
    callback = Recorder()

    trained = train(tmp_path, build_pairs(2), batch_size=16, iters=2, callback=callback, steps_per_report=1)

    assert [info["epoch"] for info in callback.train] == [1, 2]
    assert np.abs(trained["model.layers.0.self_attn.q_proj.lora_b"]).max() > 0


def test_same_seed_same_adapter_to_the_bit_with_dropout(tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, np.ndarray]:
        model = add_adapter(build_model(), dropout=0.2)
        mx.random.seed(seed)
        return train(tmp_path, build_pairs(9), model, seed=seed, optimizer=optimizers.Adam(1e-2))

    first, again, other = run(1), run(1), run(2)

    assert_same(first, again)
    with pytest.raises(AssertionError):
        assert_same(first, other)


@pytest.mark.parametrize(("loss_type", "dora"), [("sigmoid", False), ("dpop", True)])
def test_long_context_gives_the_plain_gradient(tmp_path: Path, loss_type: str, dora: bool) -> None:
    def run(**arguments: Any) -> dict[str, np.ndarray]:
        model = add_adapter(build_model(), dora=dora)
        return train(tmp_path, build_pairs(4), model, iters=1, loss_type=loss_type, beta=0.3, **arguments)

    assert_same(run(seq_step_size=4), run(), tolerance=1e-4)


@pytest.mark.parametrize("long_context", [None, 4])
def test_gradient_checkpointing_gives_the_plain_gradient(tmp_path: Path, long_context: int | None) -> None:
    plain = train(tmp_path, build_pairs(4), iters=1, seq_step_size=long_context)

    checkpointed = train(tmp_path, build_pairs(4), iters=1, seq_step_size=long_context, grad_checkpoint=True)

    assert_same(checkpointed, plain, tolerance=1e-5)


def test_gradient_checkpointing_draws_the_same_dropout_in_both_passes(tmp_path: Path) -> None:
    model = add_adapter(build_model(), dropout=0.5)
    start = parameters(model)

    def step(learning_rate: float) -> dict[str, Any]:
        mx.random.seed(3)
        callback = Recorder()
        train(
            tmp_path,
            build_pairs(1, longest=30),
            model,
            iters=1,
            loss_type="ipo",
            grad_checkpoint=True,
            callback=callback,
            optimizer=optimizers.SGD(learning_rate),
        )
        return callback.train[0]

    squared_norm = step(1e-6)["train_gradient_norm"] ** 2
    moved = parameters(model)

    def loss_at(fraction: float) -> float:
        model.load_weights(
            [(name, mx.array(start[name] + fraction * (moved[name] - start[name]))) for name in start], strict=False
        )
        return step(0.0)["train_loss"]

    # Along -1e-6 * gradient the loss falls by 1e-6 * |gradient|^2; other masks in the backward pass would break that.
    slope = (loss_at(1.0) - loss_at(-1.0)) / 2e-6
    assert slope == pytest.approx(-squared_norm, rel=0.02)


def test_gradient_checkpointing_is_undone_even_when_training_fails(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Interrupting(Recorder):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            raise Interrupted

    model = add_adapter(build_model(), dropout=0.1)
    classes = [type(module) for module in model.modules()]

    with pytest.raises(Interrupted):
        train(
            tmp_path,
            build_pairs(4),
            model,
            steps_per_report=1,
            grad_checkpoint=True,
            qat_enable=True,
            callback=Interrupting(),
        )

    assert [type(module) for module in model.modules()] == classes


@pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="compilation on a Linux CPU needs g++"
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"scoring": "shared", "loss_type": "simpo", "cpo_alpha": 0.5},
        {"scoring": "plain", "loss_type": "alphapo", "cpo_alpha": 0.5},
        {"scoring": "plain", "seq_step_size": 4},
    ],
)
@pytest.mark.slow
def test_a_compiled_step_trains_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    arguments |= {"iters": 4, "qat_enable": True, "qat_bits": 4, "qat_start_step": 2}
    eager = train(tmp_path, build_pairs(9), **arguments)
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    mx.enable_compile()
    try:
        compiled = train(tmp_path, build_pairs(9), compile=True, **arguments)
    finally:
        mx.disable_compile()

    assert_same(compiled, eager, tolerance=1e-3)


@pytest.mark.parametrize("num_layers", [-1, 1])
def test_short_and_long_answers_make_up_one_step(tmp_path: Path, num_layers: int) -> None:
    pairs = build_pairs(5)
    pairs[0] = build_pairs(1, seed=1, longest=60)[0]
    long = replace(pairs[0], chosen=np.tile(pairs[0].chosen, 9), chosen_scored=np.tile(pairs[0].chosen_scored, 9))
    pairs[0] = long

    def run(**arguments: Any) -> dict[str, np.ndarray]:
        model = build_model()
        model.freeze()
        for layer in model.layers[-num_layers if num_layers > 0 else 0 :]:
            layer.unfreeze()
        return train(tmp_path, pairs, model, iters=2, batch_size=5, **arguments)

    plain = run(scoring="plain")
    assert_same(run(scoring="shared"), plain, tolerance=1e-4)
    assert_same(run(scoring="shared", seq_step_size=100), plain, tolerance=1e-4)


def test_recurrent_models_train(tmp_path: Path) -> None:
    mx.random.seed(0)
    model = mamba.Model(
        mamba.ModelArgs(
            model_type="mamba", vocab_size=96, hidden_size=32, intermediate_size=64, state_size=4, num_hidden_layers=2,
            conv_kernel=3, use_bias=False, use_conv_bias=True, time_step_rank=4,
        )
    )  # fmt: skip
    callback = Recorder()

    train(tmp_path, build_pairs(4), add_adapter(model), iters=8, steps_per_report=1, callback=callback)

    assert callback.train[-1]["train_loss"] < callback.train[0]["train_loss"]


def test_full_fine_tuning_trains_every_parameter(tmp_path: Path) -> None:
    model = build_model()
    before = parameters(model)

    after = train(tmp_path, build_pairs(8), model)

    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path: Path) -> None:
    pairs = build_pairs(6)
    model = add_adapter(build_model(), dropout=0.5)
    callback = Recorder()

    train(
        tmp_path,
        pairs,
        model,
        pairs,
        callback,
        optimizers.SGD(0.0),
        iters=2,
        batch_size=6,
        steps_per_report=1,
        steps_per_eval=1,
    )

    assert callback.train[0]["train_loss"] != callback.train[1]["train_loss"]
    assert len({info["val_loss"] for info in callback.valid}) == 1
    assert not model.training


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("seq_step_size", [None, 4])
def test_what_is_validated_and_when_changes_no_weight(
    grad_checkpoint: bool, seq_step_size: int | None, tmp_path: Path
) -> None:
    def run(name: str, val_pairs: list[PreferencePair] | None, **arguments: Any) -> dict[str, np.ndarray]:
        mx.random.seed(0)
        return train(
            tmp_path / name,
            build_pairs(6),
            add_adapter(build_model(), dropout=0.3),
            val_pairs,
            grad_checkpoint=grad_checkpoint,
            seq_step_size=seq_step_size,
            **arguments,
        )

    trained = run("alone", None)

    assert_same(run("often", build_pairs(5, 1), steps_per_eval=1), trained)
    assert_same(run("at the end", build_pairs(2, 2), steps_per_eval=100), trained)


def test_evaluation_is_the_mean_over_pairs_whatever_the_batch_size() -> None:
    model, pairs = build_model(), build_pairs(11)
    alone = [evaluate_cpo(model, [pair], 1, -1, 0.5, 50.0, 2048, "sigmoid") for pair in pairs]

    for batch_size in (1, 3, 4, 50):
        loss, rewards, tokens, means = evaluate_cpo(model, pairs, batch_size, -1, 0.5, 50.0, 2048, "sigmoid")

        assert loss == pytest.approx(np.mean([result[0] for result in alone]), rel=1e-5)
        assert rewards == pytest.approx(np.mean([result[1] for result in alone], axis=0), rel=1e-5)
        assert tokens == sum(result[2] for result in alone)
        assert means["accuracies"] == pytest.approx(np.mean([result[3]["accuracies"] for result in alone]))
        assert means["margins"] == pytest.approx(rewards[0] - rewards[1], rel=1e-4)


def test_reports_have_the_names_that_the_host_gives_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Recorder()

    train(tmp_path, build_pairs(6), None, build_pairs(3, 1), callback, iters=4, steps_per_report=2, steps_per_eval=3)

    assert set(callback.train[0]) >= {
        "iteration", "train_loss", "train_chosen_reward", "train_rejected_reward", "train_accuracies", "train_margins",
        "train_policy_rejected_logps", "train_policy_chosen_logps", "train_rejected_logits_mean",
        "train_chosen_logits_mean", "train_nll_loss", "learning_rate", "iterations_per_second", "tokens_per_second",
        "trained_tokens", "peak_memory", "train_gradient_norm", "optimizer_steps",
    }  # fmt: skip
    assert set(callback.valid[0]) >= {
        "iteration", "val_loss", "val_chosen_reward", "val_rejected_reward", "val_accuracies", "val_margins",
        "val_policy_rejected_logps", "val_policy_chosen_logps", "val_chosen_logits_mean", "val_rejected_logits_mean",
        "val_nll_loss", "val_time",
    }  # fmt: skip
    assert [info["iteration"] for info in callback.train] == [2, 4]
    assert [info["iteration"] for info in callback.valid] == [1, 3, 4]
    lines = capsys.readouterr().out
    assert "Iter 1: Val loss " in lines
    assert "Iter 4: loss " in lines
    (line,) = [line for line in lines.splitlines() if line.startswith("Iter 4: loss ")]
    # What MLX LoRA Studio looks for.
    for name in ("loss", "chosen_r", "rejected_r", "lr", "it/s", "tok/s", "peak_mem"):
        assert re.search(rf"\b{name} -?\d", line), name
    (line,) = [line for line in lines.splitlines() if line.startswith("Iter 4: Val ")]
    for name in ("loss", "chosen reward", "rejected reward", "accuracy", "margin", "took"):  # the host's
        assert re.search(rf"\bVal {name} -?\d", line), name
    assert f"Saved final weights to {tmp_path / 'adapters.safetensors'}." in lines


def test_the_loss_that_is_reported_holds_the_likelihood(tmp_path: Path) -> None:
    def report(cpo_alpha: float) -> tuple[dict[str, Any], dict[str, Any]]:
        callback = Recorder()
        train(tmp_path, build_pairs(6), None, build_pairs(3), callback, iters=1, cpo_alpha=cpo_alpha)
        return callback.train[0], callback.valid[0]

    for kind, without, with_nll in zip(("train", "val"), report(0.0), report(0.5), strict=True):
        assert with_nll[f"{kind}_nll_loss"] == pytest.approx(without[f"{kind}_nll_loss"])
        expected = without[f"{kind}_loss"] + 0.5 * with_nll[f"{kind}_nll_loss"]
        assert with_nll[f"{kind}_loss"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_likelihood_term_makes_the_chosen_answers_more_likely(tmp_path: Path) -> None:
    def chosen_nll(cpo_alpha: float) -> float:
        callback = Recorder()
        train(
            tmp_path,
            build_pairs(8),
            callback=callback,
            iters=20,
            batch_size=8,
            steps_per_report=1,
            cpo_alpha=cpo_alpha,
            optimizer=optimizers.Adam(1e-2),
        )
        return callback.train[-1]["train_nll_loss"] - callback.train[0]["train_nll_loss"]

    assert chosen_nll(5.0) < min(0, chosen_nll(0.0))


def test_every_report_is_appended_to_the_metrics_file(tmp_path: Path) -> None:
    train(tmp_path, build_pairs(4), None, build_pairs(2), iters=2, steps_per_report=1)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert [line["kind"] for line in lines] == ["valid", "train", "train", "valid"]
    assert all(np.isfinite(line["train_loss"]) for line in lines if line["kind"] == "train")


@pytest.mark.slow
def test_training_prefers_the_chosen_answers_in_the_end(tmp_path: Path) -> None:
    model, pairs = build_model(), build_pairs(12)
    for pair in pairs:  # what there is to learn: chosen answers use the first half of the vocabulary
        pair.chosen[:], pair.rejected[:] = pair.chosen % 48, 48 + pair.rejected % 48

    train(tmp_path, pairs, model, iters=60, batch_size=4, optimizer=optimizers.Adam(1e-2))

    assert evaluate_cpo(model, pairs, 4, -1, 0.1, 50.0, 2048, "sigmoid")[3]["accuracies"] == 1.0


def test_a_loss_function_can_be_given_directly(tmp_path: Path) -> None:
    model = add_adapter(build_model())
    callback = Recorder()

    train_cpo(
        model,
        optimizers.SGD(0.0),
        build_pairs(4),
        args=CPOTrainingArgs(iters=1, adapter_file=str(tmp_path / "adapters.safetensors")),
        loss_fn=lambda chosen_logps, rejected_logps, beta: mx.full(chosen_logps.shape, 7 * beta),
        training_callback=callback,
    )

    assert callback.train[0]["train_loss"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("arguments", "key", "allowed"),
    [
        ({"beta": 0.0}, "beta", "a number > 0"),
        ({"batch_size": 0}, "batch_size", "a whole number >= 1"),
        ({"iters": None}, "iters", "a whole number >= 1"),
        ({"seq_step_size": 0}, "seq_step_size", "a whole number >= 2"),
        ({"cpo_alpha": -0.1}, "cpo_alpha", "a number >= 0"),
        ({"save_best": "speed"}, "save_best", "one of margin, accuracy, loss"),
        ({"loss_type": "ipo", "loss_options": {"label_smoothing": 0.1}}, "label_smoothing", "sigmoid, simpo, alphapo"),
        ({"qat_bits": 1}, "qat_bits", "a whole number from 2 to 16"),
        (
            {"qat_enable": True, "qat_quantizer": "mlx", "qat_bits": 7},
            "qat_bits",
            "one of 2, 3, 4, 5, 6, 8 with qat_quantizer: mlx",
        ),
        ({"loss_type": "kto"}, "loss_type", "sigmoid, hinge, ipo, dpop, simpo, alphapo"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], key: str, allowed: str
) -> None:
    with refused(ConfigError, key=key, allowed=allowed):
        train(tmp_path, build_pairs(2), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_no_pairs_are_an_error(tmp_path: Path) -> None:
    with refused(DataError, "to train on", key="data"):
        train(tmp_path, [])
