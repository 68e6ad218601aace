"""The built-in losses against float64 formulas: values, gradients, and logits far from zero."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.losses import smoothed
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.training.objective import objective_for

LOSSES = ("sigmoid", "hinge", "ipo", "dpop", "simpo", "alphapo")
SMOOTHED = ("sigmoid", "simpo", "alphapo")
OPTIONS = {"delta": 3.0, "simpo_gamma": 0.7, "alphapo_alpha": 0.25}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def cross_entropy(margins: np.ndarray, label_smoothing: float) -> np.ndarray:
    return -(1 - label_smoothing) * log_sigmoid(margins) - label_smoothing * log_sigmoid(-margins)


def cross_entropy_slope(margins: np.ndarray, label_smoothing: float) -> np.ndarray:
    return sigmoid(margins) - 1 + label_smoothing


def reference_loss(name: str, chosen: np.ndarray, rejected: np.ndarray, options: dict[str, float]) -> np.ndarray:
    logits, beta, smoothing = chosen - rejected, options["beta"], options.get("label_smoothing", 0.0)
    if name == "sigmoid":
        return cross_entropy(beta * logits, smoothing)
    if name == "hinge":
        return np.maximum(0, 1 - beta * logits)
    if name == "ipo":
        return (logits - 1 / (2 * beta)) ** 2
    if name == "dpop":
        return -log_sigmoid(beta * logits) + options["delta"] * np.maximum(0, rejected - chosen)
    if name == "simpo":
        return cross_entropy(beta * logits - options["simpo_gamma"], smoothing)
    rewards = [
        beta * (1 - np.exp(logps) ** -options["alphapo_alpha"]) / options["alphapo_alpha"]
        for logps in (chosen, rejected)
    ]
    return cross_entropy(rewards[0] - rewards[1] - options["simpo_gamma"], smoothing)


def reference_slopes(
    name: str, chosen: np.ndarray, rejected: np.ndarray, options: dict[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives by chosen_logps and by rejected_logps."""
    logits, beta, smoothing = chosen - rejected, options["beta"], options.get("label_smoothing", 0.0)
    if name == "alphapo":
        alpha = options["alphapo_alpha"]
        rewards = [beta * (1 - np.exp(-alpha * logps)) / alpha for logps in (chosen, rejected)]
        slope = cross_entropy_slope(rewards[0] - rewards[1] - options["simpo_gamma"], smoothing)
        return slope * beta * np.exp(-alpha * chosen), -slope * beta * np.exp(-alpha * rejected)
    if name == "sigmoid":
        slope = beta * cross_entropy_slope(beta * logits, smoothing)
    elif name == "hinge":
        slope = np.where(beta * logits < 1, -beta, 0.0)
    elif name == "ipo":
        slope = 2 * (logits - 1 / (2 * beta))
    elif name == "dpop":
        slope = -beta * sigmoid(-beta * logits) - options["delta"] * (rejected > chosen)
    else:
        slope = beta * cross_entropy_slope(beta * logits - options["simpo_gamma"], smoothing)
    return slope, -slope


def logps_for(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums as long answers have them, or means over tokens."""
    rng = np.random.default_rng(0)
    middle, spread = (-3, 1.5) if loss_types()[name].length_normalised and name != "ipo" else (-40, 20)
    return rng.normal(middle, spread, 200).astype(np.float32), rng.normal(middle, spread, 200).astype(np.float32)


def scores(chosen: Any, rejected: Any) -> AnswerScores:
    arrays = [mx.array(np.atleast_1d(np.asarray(side, np.float32))) for side in (chosen, rejected)]
    return AnswerScores(*arrays, *arrays, *[mx.ones(arrays[0].shape)] * 2)


def losses_and_slopes(name: str, chosen: Any, rejected: Any, options: dict[str, float]) -> tuple[np.ndarray, ...]:
    objective = objective_for(name, options)
    given_scores = scores(chosen, rejected)

    def total(chosen: mx.array, rejected: mx.array) -> mx.array:
        return objective.losses(given_scores._replace(chosen_logps=chosen, rejected_logps=rejected)).sum()

    slopes = mx.grad(total, argnums=(0, 1))(*given_scores[:2])
    return np.array(objective.losses(given_scores)), *map(np.array, slopes)


CASES = [(name, smoothing) for name in LOSSES for smoothing in ((0.0, 0.1) if name in SMOOTHED else (0.0,))]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize(("name", "label_smoothing"), CASES)
def test_values_and_gradients_equal_the_float64_formula(name: str, label_smoothing: float, beta: float) -> None:
    chosen, rejected = logps_for(name)
    options = OPTIONS | {"beta": beta, "label_smoothing": label_smoothing}

    values, *slopes = losses_and_slopes(name, chosen, rejected, options)

    wide = chosen.astype(np.float64), rejected.astype(np.float64)
    np.testing.assert_allclose(values, reference_loss(name, *wide, options), rtol=2e-6, atol=1e-6)
    for slope, expected in zip(slopes, reference_slopes(name, *wide, options), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6 * beta)


@pytest.mark.parametrize("gap", [-1e30, -1e5, -300.0, 300.0, 1e5])
@pytest.mark.parametrize(("name", "label_smoothing"), CASES)
def test_losses_and_gradients_stay_finite_for_logits_of_any_size(name: str, label_smoothing: float, gap: float) -> None:
    if name == "ipo" and abs(gap) > 1e18:
        pytest.skip("the square of such a gap is beyond float32 itself")
    if name == "alphapo" and abs(gap) > 300:
        pytest.skip("the reward of such an answer is beyond float32 itself")
    options = OPTIONS | {"beta": 1.0, "label_smoothing": label_smoothing}

    value, *slopes = losses_and_slopes(name, gap / 2, -gap / 2, options)

    assert np.isfinite(value).all()
    assert np.isfinite(slopes).all()
    expected = reference_loss(name, np.float64(gap / 2), np.float64(-gap / 2), options)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "options", "expected"),
    [
        ("sigmoid", -10.0, -12.0, {}, 0.598139),
        ("sigmoid", -10.0, -12.0, {"label_smoothing": 0.1}, 0.618139),
        ("hinge", -10.0, -12.0, {}, 0.8),
        ("ipo", -1.0, -1.5, {}, 20.25),
        ("dpop", -12.0, -10.0, {}, 100.798139),
        ("dpop", -10.0, -12.0, {}, 0.598139),
        ("simpo", -1.0, -1.5, {"beta": 2.0}, 0.474077),
        ("alphapo", -1.0, -1.5, {"beta": 2.0}, 0.350590),
    ],
)
def test_the_worked_examples_of_the_docstrings(
    name: str, chosen: float, rejected: float, options: dict[str, float], expected: float
) -> None:
    assert objective_for(name, options).losses(scores(chosen, rejected)).item() == pytest.approx(expected, rel=1e-5)


@given(margin=st.floats(-1e4, 1e4, width=32), label_smoothing=st.floats(0, 0.499))
def test_smoothed_labels_weigh_both_orders_of_a_pair(margin: float, label_smoothing: float) -> None:
    value = smoothed(mx.array([margin]), label_smoothing).item()

    assert value == pytest.approx(cross_entropy(np.float64(margin), label_smoothing), rel=1e-5, abs=1e-6)


def test_without_smoothing_the_sigmoid_loss_is_a_softplus_to_the_bit() -> None:
    chosen, rejected = map(mx.array, logps_for("sigmoid"))
    logits = -0.3 * (chosen - rejected)

    loss = objective_for("sigmoid", {"beta": 0.3}).losses(scores(chosen, rejected))

    assert mx.array_equal(loss, mx.logaddexp(logits, mx.zeros_like(logits)))


def test_alphapo_without_a_shape_is_simpo() -> None:
    chosen, rejected = logps_for("simpo")
    options = {"beta": 2.0, "simpo_gamma": 0.7}
    simpo = losses_and_slopes("simpo", chosen, rejected, options)

    for alpha in (0.0, 1e-6):
        alphapo = losses_and_slopes("alphapo", chosen, rejected, options | {"alphapo_alpha": alpha})
        for left, right in zip(alphapo, simpo, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_some_losses_average_over_tokens() -> None:
    assert [name for name in LOSSES if loss_types()[name].length_normalised] == ["ipo", "simpo", "alphapo"]


def test_each_loss_reads_exactly_the_options_that_it_names() -> None:
    options = {name: [option.name for option in loss_types()[name].options] for name in LOSSES}

    assert options == {
        "sigmoid": ["beta", "label_smoothing"],
        "hinge": ["beta"],
        "ipo": ["beta"],
        "dpop": ["beta", "delta"],
        "simpo": ["beta", "simpo_gamma", "label_smoothing"],
        "alphapo": ["beta", "simpo_gamma", "alphapo_alpha", "label_smoothing"],
    }


def test_rewards_use_the_beta_of_the_loss_and_its_default() -> None:
    assert objective_for("sigmoid", {"beta": 0.3}).rewards(mx.array([-2.0])).tolist() == [0.3 * -2]
    assert objective_for("sigmoid", {}).rewards(mx.array([-2.0])).tolist() == [0.1 * -2]


def test_rewards_of_alphapo_have_its_shape() -> None:
    (reward,) = objective_for("alphapo", {"beta": 2.0, "alphapo_alpha": 0.25}).rewards(mx.array([-1.5]))

    assert reward == pytest.approx(2 * (1 - math.exp(-1.5) ** -0.25) / 0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hinge",
            {"label_smoothing": 0.1},
            r"^label_smoothing is 0\.1 in the call, but is not used by the loss hinge; "
            r"remove it, or use one of sigmoid, simpo, alphapo\.$",
        ),
        (
            "sigmoid",
            {"label_smoothing": 0.5},
            r"^label_smoothing is 0\.5 in the call, but must be a number >= 0 and < 0\.5\.$",
        ),
        ("simpo", {"simpo_gamma": -1}, r"^simpo_gamma is -1 in the call, but must be a number >= 0\.$"),
        ("alphapo", {"alphapo_alpha": "steep"}, r"^alphapo_alpha is 'steep' in the call, but must be a number\.$"),
    ],
)
def test_options_that_cannot_be_meant_are_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_for(name, options)


def test_no_smoothing_is_accepted_by_every_loss() -> None:
    assert objective_for("hinge", {"label_smoothing": 0.0}).options == {"beta": 0.1}
