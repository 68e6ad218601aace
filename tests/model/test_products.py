"""On a CPU products are float32: weights that are packed or of half precision are unpacked or widened for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.architectures import ARCHITECTURES, build_architecture
from support.devices import pretended
from support.every_array import recorded_arrays
from support.gradient_methods import WAYS
from support.tiny import add_adapter, assert_same, build_model, build_pairs

from mlx_cpo_plugin.comparison.preference import LengthGroup, preferences
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.device import CPU, METAL, current_device
from mlx_cpo_plugin.model import products
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.qat import fake_quantised
from mlx_cpo_plugin.training.trainer import evaluate_cpo

pytestmark = pytest.mark.skipif(
    current_device().kind != CPU, reason="on a GPU packed weights are multiplied as they are"
)

MODES = {
    "affine, 4 bits": {"bits": 4, "group_size": 64},
    "affine, 8 bits": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


class OneLayer(nn.Module):
    """A quantised linear layer, or a quantised embedding as a head."""

    def __init__(self, head: bool, bias: bool = False, **quantisation: object) -> None:
        super().__init__()
        if head:
            self.layer = nn.QuantizedEmbedding.from_embedding(nn.Embedding(96, 128), **quantisation)
        else:
            self.layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 96, bias=bias), **quantisation)
        self.head = head

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer.as_linear(x) if self.head else self.layer(x)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_equal_those_of_packed_weights(mode: str, head: bool) -> None:
    mx.random.seed(0)
    model, x, upstream = OneLayer(head, **MODES[mode]), mx.random.normal((3, 20, 128)), mx.random.normal((3, 20, 96))

    def loss(x: mx.array) -> mx.array:
        return (model(x) * upstream).sum()

    packed, packed_slope = model(x), mx.grad(loss)(x)
    with float32_products(model):
        unpacked, unpacked_slope = model(x), mx.grad(loss)(x)

    np.testing.assert_allclose(np.array(unpacked), np.array(packed), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(unpacked_slope), np.array(packed_slope), rtol=1e-4, atol=1e-4)


def test_a_bias_is_added() -> None:
    model = OneLayer(head=False, bias=True, **MODES["affine, 4 bits"])
    x = mx.random.normal((20, 128))

    with float32_products(model):
        unpacked = model(x)

    np.testing.assert_allclose(np.array(unpacked), np.array(model(x)), rtol=1e-4, atol=1e-4)


def test_the_packed_product_is_used_for_few_rows_and_after_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OneLayer(head=False, **MODES["affine, 4 bits"])
    original, calls = mx.quantized_matmul, []
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **named: calls.append(1) or original(*args, **named))

    with float32_products(model):
        model(mx.ones((20, 128)))
        assert not calls
        model(mx.ones((2, 128)))
    model(mx.ones((20, 128)))

    assert len(calls) == 2
    assert type(model.layer) is nn.QuantizedLinear


HALF = [mx.bfloat16, mx.float16]


def gradient(model: nn.Module, way: str, around: str = "") -> dict[str, np.ndarray]:
    """Losses and the gradient of three pairs, float32."""
    model.train()
    pairs = build_pairs(3, seed=4, longest=14)
    with ExitStack() as stack:
        stack.enter_context(lean_activations())
        stack.enter_context(float32_products(model))
        stack.enter_context(checkpointed_layers(model, "checkpointing" in around))
        if "qat" in around:
            stack.enter_context(fake_quantised(model, bits=8, group_size=32, quantizer="host")).active = True
        result = WAYS[way](model, objective_for("ipo", {"beta": 0.3}))(pairs, StepTotals.of(pairs))
        mx.eval(result)
    arrays = {"losses": result.losses, **result.gradient}
    return {name: np.array(value.astype(mx.float32)) for name, value in arrays.items()}


def with_weights_of(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Round the weights of a model to a dtype, but for those of its adapter."""
    adapter = model.trainable_parameters()
    model.set_dtype(dtype)
    model.update(adapter)
    return model


@pytest.mark.parametrize("way", ["plain batches", "segments"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.slow
def test_a_model_of_half_precision_computes_what_its_float32_copy_does(name: str, way: str) -> None:
    model = with_weights_of(add_adapter(build_architecture(name), scale=1.0), mx.bfloat16)

    ours = gradient(model, way)

    assert mx.bfloat16 in {value.dtype for value in by_name(model.parameters()).values()}
    # Mamba takes exponentials of its decay parameters as they are stored; products alone are widened.
    tolerance = 5e-3 if name in ("mamba", "mamba2", "jamba", "falcon_h1") else 1e-5
    assert_same(ours, gradient(with_weights_of(model, mx.float32), way), tolerance)


def packed() -> nn.Module:
    model = add_adapter(build_model(hidden_size=64))
    nn.quantize(model, group_size=32, bits=4)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: add_adapter(build_model()),
    "untied head": lambda: add_adapter(build_model(tie_word_embeddings=False)),
    "biases": lambda: add_adapter(build_model(attention_bias=True, mlp_bias=True)),
    "dora": lambda: add_adapter(build_model(), dora=True),
    "dora over biases": lambda: add_adapter(build_model(attention_bias=True), dora=True),
    "4 bits": packed,
    "dora over 4 bits": lambda: quantised_dora(),
}


def quantised_dora() -> nn.Module:
    model = build_model(hidden_size=64)
    nn.quantize(model, group_size=32, bits=4)
    return add_adapter(model, dora=True)


# Every kind of layer, and every way to go through layers.
PASSES = [*(("4 bits", way) for way in WAYS), *((kind, "segments") for kind in KINDS if kind != "4 bits")]


@pytest.mark.parametrize(
    ("kind", "way", "dtype", "around"),
    [
        *((kind, way, mx.bfloat16, "") for kind, way in PASSES),
        ("lora", "plain batches", mx.float16, ""),
        ("4 bits", "segments", mx.float16, "checkpointing"),
        ("dora over biases", "plain batches", mx.bfloat16, "qat"),
    ],
    ids=str,
)
def test_every_kind_of_training_computes_what_its_float32_copy_does(
    kind: str, way: str, dtype: mx.Dtype, around: str
) -> None:
    model = with_weights_of(KINDS[kind](), dtype)

    ours = gradient(model, way, around)

    assert_same(ours, gradient(with_weights_of(model, mx.float32), way, around), tolerance=1e-5)


@pytest.mark.parametrize(("kind", "way"), PASSES)
@pytest.mark.slow
def test_no_product_of_a_pass_has_an_operand_of_half_precision(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST_ROWS", 0)
    model = with_weights_of(KINDS[kind](), mx.bfloat16)
    with recorded_arrays() as recorded:
        gradient(model, way)

    dtypes = {array.dtype for name, array in recorded if "matmul" in name}
    assert dtypes == {mx.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_trained_have_the_gradient_of_float32_rounded(tied: bool) -> None:
    model = build_model(tie_word_embeddings=tied)
    model.set_dtype(mx.bfloat16)

    ours = gradient(model, "shared prompts, pair by pair")

    model.set_dtype(mx.float32)
    assert_same(ours, gradient(model, "shared prompts, pair by pair"), tolerance=1e-2)


@pytest.mark.parametrize("kind", ["lora", "4 bits"])
def test_a_large_weight_is_taken_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_weights_of(KINDS[kind](), mx.bfloat16)
    whole = gradient(model, "plain batches")
    monkeypatch.setattr(products, "PART_ELEMENTS", 7 * 64)

    assert_same(gradient(model, "plain batches"), whole, tolerance=1e-5)


def test_a_large_weight_that_is_trained_has_its_gradient_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    model.set_dtype(mx.bfloat16)
    whole = gradient(model, "plain batches")
    monkeypatch.setattr(products, "PART_ELEMENTS", 7 * 32)

    assert_same(gradient(model, "plain batches"), whole, tolerance=4e-3)


def test_what_float16_cannot_hold_is_no_infinity() -> None:
    model = with_weights_of(add_adapter(build_model()), mx.float16)
    for layer in model.layers:
        layer.mlp.down_proj.linear.weight = 6e4 * mx.ones_like(layer.mlp.down_proj.linear.weight)
    with float32_products(model):
        assert mx.abs(model.model(mx.arange(8)[None])).max() < 100  # a norm comes last
        largest = mx.abs(model.layers[0](model.model.embed_tokens(mx.arange(8)[None]), None, None)).max()

    assert 65504 < largest.item() < np.inf
    assert all(np.isfinite(value).all() for value in gradient(model, "shared prompts, padded").values())


def test_no_widened_weight_is_kept_for_the_backward_pass() -> None:
    model = build_model(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    model.set_dtype(mx.bfloat16)
    model.freeze()
    whole = 4 * sum(weight.size for _, weight in tree_flatten(model.layers[0].parameters())) * 8
    states = mx.random.normal((1, 4, 512))
    mx.eval(model.parameters(), states)

    def output(states: mx.array) -> mx.array:
        for layer in model.layers:
            states = layer(states, None, None)
        return states.sum()

    with float32_products(model):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(output)(states))

    assert mx.get_peak_memory() - before < whole / 4


def test_the_head_of_half_precision_is_gone_through_by_its_vocabulary() -> None:
    model = with_weights_of(add_adapter(build_model()), mx.bfloat16)
    with float32_products(model):
        split = SplitModel(model)

    assert split.output_layer is model.model.embed_tokens
    assert split.dtype == mx.float32


def test_every_way_to_score_is_that_of_float32() -> None:
    pairs = build_pairs(5)
    model = with_weights_of(add_adapter(build_model()), mx.bfloat16)
    objective = objective_for("sigmoid", {"beta": 0.1})

    def scores() -> list[Any]:
        group = [LengthGroup("all", pairs)]
        evaluated = evaluate_cpo(model, pairs, 2, -1, 0.1, 50.0, 64, "sigmoid")
        compared = preferences(model, group, objective, batch_size=2, scoring="auto").means
        return [evaluated[0], *evaluated[1], compared[0]["loss"], compared[0]["margins"]]

    ours = scores()
    with_weights_of(model, mx.float32)

    np.testing.assert_allclose(ours, scores(), rtol=1e-5)


def test_sharing_prompts_is_held_to_the_digits_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_cpo_plugin.model.parity.HALF_TOLERANCE", 0.0)
    model = with_weights_of(add_adapter(build_model()), mx.bfloat16)

    with float32_products(model):
        assert choose_scorer(model, build_pairs(3), "shared") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_every_layer_stays_what_it_is(kind: str) -> None:
    model = with_weights_of(KINDS[kind](), mx.bfloat16)
    classes = [type(module) for module in model.modules()]

    with pretended(METAL), float32_products(model):
        assert [type(module) for module in model.modules()] == classes
