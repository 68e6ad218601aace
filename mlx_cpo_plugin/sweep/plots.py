"""The figures of a sweep over one option, a curve for each combination of the others, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlx_cpo_plugin.report.plots import colour, style
from mlx_cpo_plugin.report.record import ReportError, number
from mlx_cpo_plugin.sweep.plan import Sweep, described, varied
from mlx_cpo_plugin.sweep.results import COMPARABLE, FIGURES, SettingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^vDP*"  # some curves lie on one another
_SIZE = (4.6, 3.0)
# Above this ratio of the largest to the smallest value an axis is logarithmic.
_WIDE = 8
# With more curves than this, as random draws have, all settings are points alike.
_MOST_CURVES = 12
_MOST_TICKS = 6


class Point(NamedTuple):
    """Where a setting is drawn: the value of the option, or its number among the values that are no numbers."""

    at: float
    mean: float
    stderr: float


def draw(sweep: Sweep, results: Sequence[SettingResult], file: Path) -> None:
    """Draw every figure over the number with the most values; the dashed line is the model before training.

    Bars are standard errors over seeds. The same results give the same bytes.

    Raises:
        ReportError: matplotlib is missing, or no run has any figure.
    """
    options = varied(sweep.runs)
    axis = max(options, key=lambda name: (len(options[name]) > 1, _are_numbers(options[name]), len(options[name])))
    done = [result for result in results if result.finished]
    figures = [name for name in FIGURES if any(math.isfinite(result.mean(name).value) for result in done)]
    if not figures:
        raise ReportError("the finished runs have no figures to draw.")
    with style(salt="sweep"):
        from matplotlib.figure import Figure

        columns = min(2, len(figures))
        rows = math.ceil(len(figures) / columns)
        figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, name in zip(panels, figures, strict=False):
            if name in COMPARABLE:
                before = number(done[0].finished[0].before or {}, FIGURES[name].metric)
                panel.axhline(before, color="#888888", linestyle="--", label="before training")
            _draw_panel(panel, done, axis, options[axis], name)
        for panel in panels[len(figures) :]:
            panel.axis("off")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _draw_panel(panel: Axes, results: Sequence[SettingResult], axis: str, values: list[object], name: str) -> None:
    curves = _curves(results, axis, values, name)
    if len(curves) > _MOST_CURVES:
        curves = {"settings": [point for points in curves.values() for point in points]}
    for place, (label, points) in enumerate(curves.items()):
        points.sort()
        panel.errorbar(
            [point.at for point in points],
            [point.mean for point in points],
            yerr=[0 if math.isnan(point.stderr) else point.stderr for point in points],
            color=colour(place),
            linestyle="" if label == "settings" else "-",
            marker=_MARKERS[place % len(_MARKERS)],
            fillstyle="none",
            label=label,
        )
    if not _are_numbers(values):
        panel.set_xticks(range(len(values)), [str(value) for value in values])
    elif (low := min(map(_as_float, values))) > 0 and max(map(_as_float, values)) / low >= _WIDE:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_minor_formatter(lambda value, _: "")
        if len(values) <= _MOST_TICKS:
            panel.set_xticks([_as_float(value) for value in values])
    panel.set_xlabel(axis)
    panel.set_title(FIGURES[name].title, loc="left")


def _curves(results: Sequence[SettingResult], axis: str, values: list[object], name: str) -> dict[str, list[Point]]:
    """Return the points of each combination of the other options, in its words."""
    curves: dict[str, list[Point]] = {}
    for result in results:
        options = dict(result.outcomes[0].run.options)
        mean = result.mean(name)
        if axis in options and math.isfinite(mean.value):  # else it is of another grid
            value = options.pop(axis)
            at = _as_float(value) if _are_numbers(values) else values.index(value)
            curves.setdefault(described(options) if options else axis, []).append(Point(at, *mean))
    return dict(sorted(curves.items()))


def _as_float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _are_numbers(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
