"""The four losses against float64 formulas: values, gradients, and logits far from zero."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cpo_plugin.objective import objective_for
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.scoring import AnswerScores

LOSSES = ("sigmoid", "hinge", "ipo", "dpop")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def reference_loss(name: str, chosen: np.ndarray, rejected: np.ndarray, beta: float, delta: float) -> np.ndarray:
    logits = chosen - rejected
    if name == "sigmoid":
        return -log_sigmoid(beta * logits)
    if name == "hinge":
        return np.maximum(0, 1 - beta * logits)
    if name == "ipo":
        return (logits - 1 / (2 * beta)) ** 2
    return -log_sigmoid(beta * logits) + delta * np.maximum(0, rejected - chosen)


def reference_slope(name: str, chosen: np.ndarray, rejected: np.ndarray, beta: float, delta: float) -> np.ndarray:
    """The derivative by chosen_logps; by rejected_logps it is the negative."""
    logits = chosen - rejected
    if name == "sigmoid":
        return -beta * sigmoid(-beta * logits)
    if name == "hinge":
        return np.where(beta * logits < 1, -beta, 0.0)
    if name == "ipo":
        return 2 * (logits - 1 / (2 * beta))
    return -beta * sigmoid(-beta * logits) - delta * (rejected > chosen)


@pytest.fixture
def logps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(-40, 20, 200).astype(np.float32), rng.normal(-40, 20, 200).astype(np.float32)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_float64_formula(name: str, beta: float, logps: tuple) -> None:
    chosen, rejected = logps
    fn = objective_for(name, {"beta": beta, "delta": 3.0})

    def total(c: mx.array, r: mx.array) -> mx.array:
        return fn.losses(AnswerScores(c, r, c, r)).sum()

    values = fn.losses(AnswerScores(*map(mx.array, (chosen, rejected, chosen, rejected))))
    by_chosen, by_rejected = mx.grad(total, argnums=(0, 1))(mx.array(chosen), mx.array(rejected))

    wide = chosen.astype(np.float64), rejected.astype(np.float64)
    np.testing.assert_allclose(np.array(values), reference_loss(name, *wide, beta, 3.0), rtol=2e-6, atol=1e-6)
    slope = reference_slope(name, *wide, beta, 3.0)
    np.testing.assert_allclose(np.array(by_chosen), slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.array(by_rejected), -slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gap", [-1e30, -1e5, -300.0, 300.0, 1e5])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_stay_finite_for_logits_of_any_size(name: str, gap: float) -> None:
    if name == "ipo" and abs(gap) > 1e18:
        pytest.skip("the square of such a gap is beyond float32 itself")
    fn = objective_for(name, {"beta": 1.0, "delta": 50.0})
    chosen, rejected = mx.array([gap / 2]), mx.array([-gap / 2])

    def total(c: mx.array, r: mx.array) -> mx.array:
        return fn.losses(AnswerScores(c, r, c, r)).sum()

    value, slopes = mx.value_and_grad(total, argnums=(0, 1))(chosen, rejected)

    assert np.isfinite(value.item())
    assert all(np.isfinite(slope.item()) for slope in slopes)
    expected = reference_loss(name, np.float64(gap / 2), np.float64(-gap / 2), 1.0, 50.0)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "expected"),
    [
        ("sigmoid", -10.0, -12.0, 0.598139),
        ("hinge", -10.0, -12.0, 0.8),
        ("ipo", -1.0, -1.5, 20.25),
        ("dpop", -12.0, -10.0, 100.798139),
        ("dpop", -10.0, -12.0, 0.598139),
    ],
)
def test_the_worked_examples_of_the_docstrings(name: str, chosen: float, rejected: float, expected: float) -> None:
    fn = objective_for(name, {})

    scores = AnswerScores(*(mx.array([value]) for value in (chosen, rejected, 0.0, 0.0)))

    assert fn.losses(scores).item() == pytest.approx(expected, rel=1e-5)


def test_only_ipo_averages_over_tokens() -> None:
    assert [name for name in LOSSES if loss_types()[name].length_normalised] == ["ipo"]


def test_each_loss_reads_exactly_the_options_that_it_names() -> None:
    options = {name: [option.name for option in loss_types()[name].options] for name in LOSSES}

    assert options == {"sigmoid": ["beta"], "hinge": ["beta"], "ipo": ["beta"], "dpop": ["beta", "delta"]}


def test_rewards_use_the_beta_of_the_loss_and_its_default() -> None:
    assert objective_for("sigmoid", {"beta": 0.3}).beta == 0.3
    assert objective_for("sigmoid", {}).beta == 0.1
