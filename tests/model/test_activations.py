"""SwiGLU that keeps less for the backward pass computes what mlx_lm's does."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, llama
from support.architectures import ARCHITECTURES, VOCABULARY, build_architecture
from support.tiny import build_model

from mlx_cpo_plugin.model.activations import lean_activations, lean_swiglu
from mlx_cpo_plugin.parameters import by_name


def test_values_and_gradients_equal_the_float64_formula() -> None:
    rng = np.random.default_rng(0)
    gate, x, upstream = (rng.normal(0, 3, (5, 7)) for _ in range(3))
    narrow = [mx.array(array.astype(np.float32)) for array in (gate, x, upstream)]

    values = lean_swiglu(*narrow[:2])
    by_gate, by_x = mx.grad(lambda g, v: (lean_swiglu(g, v) * narrow[2]).sum(), argnums=(0, 1))(*narrow[:2])

    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(np.array(values), gate * sigmoid * x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(by_x), upstream * gate * sigmoid, rtol=1e-5, atol=1e-6)
    slope = sigmoid + gate * sigmoid * (1 - sigmoid)
    np.testing.assert_allclose(np.array(by_gate), upstream * x * slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_gates_of_any_size_have_finite_gradients(gate: float) -> None:
    slopes = mx.grad(lambda g, x: lean_swiglu(g, x).sum(), argnums=(0, 1))(mx.array([gate]), mx.array([2.0]))

    assert all(np.isfinite(slope.item()) for slope in slopes)


def test_half_precision_stays_half_precision() -> None:
    gate, x = mx.ones((3,), mx.bfloat16), mx.ones((3,), mx.bfloat16)

    slope = mx.grad(lambda g: lean_swiglu(g, x).sum())(gate)

    assert lean_swiglu(gate, x).dtype == slope.dtype == mx.bfloat16


def test_models_use_it_while_the_context_lasts_and_no_longer() -> None:
    def fail() -> None:
        with lean_activations():
            assert llama.swiglu is lean_swiglu
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert llama.swiglu is activations.swiglu


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_gradient_that_it_has_without_them(name: str) -> None:
    model, tokens = build_architecture(name), mx.arange(24)[None] % VOCABULARY
    answers = mx.random.normal((24, VOCABULARY), key=mx.random.key(1))

    def gradient() -> dict[str, mx.array]:
        return by_name(nn.value_and_grad(model, lambda model: (model(tokens)[0] * answers).sum())(model)[1])

    plain = gradient()
    with lean_activations():
        lean = gradient()

    for path, array in plain.items():
        assert mx.abs(lean[path] - array).max() <= 2e-4 * mx.abs(array).max(), path


def test_less_is_kept_for_the_backward_pass() -> None:
    model = build_model(hidden_size=64, intermediate_size=512)
    tokens = mx.zeros((1, 256), mx.int32)

    def peak() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(
            mx.grad(lambda scale: model(tokens, None, model.model.embed_tokens(tokens) * scale).sum())(mx.array(1.0))
        )
        return mx.get_peak_memory()

    plain = peak()
    with lean_activations():
        lean = peak()

    # Two of the five arrays of a SwiGLU layer, 256 x 512 float32 each, in each of two layers.
    assert plain - lean > 2 * 256 * 512 * 4
