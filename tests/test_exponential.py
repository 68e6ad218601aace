"""exp out of additions and products is exp."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cpo_plugin.exponential import exponential, sigmoid, softmax

EVERY_SIZE = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)


def test_it_is_exp_to_the_last_digits_of_float32() -> None:
    values = np.array(exponential(mx.array(EVERY_SIZE)), np.float64)

    np.testing.assert_allclose(values, np.exp(EVERY_SIZE.astype(np.float64)), rtol=2e-7)


def test_numbers_beyond_float32_are_held_at_its_ends() -> None:
    values = np.array(exponential(mx.array([-np.inf, -1e30, -90.0, 90.0, 1e30, np.inf])))

    np.testing.assert_allclose(values[:3], np.exp(-87.0), rtol=1e-6)
    np.testing.assert_allclose(values[3:], np.exp(88.0), rtol=1e-6)


def test_what_is_no_number_stays_none() -> None:
    assert np.isnan(np.array(exponential(mx.array([np.nan, 1.0]))))[0]


def test_it_is_its_own_derivative() -> None:
    x = mx.array(EVERY_SIZE[EVERY_SIZE < 80][::100])

    slopes = mx.grad(lambda x: (exponential(x) * x).sum())(x)

    wide = np.array(x, np.float64)
    np.testing.assert_allclose(np.array(slopes), np.exp(wide) * (1 + wide), rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sigmoid_equals_the_float64_formula(dtype: mx.Dtype) -> None:
    x = mx.array(EVERY_SIZE[::100]).astype(dtype)

    values = sigmoid(x)

    expected = 1 / (1 + np.exp(-np.array(x.astype(mx.float32), np.float64)))
    assert values.dtype == dtype
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    np.testing.assert_allclose(np.array(values.astype(mx.float32)), expected, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_softmax_equals_the_float64_formula_for_scores_of_any_size(shift: float) -> None:
    scores = np.random.default_rng(0).normal(shift, 5, (4, 300)).astype(np.float32)
    scores[0, 5:] = np.finfo(np.float32).min

    values = np.array(softmax(mx.array(scores)))

    wide = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(values, wide / wide.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30)


def test_softmax_keeps_half_precision() -> None:
    assert softmax(mx.ones((2, 3), mx.float16)).dtype == mx.float16
