"""How cost grows: rows, prompt, answers and batch are doubled in turn, and time and memory plotted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import Any

from mlx_cpo_plugin.bench.cases import case_of_shape
from mlx_cpo_plugin.bench.compare import Say, compare
from mlx_cpo_plugin.bench.job import HOST, PLUGIN
from mlx_cpo_plugin.bench.report import environment
from mlx_cpo_plugin.bench.shapes import Shape
from mlx_cpo_plugin.errors import ConfigError

SMALL_SHAPE = Shape(prompt=64, chosen=32, rejected=32, batch=1, vocabulary=8192, hidden=256, layers=4)
DOUBLINGS = 4
FORMATS = (".svg", ".png")
_ROWS = 4

# What is doubled -> the axes of its panel.
PANELS = {
    "rows": ("rows", "seconds of an epoch"),
    "prompt": ("tokens of the prompt", "seconds of a pair"),
    "answers": ("tokens of each answer", "seconds of a pair"),
    "batch": ("pairs of a batch", "seconds of a batch"),
}


@dataclass(frozen=True)
class Point:
    """The cost of one size.

    Attributes:
        size: of what is doubled.
        seconds: by trainer, of what the panel's axis says.
        peak_memory: by trainer, in bytes.
    """

    size: int
    seconds: dict[str, float]
    peak_memory: dict[str, int]


def check_plot_file(file: Path) -> None:
    """Find out before the measurements whether a plot can be drawn into ``file``.

    Raises:
        ConfigError: matplotlib is missing, the folder does not exist, or the name has another ending.
    """
    if file.suffix not in FORMATS:
        raise ConfigError(f"--growth {file}: the plot is written as {' or '.join(FORMATS)}; give a name that ends so.")
    if not file.parent.is_dir():
        raise ConfigError(f"--growth {file}: there is no folder {file.parent}; make it first.")
    if find_spec("matplotlib") is None:
        raise ConfigError("--growth needs matplotlib to draw its plot; run pip install 'mlx-cpo-plugin[bench]'.")


def run_growth(file: Path, shape: Shape, repeats: int, say: Say, doublings: int = DOUBLINGS) -> None:
    """Measure every doubling, write the figures beside the plot as JSON, and draw the plot into ``file``."""
    check_plot_file(file)
    curves = {name: measure_curve(name, shape, repeats, say, doublings) for name in PANELS}
    figures = {
        "environment": environment(),
        "shape": str(shape),
        "curves": {name: [asdict(point) for point in points] for name, points in curves.items()},
    }
    file.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(curves, file)


def measure_curve(name: str, shape: Shape, repeats: int, say: Say, doublings: int) -> list[Point]:
    """Return the cost of ``shape`` while ``name``, a key of :data:`PANELS`, is doubled again and again."""
    points = []
    for doubling in range(doublings + 1):
        size, grown, rows = sized(name, shape, 2**doubling)
        iterations = rows // grown.batch
        case = case_of_shape(grown, rows)
        comparison = compare(case, iterations=iterations, repeats=repeats, say=say, gradients=False)
        results = {HOST: comparison.host, PLUGIN: comparison.plugin}
        per_repeat = {trainer: median(map(sum, result.seconds)) for trainer, result in results.items()}
        shares = {"rows": 1, "prompt": rows, "answers": rows, "batch": iterations}
        points.append(
            Point(
                size=size,
                seconds={trainer: seconds / shares[name] for trainer, seconds in per_repeat.items()},
                peak_memory={trainer: result.peak_memory for trainer, result in results.items()},
            )
        )
    return points


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
    grown = replace(shape, batch=shape.batch * factor)
    return grown.batch, grown, _ROWS * grown.batch


def draw(curves: dict[str, list[Point]], file: Path) -> None:
    """Draw time above memory, one column for each curve."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, len(curves), figsize=(3.2 * len(curves), 5.6), layout="constrained")
    for column, (name, points) in enumerate(curves.items()):
        size_label, seconds_label = PANELS[name]
        _draw_panel(axes[0][column], points, "seconds", 1.0, seconds_label)
        _draw_panel(axes[1][column], points, "peak_memory", 1e-6, "peak memory, MB")
        axes[1][column].set_xlabel(size_label)
    axes[0][0].legend(frameon=False)
    # Without a date the same figures give the same file.
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _draw_panel(panel: Any, points: list[Point], figure: str, unit: float, label: str) -> None:
    for trainer, colour, marker in ((HOST, "tab:gray", "s"), (PLUGIN, "tab:blue", "o")):
        values = [getattr(point, figure)[trainer] * unit for point in points]
        panel.plot([point.size for point in points], values, color=colour, marker=marker, label=trainer)
    # From zero on both axes, cost in proportion is a straight line to the corner.
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "mlx-cpo bench", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot
