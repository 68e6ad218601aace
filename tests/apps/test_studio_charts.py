"""Charts of the page: how many points are drawn, where, and what stands beside them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cpo_plugin.studio.charts import MOST_POINTS, Line, chart_html, evenly, moving_average, thinned, ticks

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


def line(*values: float, name: str = "training", dashed: bool = False) -> Line:
    return Line(name, [(float(place), value) for place, value in enumerate(values, 1)], "train", dashed)


def drawn_points(drawn: str) -> int:
    paths = re.findall(r'class="(?:course|course dashed|raw)" d="(.*?)"', drawn)
    return len(re.findall(r"[ML][\d.]+ [\d.]+", "".join(paths)))


@given(VALUES, st.integers(0, 12))
def test_the_moving_average_is_the_mean_around_each_value(values: list[float], half: int) -> None:
    averages = [value for _, value in moving_average(line(*values).points, 2 * half + 1)]

    expected = [np.mean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]
    np.testing.assert_allclose(averages, expected, rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_both_ends_and_the_extremes_in_order(values: list[float], most: int) -> None:
    points = line(*values).points

    kept = thinned(points, most)

    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {min(values), max(values)} <= {value for _, value in kept}
    assert kept == sorted(kept)


@given(st.integers(1, 400), st.integers(1, 60))
def test_faint_points_are_taken_at_even_distances(count: int, most: int) -> None:
    kept = [x for x, _ in evenly(line(*range(count)).points, most)]

    assert len(kept) == min(count, most)
    assert max(np.diff(kept), default=1) - min(np.diff(kept), default=1) <= 1


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_a_few_even_steps_within_the_limits(low: float, span: float) -> None:
    found = ticks(low, low + span)

    assert 2 <= len(found) <= 7
    np.testing.assert_allclose(np.diff(found), found[1] - found[0], rtol=1e-6, atol=1e-6)
    assert found[0] >= low - 1e-6 * span
    assert found[-1] <= low + span + 1e-6 * span


def test_no_more_than_five_hundred_points_are_drawn_of_ten_thousand_reports() -> None:
    values = np.sin(np.arange(10_000) / 300)

    drawn = chart_html("c", "Loss", "Loss", [line(*values), line(*values[::10], name="validation", dashed=True)])

    assert 100 < drawn_points(drawn) <= MOST_POINTS


def test_many_values_are_faint_points_under_their_average_and_few_are_a_line_with_markers() -> None:
    many = chart_html("c", "Loss", "Loss", [line(*range(50))])
    few = chart_html("c", "Loss", "Loss", [line(3.0)])

    assert 'class="raw"' in many
    assert "moving average of 5 reports" in many
    assert 'class="dots"' not in many
    assert 'class="dots"' in few
    assert 'class="raw"' not in few


def test_a_validation_is_dashed_and_never_averaged() -> None:
    drawn = chart_html("c", "Loss", "Loss", [line(*range(50), name="validation", dashed=True)])

    assert 'class="course dashed"' in drawn
    assert "moving average" not in drawn


def test_given_limits_are_those_of_the_axis() -> None:
    drawn = chart_html("c", "Accuracy", "Share of pairs", [line(0.5, 0.6)], (0.0, 1.0))

    assert {"0", "0.2", "1"} <= set(re.findall(r'text-anchor="end">(.*?)<', drawn))
    assert ">Share of pairs<" in drawn
    assert ">Iteration<" in drawn


def test_a_long_name_stands_whole_beside_its_line_and_names_do_not_overlap() -> None:
    name = "a/long-name-of-a-run-in-a-folder-far-below/adapters"

    drawn = chart_html("c", "Loss", "Loss", [line(1, 2, name=name), line(1, 2.001, name="b"), line(9, 0, name="c")])

    rows = [(float(y), text) for y, text in re.findall(r'<tspan x="\d+" y="([\d.]+)">(.*?)</tspan>', drawn)]
    assert name in "".join(text for _, text in rows)
    heights = sorted(y for y, _ in rows)
    assert min(np.diff(heights)) >= 14
    assert heights[0] > 0
    assert heights[-1] < 240


@pytest.mark.parametrize("values", [(0.0,), (2.0, 2.0, 2.0), (-1e-9, 1e-9), (1e12, -1e12)])
def test_any_finite_values_can_be_drawn(values: tuple[float, ...]) -> None:
    drawn = chart_html("c", "<Loss>", "Loss", [line(*values)])

    assert "nan" not in drawn
    assert "inf" not in drawn
    assert "<Loss>" not in drawn


def test_nothing_is_drawn_of_nothing() -> None:
    assert chart_html("c", "Loss", "Loss", [line()]) == ""
