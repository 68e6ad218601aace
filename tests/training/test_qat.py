"""Quantisation-aware training: what is fake-quantised, when, with which gradient, and that it helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm import load
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, load_tokenizer, quantize_model
from support.architectures import build_architecture
from support.refusals import refused
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.batches import StepTotals, collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.demo.run import DEMO_DIR
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.logps import score_answers
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.training import quantizer as quantizers
from mlx_cpo_plugin.training.arguments import check_training_args
from mlx_cpo_plugin.training.gradient_methods import BatchGradients, GradientMethod
from mlx_cpo_plugin.training.gradients import SharedPromptGradients
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.training.quantizer import KernelOperand, Quantizer
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, evaluate_cpo, train_cpo


def quantise(weight: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Symmetric quantisation in float64: each group of the last axis is rounded to 2^bits levels of its own scale."""
    highest = 2 ** (bits - 1) - 1
    groups = weight.astype(np.float64).reshape(*weight.shape[:-1], -1, group_size) if group_size > 0 else weight
    axis = -1 if group_size > 0 else None
    scale = np.abs(groups).max(axis=axis, keepdims=True) / highest
    return (np.clip(np.round(groups / scale), -highest - 1, highest) * scale).reshape(weight.shape)


class OneLayer(nn.Module):
    """A model of a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, *args: mx.array) -> mx.array:
        return self.layer(*args)


def lora(linear: nn.Module, dora: bool = False, dropout: float = 0.0) -> nn.Module:
    layer = (DoRALinear if dora else LoRALinear).from_base(linear, r=4, scale=2.0, dropout=dropout)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    return layer


def layer_of(kind: str) -> nn.Module:
    """A linear layer, or an adapter over one, for example ``dora over 8 bits``."""
    linear: nn.Module = nn.Linear(64, 48)
    if "over" in kind:
        linear = nn.QuantizedLinear.from_linear(linear, group_size=32, bits=int(kind.split()[2]))
    return linear if kind == "linear" else lora(linear, dora=kind.startswith("dora"))


def merged_weight(layer: nn.Module) -> np.ndarray:
    fused = layer.fuse(dequantize=True)
    return np.array(fused.weight, np.float64)


@pytest.fixture
def x() -> mx.array:
    mx.random.seed(1)
    return mx.random.normal((5, 64))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (3, 0)])
@pytest.mark.parametrize("kind", ["linear", "lora", "dora", "lora over 4 bits", "dora over 8 bits"])
def test_the_forward_pass_is_that_of_the_quantised_merged_weight(
    kind: str, bits: int, group_size: int, x: mx.array
) -> None:
    layer = layer_of(kind)
    linear = layer if kind == "linear" else layer.linear
    weight = np.array(layer.weight, np.float64) if kind == "linear" else merged_weight(layer)
    bias = np.array(linear.bias, np.float64)
    model = OneLayer(layer)

    with fake_quantised(model, bits=bits, group_size=group_size, quantizer="host") as quantisation:
        quantisation.active = True
        y = np.array(model(x))

    reference = np.array(x, np.float64) @ quantise(weight, bits, group_size).T + bias
    np.testing.assert_allclose(y, reference, rtol=1e-3, atol=2e-4)
    assert not np.allclose(y, np.array(model(x)), atol=2e-4)


@pytest.mark.parametrize(
    "packing",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 3, "group_size": 64},
        {"bits": 8, "group_size": 64},
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "lora", "dora", "lora over 4 bits"])
def test_by_default_the_forward_pass_is_that_of_the_layer_as_mlx_packs_it(
    kind: str, packing: dict[str, Any], x: mx.array
) -> None:
    layer = layer_of(kind)
    deployed = layer if kind == "linear" else layer.fuse(dequantize=True)
    packed = nn.QuantizedLinear.from_linear(deployed, **packing)
    model = OneLayer(layer)

    with fake_quantised(model, **packing) as quantisation:
        quantisation.active = True
        y = np.array(model(x))

    np.testing.assert_allclose(y, np.array(packed(x)), rtol=1e-3, atol=1e-3)
    assert not np.allclose(y, np.array(model(x)), atol=1e-3)


def test_a_layer_that_mlx_would_not_pack_stays_as_it_is() -> None:
    mx.random.seed(1)
    model, x = OneLayer(nn.Linear(40, 8)), mx.random.normal((2, 40))

    with fake_quantised(model, bits=2, group_size=32) as quantisation:
        quantisation.active = True
        assert np.array_equal(np.array(model(x)), np.array(x @ model.layer.weight.T + model.layer.bias))


def test_bits_that_mlx_does_not_have_are_those_of_the_host_unless_mlx_is_asked_for(x: mx.array) -> None:
    model = OneLayer(nn.Linear(64, 48))

    def output(**arguments: Any) -> np.ndarray:
        with fake_quantised(model, **arguments) as quantisation:
            quantisation.active = True
            return np.array(model(x))

    assert np.array_equal(output(bits=7, group_size=64), output(bits=7, group_size=64, quantizer="host"))
    with refused(ConfigError, key="qat_bits"):
        check_training_args(CPOTrainingArgs(qat_enable=True, qat_bits=7, qat_quantizer="mlx"))
    with refused(ConfigError, key="qat_mode"):
        check_training_args(CPOTrainingArgs(qat_enable=True, qat_mode="mxfp4", qat_quantizer="host"))
    check_training_args(CPOTrainingArgs(qat_bits=7, qat_quantizer="mlx"))  # QAT is off


def test_expert_layers_are_quantised_expert_by_expert() -> None:
    mx.random.seed(1)
    layer = LoRASwitchLinear.from_base(SwitchLinear(32, 16, 3, bias=False), r=2, scale=2.0)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    model, x, indices = OneLayer(layer), mx.random.normal((6, 1, 1, 32)), mx.array([[0], [1], [2], [2], [0], [1]])
    weight = np.array(layer.linear.weight + layer.scale * (layer.lora_b @ layer.lora_a), np.float64)

    with fake_quantised(model, bits=4, group_size=32, quantizer="host") as quantisation:
        quantisation.active = True
        y = np.array(model(x, indices)).reshape(6, 16)

    quantised = quantise(weight, 4, 32)
    reference = [np.array(x, np.float64)[n, 0, 0] @ quantised[e].T for n, e in enumerate(indices[:, 0].tolist())]
    np.testing.assert_allclose(y, reference, rtol=1e-3, atol=2e-4)


def test_the_gradient_passes_straight_through_to_the_adapter(x: mx.array) -> None:
    layer = lora(nn.Linear(64, 48))
    model = OneLayer(layer)
    model.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    upstream = mx.random.normal((5, 48))

    with fake_quantised(model, bits=4, group_size=32) as quantisation:
        quantisation.active = True
        _, gradient = nn.value_and_grad(model, lambda model: (model(x) * upstream).sum())(model)

    wide = {name: np.array(value, np.float64) for name, value in (("x", x), ("g", upstream))}
    lora_a, lora_b = np.array(layer.lora_a, np.float64), np.array(layer.lora_b, np.float64)
    by_b = 2.0 * (wide["x"] @ lora_a).T @ wide["g"]
    by_a = 2.0 * wide["x"].T @ (wide["g"] @ lora_b.T)
    np.testing.assert_allclose(np.array(gradient["layer"]["lora_b"]), by_b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(gradient["layer"]["lora_a"]), by_a, rtol=1e-4, atol=1e-4)


class InLayers(nn.Module):
    """A model of a single layer, where a model has its layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = [layer]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[0](x)


@pytest.mark.parametrize("packing", [{"bits": 4}, {"bits": 3}, {"bits": 4, "quantizer": "host"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "lora", "dora", "lora over 4 bits"])
@pytest.mark.usefixtures("kernels")
def test_the_kernels_have_the_value_and_gradient_of_the_rounded_layer(
    kind: str, packing: dict[str, Any], x: mx.array
) -> None:
    layer = layer_of(kind)
    linear = layer if kind == "linear" else layer.linear
    merged = mx.array(np.array(layer.weight) if kind == "linear" else merged_weight(layer))
    if "quantizer" in packing:
        weight = quantise(np.array(merged), 4, 32)
    else:
        packed = mx.quantize(merged, group_size=32, bits=packing["bits"])
        weight = np.array(mx.dequantize(*packed, group_size=32, bits=packing["bits"]), np.float64)
    model, upstream = InLayers(layer), mx.random.normal((5, 48))
    trained = [name for name in ("lora_a", "lora_b", "m") if name in layer]

    def outcome(x: mx.array, *values: mx.array) -> list[mx.array]:
        for name, value in zip(trained, values, strict=True):
            layer[name] = value
        return [model(x)]

    arguments = [x, *(layer[name] for name in trained)]
    quantisation = fake_quantised(model, group_size=32, kernels=True, **packing)
    with compiled_kernels(model), quantisation as schedule, schedule.during(1):
        (y,), gradients = mx.vjp(outcome, arguments, [upstream])
        mx.eval(y, gradients)

    wide_x, slope, bias = (np.array(array, np.float64) for array in (x, upstream, linear.bias))
    expected = {"x": slope @ weight}
    if trained:
        lora_a, lora_b = np.array(layer.lora_a, np.float64), np.array(layer.lora_b, np.float64)
        if kind == "dora":
            adapted = np.array(linear.weight, np.float64) + 2.0 * (lora_a @ lora_b).T
            lengths = np.linalg.norm(adapted, axis=1)
            expected["m"] = (slope * (wide_x @ adapted.T)).sum(0) / lengths
            slope = slope * np.array(layer.m, np.float64) / lengths
        expected["lora_b"] = 2.0 * (wide_x @ lora_a).T @ slope
        expected["lora_a"] = 2.0 * wide_x.T @ (slope @ lora_b.T)
    np.testing.assert_allclose(np.array(y), wide_x @ weight.T + bias, rtol=1e-4, atol=1e-4)
    for name, gradient in zip(["x", *trained], gradients, strict=True):
        np.testing.assert_allclose(np.array(gradient), expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.usefixtures("kernels")
def test_with_dropout_the_kernels_have_the_value_and_gradient_that_there_are_without_them(
    dora: bool, x: mx.array
) -> None:
    layer = lora(nn.Linear(64, 48), dora=dora, dropout=0.5)
    model, upstream = InLayers(layer), mx.random.normal((5, 48))

    def outcome(x: mx.array, lora_a: mx.array, lora_b: mx.array) -> list[mx.array]:
        layer.lora_a, layer.lora_b = lora_a, lora_b
        return [model(x)]

    arguments, found = [x, layer.lora_a, layer.lora_b], []
    for kernels in (True, False):
        with ExitStack() as stack:
            if kernels:
                stack.enter_context(compiled_kernels(model))
            schedule = stack.enter_context(fake_quantised(model, bits=4, group_size=32, kernels=kernels))
            stack.enter_context(schedule.during(1))
            mx.random.seed(3)
            (y,), gradients = mx.vjp(outcome, arguments, [upstream])
            found.append([np.array(array) for array in (y, *gradients)])

    for with_kernels, without in zip(*found, strict=True):
        np.testing.assert_allclose(with_kernels, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["by rows", "shared prompts", "kernels"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_scores_pairs_as_the_model_that_mlx_packs_does(
    tied: bool, way: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    def policy() -> nn.Module:
        model = build_model(tie_word_embeddings=tied)
        model.set_dtype(getattr(mx, dtype))
        return add_adapter(model)

    pairs, model, packed = build_pairs(4), policy(), policy()
    packed.update_modules(tree_unflatten([(n, m.fuse()) for n, m in packed.named_modules() if hasattr(m, "fuse")]))
    nn.quantize(packed, 32, 4)
    packed.set_dtype(mx.float32)  # which leaves the packed weights, and computes with what they stand for

    objective = objective_for("sigmoid", {"beta": 0.1})
    with ExitStack() as stack:
        stack.enter_context(float32_products(model))
        if way == "kernels":
            request.getfixturevalue("kernels")
            stack.enter_context(compiled_kernels(model))
        quantisation = fake_quantised(model, bits=4, group_size=32, kernels=way == "kernels")
        schedule = stack.enter_context(quantisation)
        method: GradientMethod = BatchGradients(model, objective)
        if way != "by rows":
            scorer = choose_scorer(model, pairs, "shared")
            assert scorer is not None
            method = SharedPromptGradients(model, objective, scorer, scorer.grouping)
        stack.enter_context(schedule.during(1))
        found = method(pairs, StepTotals.of(pairs)).scores
        mx.eval(found)

    expected, tolerance = score_answers(packed, collate(pairs)), 1e-4 if dtype == "float32" else 2e-2
    for name in ("chosen_logps", "rejected_logps", "chosen_logits"):
        np.testing.assert_allclose(
            np.array(getattr(found, name)), np.array(getattr(expected, name)), tolerance, tolerance
        )


@pytest.mark.parametrize("keys", [["self_attn.o_proj"], None], ids=["adapter elsewhere", "adapter on all"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 64}),
        ("deepseek_v3", {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 32}),
    ],
)
def test_experts_and_heads_are_rounded_as_mlx_packs_them_with_an_adapter_or_without(
    name: str, sizes: dict[str, int], keys: list[str] | None
) -> None:
    model, deployed = (build_architecture(name, **sizes) for _ in range(2))
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0} | ({"keys": keys} if keys else {}))
    of_model = getattr(deployed, "quant_predicate", lambda path, module: True)
    nn.quantize(
        deployed,
        group_size=32,
        bits=4,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0 and of_model(path, module)
        ),
    )
    tokens = mx.arange(12)[None]

    with fake_quantised(model, bits=4, group_size=32) as quantisation, quantisation.during(1):
        found = model(tokens)

    np.testing.assert_allclose(np.array(found), np.array(deployed(tokens)), rtol=1e-4, atol=1e-4)
    assert mx.abs(model(tokens) - found).max() > 1e-3


def test_embeddings_are_quantised_as_mlx_packs_them_and_not_by_the_hosts_quantiser() -> None:
    mx.random.seed(1)
    model, tokens, x = OneLayer(nn.Embedding(10, 64)), mx.array([[3, 7], [3, 0]]), mx.random.normal((2, 64))
    packed = model.layer.to_quantized(group_size=32, bits=4)

    with fake_quantised(model, bits=4, group_size=32) as quantisation:
        quantisation.active = True
        np.testing.assert_allclose(np.array(model(tokens)), np.array(packed(tokens)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.array(model.layer.as_linear(x)), np.array(packed.as_linear(x)), atol=1e-4)
    with fake_quantised(model, bits=4, group_size=32, quantizer="host") as quantisation:
        quantisation.active = True
        assert mx.array_equal(model(tokens), model.layer.weight[tokens])


def test_the_gradient_passes_straight_through_to_an_embedding() -> None:
    mx.random.seed(1)
    model, tokens, x = OneLayer(nn.Embedding(10, 64)), mx.array([3, 7, 3]), mx.random.normal((2, 64))
    upstream, of_logits = mx.random.normal((3, 64)), mx.random.normal((2, 10))

    with fake_quantised(model, bits=4, group_size=32) as quantisation:
        quantisation.active = True
        gradient = nn.value_and_grad(
            model, lambda model: (model(tokens) * upstream).sum() + (model.layer.as_linear(x) * of_logits).sum()
        )(model)[1]["layer"]["weight"]

    expected = np.array(of_logits, np.float64).T @ np.array(x, np.float64)
    for token, slope in zip(tokens.tolist(), np.array(upstream, np.float64), strict=True):
        expected[token] += slope
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [True, {"group_size": 64, "bits": 8}], ids=["as all", "8 bits"])
@pytest.mark.parametrize("over_4_bits", [False, True])
def test_an_embedding_with_an_adapter_is_quantised_as_it_is_fused(
    over_4_bits: bool, wanted: bool | dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mx.random.seed(1)
    embedding: nn.Module = nn.Embedding(10, 64)
    layer = LoRAEmbedding.from_base(embedding.to_quantized(32, 4) if over_4_bits else embedding, r=2, scale=2.0)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    model, tokens, x = OneLayer(layer), mx.array([[3, 7], [3, 0]]), mx.random.normal((2, 64))
    packing = wanted if isinstance(wanted, dict) else {"group_size": 32, "bits": 3}
    packed = layer.fuse(dequantize=True).to_quantized(**packing)
    monkeypatch.setattr(OneLayer, "quant_predicate", property(lambda _: lambda path, module: wanted), raising=False)

    with fake_quantised(model, bits=3, group_size=32) as quantisation:
        quantisation.active = True
        np.testing.assert_allclose(np.array(model(tokens)), np.array(packed(tokens)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.array(model.layer.as_linear(x)), np.array(packed.as_linear(x)), atol=1e-3)


@pytest.mark.usefixtures("kernels")
def test_with_the_kernels_a_weight_is_rounded_once_a_step_and_one_without_an_adapter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[tuple[int, ...]] = []
    monkeypatch.setattr(Quantizer, "packed", recording(Quantizer.packed, packed))
    model, pairs = add_adapter(build_model(num_hidden_layers=1, vocab_size=100)), build_pairs(6)
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]

    args = CPOTrainingArgs(
        iters=6,
        batch_size=1,
        gradient_accumulation_steps=3,
        steps_per_eval=1,
        qat_enable=True,
        qat_bits=4,
        qat_group_size=32,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )
    train_cpo(model, optimizers.SGD(0.05), pairs, pairs, args=args)

    assert packed.count((100, 32)) == 1
    assert len(packed) == 1 + 2 * len(adapted)


def recording(original: Callable[..., Any], shapes: list[tuple[int, ...]]) -> Callable[..., Any]:
    """The method of a quantizer, which notes the shapes of weights."""

    def method(self: Quantizer, weight: mx.array, *arguments: Any) -> Any:
        shapes.append(weight.shape)
        return original(self, weight, *arguments)

    return method


def wanted_by_model(path: str, module: nn.Module) -> bool | dict[str, int]:
    """What some models of mlx_lm ask for: more bits for a part of their layers, others left as they are."""
    if path.endswith("down_proj"):
        return {"group_size": 64, "bits": 8}
    return not path.endswith("o_proj")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("over_4_bits", [False, True])
def test_layers_for_which_a_model_wants_other_bits_are_rounded_as_they_are_deployed(
    compiled: bool, over_4_bits: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, tokens = build_model(), mx.array([[5, 6, 7, 8]])
    monkeypatch.setattr(type(model), "quant_predicate", property(lambda _: wanted_by_model), raising=False)
    if over_4_bits:
        nn.quantize(model, 32, 4, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    add_adapter(model)
    adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]

    with ExitStack() as stack:
        if compiled:
            request.getfixturevalue("kernels")
            stack.enter_context(compiled_kernels(model))
        schedule = stack.enter_context(fake_quantised(model, bits=4, group_size=32, kernels=compiled))
        with schedule.during(1):
            found = np.array(model(tokens))
    model.update_modules(tree_unflatten([(name, module.fuse(dequantize=True)) for name, module in adapters]))
    dequantize_model(model)
    quantize_model(model, {}, group_size=32, bits=4)

    np.testing.assert_allclose(found, np.array(model(tokens)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_a_callback_after_a_step_finds_the_weights_in_full_precision(tmp_path: Path) -> None:
    model, pairs, found = add_adapter(build_model()), build_pairs(2), []

    class Looking(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            found.append(np.array(model(mx.array([[5, 6, 7]]))))

    args = CPOTrainingArgs(
        iters=1, steps_per_report=1, qat_enable=True, qat_bits=2, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    train_cpo(model, optimizers.SGD(0.05), pairs, args=args, training_callback=Looking())

    np.testing.assert_allclose(found[0], np.array(model(mx.array([[5, 6, 7]]))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [{"bits": 4}, {"bits": 3}, {"bits": 4, "quantizer": "host"}], ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.usefixtures("kernels")
def test_a_weight_is_rounded_alike_in_blocks_and_whole(
    dora: bool, packing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, rounding = lora(nn.Linear(64, 48), dora=dora), {"quantizer": "auto", "group_size": 32, **packing}
    quantizer = Quantizer(rounding["quantizer"], rounding["bits"], rounding["group_size"])
    whole = KernelOperand(layer, quantizer).weight
    monkeypatch.setattr(quantizers, "_BLOCK", 64 * 5)
    in_blocks = KernelOperand(layer, quantizer).weight

    assert (whole.bits, whole.group_size) == (in_blocks.bits, in_blocks.group_size)
    for left, right in zip(whole.arrays, in_blocks.arrays, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(np.array(left), np.array(right), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "interval", "expected"), [(1, 1, [1, 2, 3, 4, 5, 6]), (3, 1, [3, 4, 5, 6]), (2, 3, [2, 5])]
)
def test_it_applies_from_the_start_step_on_at_every_interval(start: int, interval: int, expected: list[int]) -> None:
    quantisation = FakeQuantisation(start, interval)

    assert [step for step in range(1, 7) if quantisation.applies_to(step)] == expected


def test_another_model_in_the_process_is_left_alone(x: mx.array) -> None:
    model, other = OneLayer(nn.Linear(64, 48)), OneLayer(nn.Linear(64, 48))
    before = other(x)

    with fake_quantised(model, bits=2, group_size=32) as quantisation:
        quantisation.active = True
        assert mx.array_equal(other(x), before)


def test_all_is_undone_at_the_end_and_after_a_failure(x: mx.array) -> None:
    model = OneLayer(lora(nn.Linear(64, 48)))
    before = model(x)

    def fail() -> None:
        with fake_quantised(model, bits=2, group_size=32) as quantisation:
            quantisation.active = True
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        fail()

    assert type(model.layer) is LoRALinear
    assert mx.array_equal(model(x), before)


@pytest.mark.parametrize(("start", "interval", "differs_after"), [(1, 1, 1), (3, 1, 3), (2, 2, 2)])
@pytest.mark.slow
def test_training_differs_from_the_start_step_on(tmp_path: Path, start: int, interval: int, differs_after: int) -> None:
    def run(iters: int, **arguments: object) -> dict[str, np.ndarray]:
        model = add_adapter(build_model())
        args = CPOTrainingArgs(iters=iters, batch_size=3, adapter_file=str(tmp_path / "a.safetensors"), **arguments)
        train_cpo(model, optimizers.SGD(0.05), build_pairs(9), args=args)
        return parameters(model)

    qat = {"qat_enable": True, "qat_bits": 3, "qat_start_step": start, "qat_interval": interval}

    if differs_after > 1:
        assert_same(run(differs_after - 1, **qat), run(differs_after - 1))
    with pytest.raises(AssertionError):
        assert_same(run(differs_after, **qat), run(differs_after))


def test_every_validation_is_of_the_weights_as_they_are_saved(tmp_path: Path) -> None:
    args = CPOTrainingArgs(
        iters=3,
        steps_per_eval=1,
        qat_enable=True,
        qat_bits=2,
        qat_interval=2,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )
    pairs, model = build_pairs(4), add_adapter(build_model())

    train_cpo(model, optimizers.SGD(0.0), pairs, pairs, args)

    reports = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [report["val_loss"] for report in reports if report["kind"] == "valid"]
    assert len(losses) == 4
    assert len(set(losses)) == 1


def add_outlier_channels(model: nn.Module) -> None:
    """Give every 16th input channel 32 times the weight, as large models have it; the model computes what it did.

    Beside them most weights of a group are rounded to zero, by training's symmetric quantiser and by ``mx.quantize``'s
    affine one alike. Without outliers the two round most weights differently, and QAT prepares for other errors.
    """
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = mx.where(mx.arange(norm.weight.size) % 16 == 0, 32.0, 1.0)
            norm.weight = norm.weight / factors
            for linear in readers:
                linear.weight = linear.weight * factors


@pytest.fixture(scope="module")
def demo_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """32 rows of the demo to train on, and 20 that are held out."""
    folder = tmp_path_factory.mktemp("demo")
    for split, count in (("train", 32), ("valid", 20)):
        lines = (DEMO_DIR / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:count]), encoding="utf-8")
    settings = resolve({"train_mode": "cpo", "train": True, "data": str(folder)}).settings
    train, valid, _ = load_dataset(settings, load_tokenizer(DEMO_DIR / "model"))
    return list(train), list(valid)


def held_out_losses(
    train_type: str, qat: bool, adapter_file: Path, pairs: tuple[list[PreferencePair], list[PreferencePair]]
) -> tuple[float, float]:
    """Train the demo model; return the loss on held-out rows before and after quantisation.

    Quantised are all linear layers, fused, to 3 bits in groups of 64; QAT is at the same bits and group size.
    """
    bits, group_size, iters = 3, 64, 30
    mx.random.seed(0)
    model, _ = load(str(DEMO_DIR / "model"))
    train, valid = pairs
    add_outlier_channels(model)
    if train_type == "lora":
        model.freeze()
        linear_to_lora_layers(model, -1, {"rank": 8, "scale": 10.0, "dropout": 0.0})
    args = CPOTrainingArgs(
        iters=iters,
        batch_size=4,
        beta=0.1,
        scoring="plain",
        seed=0,
        qat_enable=qat,
        qat_bits=bits,
        qat_group_size=group_size,
        steps_per_report=iters,
        adapter_file=str(adapter_file),
    )

    def loss() -> float:
        return evaluate_cpo(model, valid, 20, -1, args.beta, args.delta, 2048, args.loss_type, scoring="plain")[0]

    train_cpo(model, optimizers.Adam(optimizers.cosine_decay(5e-4, iters)), train, args=args)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    before = loss()
    nn.quantize(model, group_size, bits, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    return before, loss()


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.slow
def test_qat_lowers_the_loss_of_the_really_quantised_model(
    train_type: str, tmp_path: Path, demo_pairs: tuple[list[PreferencePair], list[PreferencePair]]
) -> None:
    _, with_qat = held_out_losses(train_type, True, tmp_path / "adapters.safetensors", demo_pairs)
    unquantised, without = held_out_losses(train_type, False, tmp_path / "adapters.safetensors", demo_pairs)

    # Training went well without QAT, too: it is quantisation that breaks its result.
    assert unquantised < 0.1 * without
    assert with_qat < 0.4 * without
