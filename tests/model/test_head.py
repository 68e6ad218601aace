"""Log-probs straight from hidden states: values and gradients are those of the float64 formula, whatever the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray
from support.architectures import ARCHITECTURES, COMMON, build_architecture
from support.devices import pretended
from support.tiny import add_adapter, build_model

from mlx_cpo_plugin.device import CPU
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.model import head
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.head import target_scores
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.qat import fake_quantised

Array = NDArray[np.float64]
TOKENS = 11
CAP = 5.0


def plain(logits: Array) -> tuple[Array, Array]:
    return logits, np.ones_like(logits)


def soft_capped(logits: Array) -> tuple[Array, Array]:
    return CAP * np.tanh(logits / CAP), 1 - np.tanh(logits / CAP) ** 2


def times(factor: float) -> Callable[[Array], tuple[Array, Array]]:
    return lambda logits: (factor * logits, np.full_like(logits, factor))


def gemma2() -> nn.Module:
    module = import_module("mlx_lm.models.gemma2")
    arguments = COMMON | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": CAP}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(arguments))
    return model


def with_bias() -> nn.Module:
    model = build_model(tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 96)
    return model


def quantised(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=8)
    return model


@dataclass(frozen=True)
class Head:
    """A model, and what it makes of the products of hidden states and weights: logits, and their slopes by these."""

    build: Callable[[], nn.Module]
    made_of: Callable[[Array], tuple[Array, Array]] = plain


HEADS = {
    "tied": Head(build_model),
    "untied": Head(lambda: build_model(tie_word_embeddings=False)),
    "with a bias": Head(with_bias),
    "scaled": Head(lambda: build_architecture("cohere2"), times(0.0625)),
    "divided": Head(lambda: build_architecture("granite"), times(0.25)),
    "soft-capped": Head(gemma2, soft_capped),
    "tied and quantised": Head(lambda: quantised(build_model())),
    "untied and quantised": Head(lambda: quantised(build_model(tie_word_embeddings=False))),
}
WAYS = ("by vocabulary", "by rows", "by rows, fused")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small blocks, so that there are several of them, of which the last is not full."""
    monkeypatch.setattr(head, "BLOCK_ROWS", 4)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 4 * 29)
    monkeypatch.setattr(head, "ROWS_ELEMENTS", 4 * 96)
    monkeypatch.setattr(head, "FEWEST_ROWS", 1)
    monkeypatch.setattr(head, "FEWEST_ROWS_ON_GPU", 1)
    with pretended(CPU, fused_cross_entropy=request.param == "by rows, fused"):
        yield str(request.param)


def split_for(model: nn.Module, way: str) -> SplitModel:
    split = SplitModel(model)
    assert split.output_layer is not None
    if way == "by rows":
        split.output_layer = None
    return split


def weight_and_bias(model: nn.Module) -> tuple[Array, Array]:
    layer = model.lm_head if "lm_head" in model else model.model.embed_tokens
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = mx.dequantize(weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits)
    return np.array(weight, np.float64), np.array(layer.get("bias", mx.zeros(96)), np.float64)


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_equal_the_float64_formula(kind: str, way: str) -> None:
    mx.random.seed(0)
    model = HEADS[kind].build()
    model.freeze()
    hidden = mx.random.normal((TOKENS, 32), scale=2.0)
    targets = mx.random.randint(0, 96, (TOKENS,))
    weights = mx.random.normal((TOKENS,))

    with float32_products(model):
        split = split_for(model, way)
        logps, logits = target_scores(split, hidden, targets, differentiate=True)
        gradient = mx.grad(lambda states: (target_scores(split, states, targets, True)[0] * weights).sum())(hidden)
        without = target_scores(split, hidden, targets, differentiate=False)

    weight, bias = weight_and_bias(model)
    at = np.arange(TOKENS), np.array(targets)
    values, slopes = HEADS[kind].made_of(np.array(hidden, np.float64) @ weight.T + bias)
    normaliser = np.log(np.exp(values).sum(-1))
    by_logits = -np.exp(values - normaliser[:, None])
    by_logits[at] += 1
    expected = np.array(weights, np.float64)[:, None] * ((by_logits * slopes) @ weight)
    np.testing.assert_allclose(np.array(logits), values[at], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(logps), values[at] - normaliser, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-3, atol=1e-4)
    for value, same in zip((logps, logits), without, strict=True):
        np.testing.assert_allclose(np.array(value), np.array(same), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_a_large_vocabulary_costs_no_digits() -> None:
    model = build_model(vocab_size=2**16)
    model.freeze()
    split = SplitModel(model)
    hidden = mx.random.normal((TOKENS, 32), scale=2.0, key=mx.random.key(2))
    targets = mx.arange(TOKENS)

    logps, _ = target_scores(split, hidden, targets, differentiate=True)
    without, _ = target_scores(split, hidden, targets, differentiate=False)

    values = np.array(hidden, np.float64) @ weight_and_bias(model)[0].T
    expected = values[np.arange(TOKENS), np.arange(TOKENS)] - np.log(np.exp(values).sum(-1))
    # Log-probs of about 11 have steps of 1e-6 in float32; one addition after the other would be off by 1e-5.
    np.testing.assert_allclose(np.array(logps), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(np.array(without), expected, rtol=0, atol=3e-6)


def test_logits_of_any_size_have_finite_scores(way: str) -> None:
    model = build_model()
    model.freeze()
    split = split_for(model, way)
    hidden = 1e4 * mx.random.normal((TOKENS, 32), key=mx.random.key(1))
    targets = mx.arange(TOKENS)

    logps, gradient = mx.value_and_grad(lambda states: target_scores(split, states, targets, True)[0].sum())(hidden)

    assert np.isfinite(logps.item())
    assert np.isfinite(np.array(gradient)).all()


def test_half_precision_sums_in_float32(way: str) -> None:
    model = build_model()
    model.set_dtype(mx.bfloat16)
    model.freeze()
    split = split_for(model, way)
    hidden = mx.random.normal((TOKENS, 32), key=mx.random.key(1)).astype(mx.bfloat16)

    def total(states: mx.array) -> mx.array:
        return target_scores(split, states, mx.arange(TOKENS), True)[0].sum()

    scores = target_scores(split, hidden, mx.arange(TOKENS), differentiate=True)

    assert [value.dtype for value in scores] == [mx.float32, mx.float32]
    assert mx.grad(total)(hidden).dtype == mx.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_has_the_plain_gradient(tied: bool, way: str) -> None:
    model = build_model(tie_word_embeddings=tied)
    split = split_for(model, way)
    hidden = mx.random.normal((TOKENS, 32), key=mx.random.key(1))
    targets = mx.arange(TOKENS)

    def ours(model: nn.Module) -> mx.array:
        return target_scores(split, hidden, targets, differentiate=True)[0].sum()

    def whole(model: nn.Module) -> mx.array:
        layer = model.model.embed_tokens if tied else model.lm_head
        logits = hidden @ layer.weight.T
        return (mx.take_along_axis(logits, targets[:, None], -1)[:, 0] - mx.logsumexp(logits, -1)).sum()

    name = "embed_tokens" if tied else "lm_head"
    ((_, ours_by), (_, plain_by)) = (nn.value_and_grad(model, function)(model) for function in (ours, whole))
    layers = [tree["model"][name] if tied else tree[name] for tree in (ours_by, plain_by)]
    np.testing.assert_allclose(np.array(layers[0]["weight"]), np.array(layers[1]["weight"]), rtol=1e-4, atol=1e-5)


def test_a_frozen_heads_weight_gets_no_gradient_and_stays_what_it_is() -> None:
    model = add_adapter(build_model(tie_word_embeddings=False))
    split = SplitModel(model)
    before = model.lm_head.weight

    target_scores(split, mx.ones((TOKENS, 32)), mx.arange(TOKENS), differentiate=True)

    assert model.lm_head.weight is before
    assert split.head_parameters() == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_trained_inside_layers_is_no_heads(name: str) -> None:
    model = add_adapter(build_architecture(name))
    assert SplitModel(model).head_parameters() == {}

    model.unfreeze()
    inside = {id(array) for layer in model.layers for array in by_name(layer.trainable_parameters()).values()}
    everywhere = {id(array) for array in by_name(model.trainable_parameters()).values()}
    assert {id(array) for array in SplitModel(model).head_parameters().values()} == everywhere - inside


def test_where_nothing_is_scored_there_is_no_score() -> None:
    logps, logits = target_scores(SplitModel(build_model()), mx.zeros((0, 32)), mx.zeros(0, mx.int32), True)

    assert logps.shape == logits.shape == (0,)


def test_a_head_whose_whole_weight_is_looked_at_is_not_cut() -> None:
    model = add_adapter(build_model(tie_word_embeddings=False))
    with fake_quantised(model, bits=4, group_size=0):
        assert SplitModel(model).output_layer is None


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_the_logits_in_memory_do_not_grow_with_the_vocabulary() -> None:
    def extra(vocabulary: int) -> int:
        model = build_model(vocab_size=vocabulary)
        model.freeze()
        split = SplitModel(model)
        hidden = mx.random.normal((256, 32), key=mx.random.key(1))
        mx.eval(hidden)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(target_scores(split, hidden, mx.arange(256), differentiate=True))
        return mx.get_peak_memory() - before

    assert extra(64_000) < 1.5 * extra(16_000)
    assert extra(64_000) < 256 * 64_000 * 4


@pytest.mark.parametrize("differentiate", [False, True])
def test_the_kernel_computes_a_head_unless_a_gradient_is_to_reach_it(
    differentiate: bool, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    original = operations.target_scores
    monkeypatch.setattr(operations, "target_scores", lambda *given: computed.append("head") or original(*given))
    split, hidden = SplitModel(build_model()), mx.random.normal((TOKENS, 32))

    with library.used():
        found = target_scores(split, hidden, mx.arange(TOKENS), differentiate)
        mx.eval(found)

    assert bool(computed) is not differentiate
    expected = target_scores(split, hidden, mx.arange(TOKENS), differentiate)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(left), np.array(right), rtol=1e-5, atol=1e-5)
