"""exp out of additions and products is exp."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cpo_plugin.model import exponential as module
from mlx_cpo_plugin.model.exponential import exponential, power_of_two, sigmoid

pytestmark = pytest.mark.usefixtures("choices_of_a_cpu")
EVERY_SIZE = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)


@pytest.fixture(autouse=True)
def no_array_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 0)


def test_powers_of_two_are_right_to_the_last_digits_of_float32() -> None:
    exponents = np.linspace(-44, 127, 200_001).astype(np.float32)

    powers = np.array(power_of_two(mx.array(exponents)), np.float64)

    np.testing.assert_allclose(powers, np.exp2(exponents.astype(np.float64)), rtol=2e-7)
    assert power_of_two(mx.array([0.0])).item() == 1


def test_exponentials_are_right_but_for_the_rounding_of_what_they_are_taken_of() -> None:
    values = np.array(exponential(mx.array(EVERY_SIZE)), np.float64)

    wide = EVERY_SIZE.astype(np.float64)
    counts = wide > -30.4
    assert (np.abs(values / np.exp(wide) - 1) <= 2e-7 + 8e-8 * np.abs(wide))[counts].all()
    assert not values[wide < -30.5].any()


def test_large_numbers_are_held_at_the_end_of_float32() -> None:
    values = np.array(exponential(mx.array([90.0, 1e30, np.inf])), np.float64)

    np.testing.assert_allclose(values, 2.0**127, rtol=1e-6)


@pytest.mark.parametrize("fewest", [0, 100])
def test_what_rounding_would_swallow_beside_1_is_zero(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", fewest)

    x = mx.array([-np.inf, -1e30, -100.0, -87.5, -31.0])
    values, slopes = exponential(x), mx.grad(lambda x: exponential(x).sum())(x)

    assert values.tolist() == slopes.tolist() == [0, 0, 0, 0, 0]


def test_what_is_no_number_stays_none() -> None:
    assert np.isnan(np.array(exponential(mx.array([np.nan, 1.0]))))[0]


def test_it_is_its_own_derivative() -> None:
    x = mx.array(EVERY_SIZE[np.abs(EVERY_SIZE + 25) < 55][::100])

    slopes = mx.grad(lambda x: (exponential(x) * x).sum())(x)

    wide = np.array(x, np.float64)
    np.testing.assert_allclose(np.array(slopes), np.exp(wide) * (1 + wide), rtol=1e-5, atol=1e-11)


def test_small_arrays_have_the_exponentials_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 4)
    monkeypatch.setattr(module, "power_of_two", lambda x: mx.zeros_like(x))

    assert exponential(mx.zeros(3)).tolist() == [1, 1, 1]
    assert sigmoid(mx.zeros(3)).tolist() == [0.5, 0.5, 0.5]
    assert exponential(mx.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fewest", [0, 10**9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sigmoid_equals_the_float64_formula(dtype: mx.Dtype, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", fewest)
    x = mx.array(EVERY_SIZE[::100]).astype(dtype)

    values = sigmoid(x)

    expected = 1 / (1 + np.exp(-np.array(x.astype(mx.float32), np.float64)))
    assert values.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 1e-2
    np.testing.assert_allclose(np.array(values.astype(mx.float32)), expected, rtol=tolerance, atol=1e-13)
    assert np.array(values.astype(mx.float32)).min() >= 2.0**-44  # far from subnormal
