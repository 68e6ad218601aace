"""The peak of a run's memory is estimated, corrected by its first step, and warned of where it may not suffice."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.architectures import ARCHITECTURES, build_architecture
from support.devices import pretended
from support.memory_errors import OUT_OF_MEMORY
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.commands.check import memory_estimate as memory_estimate_of
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import CPU, METAL, BufferLimit
from mlx_cpo_plugin.errors import TrainingError, is_device_fault, is_out_of_memory
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model import memory
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping, grouping_for
from mlx_cpo_plugin.model.layers import linear_layers
from mlx_cpo_plugin.model.parity import choose_scorer, expected_grouping
from mlx_cpo_plugin.model.products import widened_bytes
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.run.building import unevaluated_model
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.training import memory_estimate
from mlx_cpo_plugin.training.exits import out_of_memory_explained
from mlx_cpo_plugin.training.gradients import gradients_for
from mlx_cpo_plugin.training.memory_estimate import MemoryEstimate
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.quantizer import KernelOperand
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo
from mlx_cpo_plugin.training.wiring import training_environment, work_of

VOCABULARY = 2000
# How far from the measured peak an estimate may be.
OFF = 1.3


def kept_bytes(model: nn.Module) -> int:
    return sum(memory.kept_bytes_of_layers(model))


def larger_model(**overrides: Any) -> nn.Module:
    """A model whose weights and activations are counted in megabytes."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    return build_model(**(sizes | {"num_attention_heads": 2, "num_key_value_heads": 1} | overrides))


def pairs_of(prompt: int, chosen: int, rejected: int, count: int = 2) -> list[PreferencePair]:
    """Random pairs of these lengths, whose answers differ from their first token on."""
    generator = np.random.default_rng(0)

    def tokens(length: int, first: int) -> np.ndarray:
        return np.append(first, generator.integers(3, VOCABULARY, length - 1)).astype(np.int32)

    return [
        PreferencePair(
            tokens(prompt, 0),
            tokens(chosen, 1),
            tokens(rejected, 2),
            np.ones(chosen, bool),
            np.ones(rejected, bool),
            source=f"row {number}",
        )
        for number in range(count)
    ]


def estimate(model: nn.Module, pairs: list[PreferencePair], args: CPOTrainingArgs) -> MemoryEstimate:
    optimizer = optimizers.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    scorer = choose_scorer(model, pairs, args.scoring)
    return MemoryEstimate(model, optimizer, pairs, args, None if scorer is None else scorer.grouping)


def measured(model: nn.Module, pairs: list[PreferencePair], args: CPOTrainingArgs) -> int:
    """Train, and return the most bytes that MLX held, without those that other tests left behind."""
    gc.collect()
    weights = sum(array.nbytes for array in by_name(model.parameters()).values())
    others = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    train_cpo(model, optimizers.Adam(1e-4), pairs, None, args)
    return mx.get_peak_memory() - others


CASES: dict[str, tuple[bool, dict[str, Any], list[PreferencePair], dict[str, Any]]] = {
    "LoRA, long prompt": (True, {}, pairs_of(300, 40, 36), {}),
    "LoRA, long answers": (True, {}, pairs_of(60, 280, 270), {}),
    "LoRA, pairs in one pass": (True, {}, pairs_of(30, 20, 18, count=8), {"batch_size": 8}),
    "all weights, Adam": (False, {"hidden_size": 256}, pairs_of(100, 40, 36), {}),
    "all weights, accumulated": (
        False,
        {"hidden_size": 256},
        pairs_of(100, 40, 36, count=4),
        {"batch_size": 2, "gradient_accumulation_steps": 2, "iters": 4},
    ),
    "checkpointed": (True, {"num_hidden_layers": 8}, pairs_of(300, 40, 36), {"grad_checkpoint": True}),
    "in segments": (True, {}, pairs_of(400, 70, 60), {"seq_step_size": 96}),
    "plain": (True, {}, pairs_of(150, 30, 28), {"batch_size": 2, "scoring": "plain"}),
    "LoRA over half precision": (True, {"dtype": mx.bfloat16}, pairs_of(300, 40, 36), {}),
    "half precision, plain": (
        True,
        {"dtype": mx.bfloat16},
        pairs_of(150, 30, 28),
        {"batch_size": 2, "scoring": "plain"},
    ),
    "plain, many words": (True, {"vocab_size": 12000}, pairs_of(60, 30, 28), {"batch_size": 2, "scoring": "plain"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_estimate_is_near_what_is_measured(name: str, tmp_path: Path) -> None:
    adapter, sizes, pairs, settings = CASES[name]
    model = larger_model(**{name: value for name, value in sizes.items() if name != "dtype"})
    model.set_dtype(sizes.get("dtype", mx.float32))
    if adapter:
        add_adapter(model)
    mx.eval(model.parameters())
    defaults = {"iters": 1, "batch_size": 1, "adapter_file": str(tmp_path / "adapters.safetensors")}
    args = CPOTrainingArgs(**(defaults | settings))

    expected = estimate(model, pairs, args)
    peak = measured(model, pairs, args)

    assert peak / OFF <= expected.total <= OFF * peak
    assert peak - expected.weights > 8e6


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.slow
def test_memory_of_a_pair_in_segments_grows_with_its_tokens_and_not_with_their_square(
    grad_checkpoint: bool,
) -> None:
    model = add_adapter(build_model(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY))
    args = CPOTrainingArgs(batch_size=1, seq_step_size=8, grad_checkpoint=grad_checkpoint)

    def peak(tokens: int) -> int:
        (pair,) = pairs_of(tokens, tokens // 2, tokens // 2, count=1)
        with training_environment(model, args):
            method = gradients_for(model, objective_for("sigmoid", {}), SharedPromptScorer(model), [pair], step_size=8)
            gc.collect()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(method([pair], StepTotals.of([pair])))
        return mx.get_peak_memory() - before

    assert peak(512) < 2.5 * peak(256)


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_kernels_hold_neither_scores_of_attention_nor_weights_that_are_widened() -> None:
    pairs, model = pairs_of(400, 50, 50), larger_model()
    model.set_dtype(mx.bfloat16)
    add_adapter(model)

    without = estimate_of(pairs, model, seq_step_size=64)
    with library.used():
        with_kernels = estimate_of(pairs, model, seq_step_size=64)

    assert widened_bytes(model) > 0
    assert without.constant - with_kernels.constant == widened_bytes(model)
    assert without.heads > with_kernels.heads == 0
    assert without.widening > with_kernels.widening == 0


@pytest.mark.parametrize("qat_enable", [False, True])
@pytest.mark.usefixtures("kernels")
def test_a_run_that_is_checked_has_the_kernels_that_it_would_have(
    qat_enable: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.resolve({"train_mode": "cpo", "train": True, "model": str(model_folder), "iters": 2}).settings
    settings.qat_enable = qat_enable

    estimate = memory_estimate_of(unevaluated_model(settings), settings, pairs_of(20, 5, 5))

    assert estimate.heads == 0
    assert not library.in_use()


def estimate_of(
    pairs: list[PreferencePair],
    model: nn.Module | None = None,
    grouping: Grouping | None = PAIR_BY_PAIR,
    **settings: Any,
) -> MemoryEstimate:
    """An estimate of a model with an adapter, pairs one by one."""
    model = model or add_adapter(larger_model())
    optimizer = optimizers.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    return MemoryEstimate(model, optimizer, pairs, CPOTrainingArgs(**({"batch_size": 1} | settings)), grouping)


def test_the_longest_pair_counts_and_is_named() -> None:
    pairs = [*pairs_of(20, 10, 10), *pairs_of(200, 40, 40), *pairs_of(20, 10, 10)]
    longest = replace(pairs[2], source="row 7")
    pairs[2] = longest

    found = estimate_of([*pairs[:3], *pairs[4:]])

    assert found.largest == longest
    assert found.computing == estimate_of([longest]).computing


def test_answers_side_by_side_can_take_more_than_longer_ones_in_turn() -> None:
    side_by_side, in_turn = pairs_of(100, 256, 256, count=1), pairs_of(100, 300, 300, count=1)

    assert estimate_of(side_by_side).computing > estimate_of(in_turn).computing
    assert estimate_of(side_by_side + in_turn).computing == estimate_of(side_by_side).computing


@pytest.mark.parametrize("batch", [{"batch_size": 4}, {"batch_tokens": 200}], ids=str)
def test_several_pairs_in_a_pass_count_together(batch: dict[str, Any]) -> None:
    pairs = pairs_of(20, 15, 15, count=8)

    grouped = estimate_of(pairs, grouping=grouping_for(larger_model()), **batch)

    assert grouped.computing > estimate_of(pairs, **batch).computing


@pytest.mark.parametrize("scoring", [PAIR_BY_PAIR, None])
def test_an_accumulated_gradient_is_held_beside_the_new_one(scoring: Grouping | None) -> None:
    model, pairs = larger_model(), pairs_of(20, 10, 10)
    gradient = sum(value.nbytes for value in by_name(model.trainable_parameters()).values())

    one = estimate_of(pairs, model, scoring)
    accumulated = estimate_of(pairs, model, scoring, gradient_accumulation_steps=2)

    assert accumulated.computing - one.computing == pytest.approx(gradient, rel=1e-6)


def test_a_gelu_keeps_what_its_gradient_reads_and_a_lean_swiglu_nothing() -> None:
    model = build_architecture("gemma3_text")
    inner = max(module.weight.shape[0] for module in linear_layers(model.layers[0]))
    products = sum(sum(module.weight.shape) for module in linear_layers(model.layers[0]))

    assert memory.kept_bytes_of_layers(model)[0] == 4 * (products + 4 * inner)
    llama = larger_model()
    assert kept_bytes(llama) == 4 * sum(sum(m.weight.shape) for layer in llama.layers for m in linear_layers(layer))


@pytest.mark.parametrize("setting", [{"grad_checkpoint": True}, {"seq_step_size": 64}])
def test_what_saves_memory_lowers_the_estimate(setting: dict[str, Any]) -> None:
    model = add_adapter(larger_model(num_hidden_layers=12))
    pairs = pairs_of(400, 50, 50)

    assert estimate_of(pairs, model, **setting).total < 0.7 * estimate_of(pairs, model).total


def test_layers_below_the_first_that_is_trained_keep_nothing() -> None:
    model = larger_model()
    model.freeze()
    model.layers[2].unfreeze()

    kept = memory.kept_bytes_of_layers(model)

    assert kept[:2] == [0, 0]
    assert kept[2] == kept[3] > 0


@pytest.mark.parametrize("change", ["half", "dropout", "dora"])
def test_an_adapter_keeps_more_with_dropout_dora_or_a_model_in_half_precision(change: str) -> None:
    plain = kept_bytes(add_adapter(larger_model()))
    model = larger_model()
    if change == "half":
        model.set_dtype(mx.bfloat16)
        plain //= 2
    with pretended(METAL if change == "half" else CPU):
        changed = kept_bytes(add_adapter(model, dora=change == "dora", dropout=0.1 if change == "dropout" else 0.0))

    assert changed > plain


def test_fake_quantisation_keeps_the_weights_rounding_errors() -> None:
    pairs = pairs_of(100, 20, 20)
    model = larger_model()
    linear = sum(module.weight.nbytes for layer in model.layers for module in linear_layers(layer))

    more = estimate_of(pairs, qat_enable=True).total - estimate_of(pairs).total

    assert more == linear  # the head's are there in blocks


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.usefixtures("kernels")
def test_rounded_weights_are_counted_as_the_kernels_keep_them(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, arguments = pairs_of(100, 20, 20), {"qat_enable": True, "qat_bits": bits, "qat_group_size": 64}
    update = KernelOperand.update
    kept: list[KernelOperand] = []
    monkeypatch.setattr(KernelOperand, "update", lambda operand: [kept.append(operand), update(operand)])
    train_cpo(
        add_adapter(larger_model(intermediate_size=200)),
        optimizers.SGD(0.05),
        pairs,
        None,
        CPOTrainingArgs(iters=1, adapter_file=str(tmp_path / "adapters.safetensors"), **arguments),
    )
    model = add_adapter(larger_model(intermediate_size=200))

    with library.used():
        more = estimate_of(pairs, model, **arguments).total - estimate_of(pairs, model).total

    assert more == sum(array.nbytes for operand in kept for array in operand.weight.arrays)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_an_estimate(name: str) -> None:
    model = build_architecture(name)
    pairs = build_pairs(4)

    for grouping in (PAIR_BY_PAIR, None):
        assert estimate_of(pairs, model, grouping=grouping).computing > 0


@pytest.mark.parametrize(
    ("name", "by_layer", "layers"),
    [
        ("llama", 2 * 2 * 8, 2),
        ("phi3", 2 * 2 * 8, 2),  # whose keys come out of one product with queries and values
        ("gpt_neox", 2 * 4 * 8, 2),
        ("deepseek_v3", 16 + 8, 2),  # latent, and the part with positions
        ("gemma4_text", 2 * 2 * (8 + 16) / 2, 2),  # the other two layers read those of the first
        ("lfm2", 2 * 2 * 8, 1),  # the others are convolutions
        ("mamba", 0, 2),
    ],
)
def test_keys_and_values_of_a_token_are_counted_whatever_makes_them(name: str, by_layer: float, layers: int) -> None:
    model = add_adapter(build_architecture(name), dropout=0.5)
    mx.random.seed(3)
    state = np.array(mx.random.state[0])

    assert memory.remembered_by_token(model) == by_layer * layers
    assert np.array_equal(np.array(mx.random.state[0]), state)
    assert model.training


def test_a_model_that_cannot_be_asked_for_them_has_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("cache")

    model = build_model()
    monkeypatch.setattr(type(model), "__call__", refuse)

    assert memory.remembered_by_token(model) == 0


def test_the_layers_of_a_model_with_code_of_its_own_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    before = memory.kept_bytes_of_layers(model)

    monkeypatch.setattr(type(model.layers[0]), "__module__", "custom_model")  # which mlx_lm registers nowhere

    assert min(memory.kept_bytes_of_layers(model)) >= min(before)


def test_the_work_of_a_run_is_that_of_its_tokens() -> None:
    model, pairs = build_model(), pairs_of(20, 12, 8, count=10)
    least = 6 * sum(array.size for array in by_name(model.parameters()).values())

    assert work_of(model, CPOTrainingArgs(batch_size=2, iters=5), pairs) == least * 5 * 2 * pairs[0].tokens
    assert work_of(model, CPOTrainingArgs(batch_size=2, batch_tokens=400, iters=5), pairs) == least * 5 * 400
    assert work_of(model, CPOTrainingArgs(batch_size=2, iters=None), pairs) == least * 10 * pairs[0].tokens


def test_the_line_gives_the_parts_in_gigabytes(peak: list[int]) -> None:
    found = estimate_of(pairs_of(20, 10, 10))
    found.weights, found.optimizer, found.computing = 540_000_000, 110_000_000, 480_000_000

    assert found.lines(18_800_000_000) == [
        "Estimate: about 1.1 GB of memory (weights 0.5 GB, optimizer 0.1 GB, gradients and activations 0.5 GB with the "
        "largest pair, row 0); this device has 18.8 GB."
    ]


def test_more_than_the_device_has_is_a_warning_that_says_what_to_lower(peak: list[int]) -> None:
    found = estimate_of(pairs_of(20, 10, 10))

    assert len(found.lines(found.total)) == 1
    _, warning = found.lines(found.total - 1)
    assert warning == (
        "Warning: this device has less memory than that; lower max_seq_length, batch_size or batch_tokens, or switch "
        "on grad_checkpoint or efficient_long_context."
    )


class BufferLimits(TrainingCallback):
    """Stands in for MLX's limit of freed buffers, and keeps what it is after each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: int, fails: bool = False) -> None:
        self.now, self.after_steps, self.fails = before, list[int](), fails
        monkeypatch.setattr(mx, "set_cache_limit", self._set)

    def _set(self, limit: int) -> int:
        before, self.now = self.now, limit
        return before

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.after_steps.append(self.now)
        if self.fails:
            raise RuntimeError


def train_on_a_gpu(folder: Path, limits: BufferLimits) -> float:
    """Train, and return the bytes that a step was expected to take."""
    pairs, model = pairs_of(300, 40, 36), add_adapter(larger_model())
    args = CPOTrainingArgs(iters=3, steps_per_report=1, adapter_file=str(folder / "adapters.safetensors"))
    mx.eval(model.parameters())
    gc.collect()
    mx.reset_peak_memory()
    with pretended(METAL), pytest.raises(RuntimeError) if limits.fails else nullcontext():
        expected = estimate(model, pairs, args).computing
        train_cpo(model, optimizers.Adam(1e-4), pairs, None, args, training_callback=limits)
    return expected


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("before", [10**12, 1000], ids=["MLX's own limit", "a low one of the user's"])
def test_on_a_gpu_freed_buffers_are_kept_up_to_what_a_step_takes_and_as_before_once_a_run(
    fails: bool, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = BufferLimits(monkeypatch, before, fails)

    expected = train_on_a_gpu(tmp_path, limits)

    assert min(before, round(expected)) <= limits.after_steps[0] <= min(before, OFF * expected)
    assert limits.now == before


def test_what_others_hold_in_the_process_is_not_taken_for_the_steps_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = mx.zeros(100_000_000, mx.uint8)
    mx.eval(others)
    limits = BufferLimits(monkeypatch, 10**12)

    expected = train_on_a_gpu(tmp_path, limits)

    assert expected <= limits.after_steps[-1] <= OFF * expected


def test_more_of_them_are_kept_where_the_first_step_takes_more_than_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = BufferLimits(monkeypatch, 10**12)
    monkeypatch.setattr(MemoryEstimate, "_activations", lambda self, pair: 1.0)

    expected = train_on_a_gpu(tmp_path, limits)

    assert limits.after_steps[0] > 10 * expected


def test_a_limit_of_freed_buffers_is_only_raised_and_never_above_that_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [500]

    def set_cache_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    def after(change: Callable[[], object]) -> int:
        change()
        return limits[-1]

    monkeypatch.setattr(mx, "set_cache_limit", set_cache_limit)
    with pretended(METAL):
        buffers = BufferLimit(100)

        assert limits[-1] == 100
        assert [after(partial(buffers.raise_to, size)) for size in (300, 200, 900)] == [300, 300, 500]
        assert after(buffers.undo) == 500


def test_a_cpu_keeps_freed_buffers_as_it_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_cache_limit", pytest.fail)

    with pretended(CPU):
        buffers = BufferLimit(100)
        buffers.raise_to(200)
        buffers.undo()


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The peak that MLX reports, on a device with so much memory that small models matter."""
    peak = [0]
    monkeypatch.setattr(mx, "get_peak_memory", lambda: peak[0])
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.setattr(memory_estimate, "device_memory", lambda: 10**8)
    return peak


@pytest.mark.parametrize("factor", [0.5, 1.1, 2.0])
def test_the_first_step_corrects_the_estimate_and_one_line_says_so_where_it_was_far_off(
    peak: list[int], factor: float
) -> None:
    short, long = pairs_of(100, 60, 60), pairs_of(250, 60, 60)
    found, first = estimate_of(short + long), estimate_of(short)
    fixed, before = found.weights + found.optimizer, found.total

    found.risk(short, step=1)
    peak[0] = round(fixed + factor * first.computing)
    lines = found.corrected()

    assert found.total - fixed == pytest.approx(factor * (before - fixed), rel=1e-6)
    if factor == 1.1:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"Estimate after the first step: about {found.total / 1e9:.3f} GB of memory (weights ")


def test_what_others_hold_is_missing_to_the_run(peak: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = estimate_of(pairs_of(100, 60, 60))
    others = 5 * 10**6
    monkeypatch.setattr(mx, "get_active_memory", lambda: alone.weights + alone.optimizer + others)
    peak[0] = others
    found = estimate_of(pairs_of(100, 60, 60))

    assert found.total == alone.total
    assert len(found.lines(alone.total + others)) == 1
    _, warning = found.lines(alone.total + others - 1)
    assert warning.startswith(
        "Warning: this device has less memory than that beside the 0.005 GB that this process holds already; lower "
    )
    assert " beside " not in found.lines(alone.total - 1)[1]


def test_that_loading_took_more_than_training_will_is_told(peak: list[int]) -> None:
    peak[0] = 3 * 10**9
    found = estimate_of(pairs_of(100, 60, 60))

    _, note = found.lines(4 * 10**9)

    assert "3.0 GB" in note
    assert len(found.lines(4 * 10**11)) == 1  # for such a device it is nothing


def test_the_second_step_corrects_what_the_first_one_could_not_show_and_later_ones_nothing(peak: list[int]) -> None:
    found = estimate_of(pairs_of(100, 60, 60))
    found.risk([found.largest], step=1)

    for step, total in (("first", 10**8), ("second", 2 * 10**8)):
        peak[0] = total
        line, *_ = found.corrected()
        assert line.startswith(f"Estimate after the {step} step: about {total / 1e9:.1f} GB of memory (weights ")
        assert found.total == pytest.approx(total, rel=1e-6)
    peak[0] *= 2
    assert found.corrected() == []


def test_a_corrected_estimate_that_the_device_has_not_is_warned_of(peak: list[int]) -> None:
    found = estimate_of(pairs_of(100, 60, 60))

    found.risk([found.largest], step=1)
    peak[0] = 10**8 + 1
    _, warning = found.corrected()

    assert warning.startswith("Warning: this device has less memory than that; lower ")


def test_a_peak_from_before_the_run_corrects_nothing(peak: list[int]) -> None:
    peak[0] = 10**8
    found = estimate_of(pairs_of(100, 60, 60))
    before = found.total

    found.risk([found.largest], step=1)

    assert found.corrected() == []
    assert found.total == before


def test_a_rank_without_pairs_in_the_first_step_corrects_nothing(peak: list[int]) -> None:
    found = estimate_of(pairs_of(100, 60, 60))
    before = found.total

    peak[0] = 10**8

    assert found.corrected() == []
    assert found.total == before


def test_no_line_looks_like_a_report_of_training(peak: list[int]) -> None:
    found = estimate_of(pairs_of(100, 60, 60))
    found.widening = 1
    lines = found.lines(found.total + 1)
    found.risk([found.largest], step=1)
    peak[0] = 10**8 + 1
    lines += found.corrected()

    # What MLX LoRA Studio takes for one.
    reports = ("loss", "memory:", "peak mem", "peak_mem", "it/s")
    assert len(lines) == 4
    assert not [line for line in lines if any(part in line.lower() for part in reports)]


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_half_precision_that_would_fit_in_float32_is_told_how_to_get_there(peak: list[int]) -> None:
    pairs = pairs_of(200, 40, 40)
    half = larger_model()
    half.set_dtype(mx.bfloat16)
    half, wide = estimate_of(pairs, add_adapter(half)), estimate_of(pairs)

    assert wide.widening == 0
    assert half.weights + half.widening == pytest.approx(wide.weights, rel=0.01)
    _, note = half.lines(half.total + half.widening)
    assert note.startswith("note: ")
    assert f" {(half.total + half.widening) / half.total:.1f} times the memory" in note
    assert len(half.lines(half.total + half.widening - 1)) == len(wide.lines(10**12)) == 1

    on_gpu = larger_model()
    on_gpu.set_dtype(mx.bfloat16)
    with pretended(METAL):
        assert estimate_of(pairs, on_gpu).widening == 0


def test_a_run_reports_what_its_own_settings_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, said = pairs_of(60, 20, 20), []
    for number, saving in enumerate([{}, {"grad_checkpoint": True}]):
        file = str(tmp_path / str(number) / "adapters.safetensors")
        args = CPOTrainingArgs(batch_size=1, iters=1, adapter_file=file, **saving)
        train_cpo(add_adapter(larger_model()), optimizers.Adam(1e-4), pairs, None, args)
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("Estimate: ")]

    line = r"Estimate: about 0\.0\d+ GB of memory \(.* with the largest pair, row 0\); this device has .*"
    assert all(re.fullmatch(line, each) for each in said)
    assert said[0] != said[1]


def test_a_run_says_once_after_its_first_step_that_the_estimate_was_far_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryEstimate, "_activations", lambda *_: 10**10)
    args = CPOTrainingArgs(
        batch_size=1,
        gradient_accumulation_steps=2,
        iters=6,
        steps_per_report=1,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )

    gc.collect()  # or what other tests have left is freed meanwhile, and the step's peak is none
    mx.reset_peak_memory()
    train_cpo(add_adapter(larger_model()), optimizers.Adam(1e-4), pairs_of(60, 20, 20), None, args)

    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": " in line]
    said = [line for line in printed if line.startswith(("Estimate", "Iter"))]
    assert said == ["Estimate", "Iter 1", "Estimate after the first step", *(f"Iter {at}" for at in range(2, 7))]


def settings_for(model_folder: Path, **given: Any) -> SimpleNamespace:
    return config.resolve({"train": True, "train_mode": "cpo", "model": str(model_folder), **given}).settings


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"train_type": "full"},
        {"train_type": "full", "num_layers": 1},
        {"train_type": "dora"},
        {"load_in_4bits": True},
    ],
    ids=str,
)
def test_a_model_that_is_not_loaded_has_the_shapes_of_one_that_is(model_folder: Path, given: dict[str, Any]) -> None:
    from mlx_cpo_plugin.run.building import load_model

    settings = settings_for(model_folder, **given)
    mx.clear_cache()
    before = mx.get_active_memory()
    lazy = unevaluated_model(settings)
    taken = mx.get_active_memory() - before
    loaded, _ = load_model(settings)

    for parameters in ("parameters", "trainable_parameters"):
        shapes = [
            {name: (array.shape, array.dtype) for name, array in by_name(getattr(model, parameters)()).items()}
            for model in (lazy, loaded)
        ]
        assert shapes[0] == shapes[1]
    assert taken < 10_000
    assert memory.kept_bytes_of_layers(lazy) == memory.kept_bytes_of_layers(loaded)


def test_how_pairs_share_a_pass_shows_without_computing(model_folder: Path) -> None:
    assert expected_grouping(unevaluated_model(settings_for(model_folder))) is not None
    assert expected_grouping(build_architecture("qwen3_next")) == PAIR_BY_PAIR
    assert expected_grouping(nn.Linear(1, 1)) is None


@pytest.fixture
def free(peak: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What is free."""
    free: list[int | None] = [None]
    monkeypatch.setattr(memory_estimate, "free_memory", lambda: free[0])
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    return free


def test_where_what_is_free_is_not_known_nothing_is_warned_of(free: list[int | None]) -> None:
    found = estimate_of(build_pairs(2))

    assert found.risk(build_pairs(2), step=1) is None
    free[0] = 0
    assert found.risk(build_pairs(2, longest=40), step=1) is not None


def test_a_micro_batch_that_may_need_more_than_is_free_is_a_warning(free: list[int | None]) -> None:
    pairs = build_pairs(2)
    needed = math.ceil(estimate_of(pairs).computing)

    free[0] = needed
    assert estimate_of(pairs).risk(pairs, step=3) is None
    free[0] = needed - 1
    line = estimate_of(pairs).risk(pairs, step=3)
    assert re.match(r"Step 3: the micro-batch with row [01] may need about .* GB are free; if the process", line or "")


def test_what_the_first_step_took_corrects_what_later_ones_need(free: list[int | None], peak: list[int]) -> None:
    short, long = pairs_of(100, 60, 60), pairs_of(250, 60, 60)
    found = estimate_of(short + long)
    free[0] = round(1.5 * estimate_of(long).computing)

    assert found.risk(short, step=1) is None
    peak[0] = round(found.weights + found.optimizer + 2 * estimate_of(short).computing)
    found.corrected()

    assert found.risk(long, step=2) is not None


def test_a_first_step_that_took_less_than_expected_makes_later_ones_no_less_of_a_risk(
    free: list[int | None], peak: list[int]
) -> None:
    pairs = pairs_of(250, 60, 60)
    found = estimate_of(pairs)
    needed = found.computing
    free[0] = round(10 * needed)

    assert found.risk(pairs, step=1) is None
    peak[0] = round(found.weights + found.optimizer + needed / 2)
    found.corrected()
    free[0] = round(0.9 * needed)

    assert found.computing == pytest.approx(needed / 2, rel=1e-6)
    assert found.risk(pairs, step=2) is not None


def test_what_was_computed_once_is_no_risk_the_second_time(free: list[int | None]) -> None:
    short, long = build_pairs(2, longest=4), build_pairs(2, longest=400)
    found = estimate_of(short + long)
    free[0] = 0

    risks = [found.risk(pairs, step=1) is not None for pairs in (short, short, long, short, long)]

    assert risks == [True, False, True, False, False]


def test_before_a_risk_a_run_warns_and_saves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pairs = build_pairs(6)
    monkeypatch.setattr(memory_estimate, "free_memory", lambda: 2**40 if not risky else 2**20)
    monkeypatch.setattr(MemoryEstimate, "_computing", lambda *_: 2**30)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    risky: list[int] = []
    saved_at: list[list[str]] = []

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            saved_at.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("0*")))
            if train_info["iteration"] == 2:
                risky.append(1)

    train_cpo(
        add_adapter(build_model()),
        optimizers.Adam(learning_rate=1e-3),
        run_pairs,
        args=CPOTrainingArgs(
            adapter_file=str(tmp_path / "adapters.safetensors"), batch_size=1, iters=5, steps_per_report=1
        ),
        training_callback=Callback(),
    )

    assert saved_at == [[], [], ["0000002"], ["0000002"], ["0000002"]]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("warning") == 1


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_known_on_every_device_and_behind_other_errors(error: Exception) -> None:
    wrapped = ValueError("the layer failed")
    wrapped.__cause__ = error

    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    ("error", "of_the_device"),
    [
        (RuntimeError("[matmul] Last dimension of first input with shape (1,2) must match"), False),
        (ValueError("out of memory of the cache"), False),
        (RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"), True),
        (RuntimeError("[Compile::eval_cpu] Failed to compile function"), True),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception, of_the_device: bool) -> None:
    assert not is_out_of_memory(error)
    assert is_device_fault(error) == of_the_device


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)"),
        RuntimeError("cudaMallocAsync(&data, size) failed: out of memory"),
        MemoryError(),
    ],
)
def test_what_a_gpu_says_when_memory_ends_becomes_a_sentence(error: Exception) -> None:
    with (
        pytest.raises(TrainingError, match=r"^The device is out of memory; lower max_seq_length, batch_size or"),
        out_of_memory_explained(),
    ):
        raise error


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^\[matmul\] shapes"), out_of_memory_explained():
        raise RuntimeError("[matmul] shapes do not fit")
