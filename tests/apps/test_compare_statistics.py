"""What is certain of rates, means and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cpo_plugin.comparison.statistics import Measure, around, change_of, duel_figures, figures, wilson

NAMES = ("base", "cpo", "dpo")


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilsons_interval_holds_the_rates_that_a_score_test_does_not_reject(successes: int, trials: int) -> None:
    successes = min(successes, trials)
    rates = np.linspace(0, 1, 100_001)[1:-1]
    distance = np.abs(successes / trials - rates)
    accepted = rates[distance <= 1.959964 * np.sqrt(rates * (1 - rates) / trials)]

    low, high = wilson(successes, trials)

    assert low == pytest.approx(accepted.min(), abs=2e-5)
    assert high == pytest.approx(accepted.max(), abs=2e-5)


def test_the_interval_of_a_mean_is_students() -> None:
    """Five values: the 97.5 % point of Student's t with 4 degrees of freedom is 2.776."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])

    low, high = around(change_of(values, np.arange(5)))

    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-2)


def test_the_interval_of_a_difference_is_that_of_differences_on_the_same_items() -> None:
    """Values that scatter widely but all change alike: what is certain is the change, not the means."""
    rng = np.random.default_rng(0)
    base = 10 * rng.normal(size=50)
    cpo = base + 0.5 + 0.1 * rng.normal(size=50)

    measured = figures(Measure("reward", "answers"), NAMES[:2], np.array([base, cpo]))

    (compared,) = measured["comparisons"]
    assert compared["difference"] == pytest.approx(np.mean(cpo - base))
    half = 2.0096 * np.std(cpo - base, ddof=1) / math.sqrt(50)
    assert compared["high"] - compared["difference"] == pytest.approx(half, rel=1e-2)
    assert (compared["outcome"], measured["best"]) == ("better", "cpo")
    assert measured["models"][0]["low"] < measured["models"][1]["mean"] < measured["models"][0]["high"]


@pytest.mark.parametrize("is_rate", [True, False])
def test_rates_differ_by_no_more_than_all(is_rate: bool) -> None:
    measured = figures(
        Measure("accuracy", "pairs", sign=1, is_rate=is_rate), ["base", "tuned"], np.array([[0.0, 0, 1], [1, 1, 1]])
    )

    (compared,) = measured["comparisons"]
    assert compared["difference"] == pytest.approx(2 / 3)
    assert compared["low"] < 0
    assert compared["high"] == 1.0 if is_rate else compared["high"] > 2


def test_no_interval_leaves_what_its_measure_can_be() -> None:
    share = Measure("repetition", "answers", sign=-1, within=(0, 1))

    measured = figures(share, ["base", "tuned"], np.array([[0.0, 0, 0.9], [1, 1, 0.2]]))

    assert [(model["low"], model["high"]) for model in measured["models"]] == [(0, 1), (0, 1)]
    assert measured["comparisons"][0]["high"] == 1


def test_every_model_is_compared_with_the_base_and_with_the_best_by_the_measures_sign() -> None:
    values = np.array([[0.5] * 8, [0.1, 0.2] * 4, [0.3, 0.4] * 4])

    measured = figures(Measure("repetition", "answers", sign=-1), NAMES, values)

    assert measured["best"] == "cpo"
    found = [(compared["model"], compared["against"], compared["outcome"]) for compared in measured["comparisons"]]
    assert found == [("cpo", "base", "better"), ("dpo", "base", "better"), ("dpo", "cpo", "worse")]
    assert [(one["wins"], one["ties"], one["losses"]) for one in measured["comparisons"]] == [
        *((8, 0, 0), (8, 0, 0), (0, 0, 8))
    ]


def test_a_base_model_that_is_the_best_is_compared_with_once() -> None:
    measured = figures(Measure("reward", "answers"), NAMES, np.array([[1.0] * 6, [0.0] * 6, [0.5] * 6]))

    assert measured["best"] == "base"
    assert [(one["model"], one["outcome"]) for one in measured["comparisons"]] == [("cpo", "worse"), ("dpo", "worse")]


def test_what_is_neither_good_nor_bad_has_no_best_and_no_wins() -> None:
    measured = figures(Measure("length", "answers", sign=0), NAMES[:2], np.array([[3.0, 5.0], [9.0, 4.0]]))

    assert measured["best"] is None
    assert set(measured["comparisons"][0]) == {"model", "against", "difference", "low", "high"}


def test_a_model_that_diverged_is_never_the_best_and_wins_nothing() -> None:
    measured = figures(Measure("margin", "pairs"), NAMES[:2], np.array([[0.1] * 6, [math.nan] * 6]))

    (compared,) = measured["comparisons"]
    assert (measured["best"], measured["models"][1]["mean"], compared["difference"]) == ("base", None, None)
    assert (compared["wins"], compared["losses"]) == (0, 6)


def test_against_a_base_model_that_diverged_any_figure_wins() -> None:
    measured = figures(Measure("margin", "pairs"), NAMES[:2], np.array([[math.nan] * 6, [-9.0] * 5 + [math.nan]]))

    (compared,) = measured["comparisons"]
    assert (compared["wins"], compared["ties"], compared["losses"]) == (5, 1, 0)


def test_one_item_decides_nothing() -> None:
    measured = figures(Measure("margin", "pairs"), NAMES[:2], np.array([[0.1], [7.0]]))

    (compared,) = measured["comparisons"]
    assert (compared["difference"], compared["low"], compared["outcome"]) == (6.9, None, "undecided")


@pytest.mark.parametrize("measure", [Measure("margin", "pairs"), Measure("accuracy", "pairs", is_rate=True)])
def test_several_pairs_of_each_row_make_nothing_more_certain(measure: Measure) -> None:
    values = np.random.default_rng(2).integers(0, 2, (2, 9)).astype(np.float64)

    once = figures(measure, NAMES[:2], values)
    copied = figures(measure, NAMES[:2], np.repeat(values, 4, axis=1), np.repeat(np.arange(9), 4))

    for key in ("low", "high"):
        assert [model[key] for model in copied["models"]] == pytest.approx([model[key] for model in once["models"]])
        assert copied["comparisons"][0][key] == pytest.approx(once["comparisons"][0][key])
        rate = f"win_rate_{key}"
        assert copied["comparisons"][0][rate] == pytest.approx(once["comparisons"][0][rate])
    assert (once["count"], copied["count"]) == (9, 36)


def test_intervals_of_rows_with_many_pairs_and_rows_with_one_hold_what_they_should() -> None:
    """Two rows have most of the pairs, which all are alike in a row; nineteen of twenty intervals hold the truth."""
    rows, rng = np.concatenate([np.repeat([0, 1], 28), np.arange(2, 20)]), np.random.default_rng(0)
    held = {"margin": 0, "accuracy": 0}
    for _ in range(400):
        for name, of_rows, truth in (("margin", rng.normal(size=20), 0.0), ("accuracy", rng.random(20) < 0.5, 0.5)):
            measured = figures(Measure(name, "pairs", is_rate=truth > 0), ["base"], of_rows[rows][None] * 1.0, rows)
            held[name] += measured["models"][0]["low"] <= truth <= measured["models"][0]["high"]

    assert min(held.values()) >= 0.9 * 400


@pytest.mark.parametrize(
    ("points", "rate", "outcome"),
    [([1.0] * 9 + [0.0], 0.9, "better"), ([0.0] * 9 + [1.0], 0.1, "worse"), ([0.5] * 40, 0.5, "undecided")],
)
def test_a_win_rate_counts_ties_as_half_and_decides_where_its_interval_leaves_one_half(
    points: list[float], rate: float, outcome: str
) -> None:
    found = duel_figures(points)

    assert (found["win_rate"], found["outcome"]) == (pytest.approx(rate), outcome)
    assert found["wins"] + found["ties"] + found["losses"] == len(points)
    assert (found["win_rate_low"], found["win_rate_high"]) == wilson(sum(points), len(points))
