"""The figures of a sweep over one option, a curve for each combination of the others, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.report.plots import colour, style
from mlx_cpo_plugin.report.record import number
from mlx_cpo_plugin.sweep.plan import Sweep, described, varied
from mlx_cpo_plugin.sweep.results import COMPARABLE, FIGURES, SettingResult

_MARKERS = "os^vDP*"  # some curves lie on one another
# Above this ratio of the largest to the smallest value an axis is logarithmic.
_WIDE = 8


def draw(sweep: Sweep, results: Sequence[SettingResult], file: Path) -> None:
    """Draw every figure over the option with the most values; the dashed line is the model before training.

    Bars are standard errors over seeds. The same results give the same bytes.
    """
    options = varied(sweep.runs)
    axis = max(options, key=lambda name: (_is_numeric(options[name]), len(options[name]))) if options else "seed"
    done = [result for result in results if result.finished]
    figures = [name for name in FIGURES if any(math.isfinite(result.mean(name).value) for result in done)]
    values: list[Any] = options.get(axis, [])
    values = sorted(values) if _is_numeric(values) else list(map(str, values))
    with style(salt="sweep"):
        from matplotlib.figure import Figure

        columns = min(2, len(figures))
        rows = math.ceil(len(figures) / columns)
        figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for place in range(rows * columns):
            panel = panels[place // columns][place % columns]
            if place >= len(figures):
                panel.axis("off")
                continue
            name = figures[place]
            if name in COMPARABLE:
                before = number(done[0].finished[0].before or {}, FIGURES[name].metric)
                panel.axhline(before, color="#888888", linestyle="--", label="before training")
            for number_of_curve, (label, points) in enumerate(_curves(done, axis, name).items()):
                points.sort(key=lambda point: values.index(point[0]))
                panel.errorbar(
                    [point[0] for point in points],
                    [point[1] for point in points],
                    yerr=[0 if math.isnan(point[2]) else point[2] for point in points],
                    color=colour(number_of_curve),
                    marker=_MARKERS[number_of_curve % len(_MARKERS)],
                    fillstyle="none",
                    label=label,
                )
            if _is_numeric(values) and min(values) > 0 and max(values) / min(values) >= _WIDE:
                panel.set_xscale("log")
            panel.set_xlabel(axis)
            panel.set_title(FIGURES[name].title, loc="left")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _curves(
    results: Sequence[SettingResult], axis: str, name: str
) -> dict[str, list[tuple[float | str, float, float]]]:
    """Return (value of the option, mean, standard error) of each point, by the other options."""
    curves: dict[str, list[tuple[float | str, float, float]]] = {}
    for result in results:
        options = dict(result.outcomes[0].run.options)
        at = options.pop(axis, "")
        mean = result.mean(name)
        if math.isfinite(mean.value):
            numeric = isinstance(at, int | float) and not isinstance(at, bool)
            point = (at if numeric else str(at), mean.value, mean.stderr)
            curves.setdefault(described(options) if options else axis, []).append(point)
    return dict(sorted(curves.items()))


def _is_numeric(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
