"""How cost grows: rows, prompt, answers, batch and layers are doubled in turn, and time and memory plotted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from mlx_cpo_plugin.bench.cases import case_of_shape
from mlx_cpo_plugin.bench.job import PLUGIN, Measurement
from mlx_cpo_plugin.bench.plots import COLOURS, MARKERS, check_plot_file, pyplot, save
from mlx_cpo_plugin.bench.random_model import case_in_folder
from mlx_cpo_plugin.bench.report import environment
from mlx_cpo_plugin.bench.runs import Runs, Say
from mlx_cpo_plugin.bench.shapes import Shape
from mlx_cpo_plugin.json_output import check_writable, write_json

SMALL_SHAPE = Shape(prompt=64, chosen=32, rejected=32, batch=1, vocabulary=8192, hidden=256, layers=4)
DOUBLINGS = 4
_ROWS = 4

# What is doubled -> the axes of its panel.
PANELS = {
    "rows": ("rows", "seconds of an epoch"),
    "prompt": ("tokens of the prompt", "seconds of a pair"),
    "answers": ("tokens of each answer", "seconds of a pair"),
    "batch": ("pairs of a batch", "seconds of a batch"),
    "layers": ("layers", "seconds of a pair"),
}


@dataclass(frozen=True)
class Point:
    """The cost of one size.

    Attributes:
        size: of what is doubled.
        seconds: by trainer, of what the panel's axis says.
        peak_memory: by trainer, bytes that MLX allocated; of torch, which does not tell, those of the process.
    """

    size: int
    seconds: dict[str, float]
    peak_memory: dict[str, int]


def run_growth(
    file: Path,
    shape: Shape,
    trainers: Sequence[str],
    pythons: Mapping[str, str],
    *,
    repeats: int,
    say: Say,
    doublings: int = DOUBLINGS,
) -> None:
    """Measure every doubling, write the figures beside the plot as JSON, and draw the plot into ``file``.

    Args:
        trainers: those that are compared with this project's.
        pythons: the Python of each trainer that has an environment of its own.
    """
    check_plot_file("--growth", file)
    check_writable("--growth", beside := file.with_suffix(".json"))
    contestants = [*trainers, PLUGIN]

    def measure(name: str) -> list[Point]:
        return [
            measure_point(name, shape, 2**power, contestants, pythons, repeats, say) for power in range(doublings + 1)
        ]

    curves = {name: measure(name) for name in PANELS}
    figures = {
        "environment": environment(),
        "shape": str(shape),
        "curves": {name: [asdict(point) for point in points] for name, points in curves.items()},
    }
    write_json(str(beside), json.dumps(figures, indent=2), "--growth")
    draw(curves, file)


def measure_point(
    name: str,
    shape: Shape,
    factor: int,
    trainers: Sequence[str],
    pythons: Mapping[str, str],
    repeats: int,
    say: Say,
) -> Point:
    """Return the cost of ``shape`` with ``name``, a key of :data:`PANELS`, multiplied by ``factor``."""
    size, grown, rows = sized(name, shape, factor)
    iterations = rows // grown.batch
    share = {"rows": 1, "batch": iterations}.get(name, rows)
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-bench-") as folder:
        # One case for all, which those that have an environment of their own read from a folder.
        case = case_in_folder(grown, rows, Path(folder)) if pythons else case_of_shape(grown, rows)
        measured = Runs(case, Path(folder), say, pythons).time_in_turn(trainers, case.batches(iterations + 1), repeats)
    return Point(
        size=size,
        seconds={name: median(sum(each.seconds[1:]) for each in done) / share for name, done in measured.items()},
        peak_memory={name: int(median(_peak(each) for each in done)) for name, done in measured.items()},
    )


def _peak(measured: Measurement) -> int:
    return measured.peak_resident if measured.peak_memory is None else measured.peak_memory


def sized(name: str, shape: Shape, factor: int) -> tuple[int, Shape, int]:
    """Return the size of what is multiplied by ``factor``, the shape that results, and how many rows to time."""
    rows = _ROWS * shape.batch
    if name == "rows":
        return rows * factor, shape, rows * factor
    if name == "prompt":
        grown = replace(shape, prompt=shape.prompt * factor)
        return grown.prompt, grown, rows
    if name == "answers":
        grown = replace(shape, chosen=shape.chosen * factor, rejected=shape.rejected * factor)
        return round(mean((grown.chosen, grown.rejected))), grown, rows
    if name == "layers":
        grown = replace(shape, layers=shape.layers * factor)
        return grown.layers, grown, rows
    grown = replace(shape, batch=shape.batch * factor)
    return grown.batch, grown, _ROWS * grown.batch


def draw(curves: dict[str, list[Point]], file: Path) -> None:
    """Draw time above memory, one column for each curve."""
    figure, axes = pyplot().subplots(2, len(curves), figsize=(3.2 * len(curves), 5.6), layout="constrained")
    for column, (name, points) in enumerate(curves.items()):
        size_label, seconds_label = PANELS[name]
        _draw_panel(axes[0][column], points, "seconds", 1.0, seconds_label)
        _draw_panel(axes[1][column], points, "peak_memory", 1e-6, "peak memory, MB")
        axes[1][column].set_xlabel(size_label)
    axes[0][0].legend(frameon=False)
    save(figure, file)


def _draw_panel(panel: Any, points: list[Point], figure: str, unit: float, label: str) -> None:
    for trainer in points[0].seconds:
        values = [getattr(point, figure)[trainer] * unit for point in points]
        sizes = [point.size for point in points]
        panel.plot(sizes, values, color=COLOURS[trainer], marker=MARKERS[trainer], label=trainer)
    # From zero on both axes, cost in proportion is a straight line to the corner.
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
