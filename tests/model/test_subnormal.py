"""No number in a pass is subnormal, forwards or backwards: some processors take a hundred cycles for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load
from support.every_array import recorded_arrays, subnormal
from support.gradient_methods import WAYS
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import CPU, current_device
from mlx_cpo_plugin.model import attention, exponential
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.qat import fake_quantised

pytestmark = pytest.mark.skipif(current_device().kind != CPU, reason="on a GPU MLX's own kernels compute")


def sharp(model: nn.Module) -> nn.Module:
    """Spread attention scores and logits over hundreds, so that most of their exponentials are tiny."""
    for layer in model.layers:
        layer.self_attn.q_proj.weight = 60 * layer.self_attn.q_proj.weight
    model.model.norm.weight = 12 * model.model.norm.weight
    return model


def quantised() -> nn.Module:
    model = add_adapter(sharp(build_model(hidden_size=64)))
    nn.quantize(model, group_size=32, bits=4)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: add_adapter(sharp(build_model())),
    "dora": lambda: add_adapter(sharp(build_model()), dora=True),
    "full": lambda: sharp(build_model()),
    "quantised base": quantised,
}


def found_in_a_pass(
    model: nn.Module, way: str, pairs: list[PreferencePair], around: str = "", beta: float = 0.1
) -> list[str]:
    model.train()
    with ExitStack() as stack:
        stack.enter_context(lean_activations())
        stack.enter_context(float32_products(model))
        stack.enter_context(checkpointed_layers(model, "checkpointing" in around))
        if "qat" in around:
            stack.enter_context(fake_quantised(model, bits=8, group_size=32)).active = True
        gradients = WAYS[way](model, objective_for("sigmoid", {"beta": beta}))
        recorded = stack.enter_context(recorded_arrays())
        result = gradients(pairs, StepTotals.of(pairs))
    recorded += [(f"gradient of {name}", value) for name, value in result.gradient.items()]
    assert any(name.startswith("cotangent") for name, _ in recorded)
    assert len(recorded) > 150
    return subnormal(recorded)


@pytest.fixture(params=["many numbers", "few numbers"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two ways to compute exponentials an array of any size takes."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(exponential, "FEWEST", 0 if request.param == "many numbers" else 10**9)
    return str(request.param)


@pytest.mark.parametrize(
    ("kind", "way"),
    [*(("lora", way) for way in WAYS), *((kind, "segments") for kind in KINDS if kind != "lora")],
)
def test_every_kind_of_training_is_free_of_them(kind: str, way: str, size: str) -> None:
    assert found_in_a_pass(KINDS[kind](), way, build_pairs(2, seed=1, longest=24)) == []


@pytest.mark.parametrize("way", ["plain batches", "segments"])
@pytest.mark.parametrize("around", ["checkpointing", "qat"])
def test_checkpointing_and_fake_quantisation_bring_none(around: str, way: str, size: str) -> None:
    assert found_in_a_pass(KINDS["lora"](), way, build_pairs(2, seed=1, longest=24), around) == []


@pytest.mark.parametrize("way", WAYS)
def test_pairs_that_are_learned_long_since_bring_none(way: str, size: str) -> None:
    assert found_in_a_pass(KINDS["lora"](), way, build_pairs(2, seed=1, longest=24), beta=0.5) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_real_weights_are_free_of_them(way: str, shared: Path) -> None:
    model = add_adapter(load(str(shared / "models/stories260k-chat"))[0])

    assert found_in_a_pass(model, way, build_pairs(2, seed=2, longest=60, vocabulary=500)) == []


@pytest.mark.parametrize("masked", [False, True])
def test_a_hidden_key_has_the_weight_zero_and_no_gradient(masked: bool, size: str) -> None:
    queries, keys, values = (mx.random.normal((1, 2, 24, 8), key=mx.random.key(seed)) for seed in range(3))
    seen = mx.tril(mx.ones((24, 24), mx.bool_)) & (mx.arange(24) != 5)
    mask = seen if masked else mx.where(seen, 0.0, -mx.inf)
    at = mx.arange(24)[None, None, :, None] == 5

    def output(keys: mx.array, values: mx.array) -> mx.array:
        return attention.lean_attention(queries, keys, values, 0.3, mask)

    outputs, slopes = mx.vjp(lambda *given: [output(*given)], [keys, values], [mx.ones((1, 2, 24, 8))])

    moved = output(mx.where(at, 1e4, keys), mx.where(at, 1e30, values))
    assert mx.array_equal(outputs[0][:, :, 6:], moved[:, :, 6:])
    for slope in slopes:
        assert not mx.where(at, slope, 0).any()
        assert mx.where(at, 0, slope).any()
