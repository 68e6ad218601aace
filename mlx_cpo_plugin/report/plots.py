"""The curves of one or several runs, as SVG or PNG; the same records give the same bytes of SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mlx_cpo_plugin.report.record import ReportError, Row, RunRecord, names_of_runs, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; without black and the faint yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_WIDTH, _HEIGHT = 4.6, 2.9
_DOTS_PER_INCH = 150
_COLUMNS = 3
# With more points than this the line alone shows them.
_MOST_MARKERS = 40
_MARKERS = "os^vD"
_LONGEST_NAME = 32
_GROUP_ID = re.compile(r'<g id="[\w.]+_\d+">')


@dataclass(frozen=True)
class Curve:
    """One metric of ``metrics.jsonl``: of which rows, under which name, and how its line is told from others."""

    kind: str
    metric: str
    label: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One diagram over the iterations.

    Attributes:
        title: what it shows, unit included.
        curves: one or two.
    """

    title: str
    curves: tuple[Curve, ...]


def _train_and_valid(metric: str) -> tuple[Curve, Curve]:
    return (
        Curve("train", f"train_{metric}", "training"),
        Curve("valid", f"val_{metric}", "validation", dashed=True),
    )


def _chosen_and_rejected(kind: str, pattern: str) -> tuple[Curve, Curve]:
    return (
        Curve(kind, pattern.format("chosen"), "chosen"),
        Curve(kind, pattern.format("rejected"), "rejected", dashed=True),
    )


PANELS: dict[str, Panel] = {
    "loss": Panel("Loss", _train_and_valid("loss")),
    "accuracy": Panel("Preference accuracy", _train_and_valid("accuracies")),
    "margin": Panel("Margin of the rewards", _train_and_valid("margins")),
    "rewards": Panel("Rewards in training", _chosen_and_rejected("train", "train_{}_reward")),
    "logps": Panel("Log-probs in training, nats", _chosen_and_rejected("train", "train_policy_{}_logps")),
    "learning_rate": Panel("Learning rate", (Curve("train", "learning_rate", "training"),)),
    "gradient_norm": Panel("Gradient norm", (Curve("train", "train_gradient_norm", "training"),)),
    "tokens_per_second": Panel("Scored tokens per second", (Curve("train", "tokens_per_second", "training"),)),
    "peak_memory": Panel("Peak memory, GB", (Curve("train", "peak_memory", "training"),)),
}
"""Name -> what can be drawn, in the order of the page."""


def panels_with_points(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the panels for which a record has at least one number."""
    return [
        name
        for name, panel in PANELS.items()
        if any(points(record, curve)[0] for record in records for curve in panel.curves)
    ]


def as_svg(records: Sequence[RunRecord], panels: Sequence[str] | None = None) -> str:
    """Draw panels, all that have points by default, side by side; return an ``<svg>`` element.

    Raises:
        ReportError: matplotlib is missing, or there is nothing to draw.
    """
    names = list(panels_with_points(records) if panels is None else panels)
    # Salted by its panels, so that no two drawings on a page have an id in common.
    with style(salt=" ".join(names)):
        stream = io.StringIO()
        draw(records, names).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return _GROUP_ID.sub("<g>", text[text.index("<svg") :])


def as_png(records: Sequence[RunRecord], panels: Sequence[str] | None = None) -> bytes:
    """As :func:`as_svg`, at 150 dots per inch, as the bytes of a PNG file."""
    names = list(panels_with_points(records) if panels is None else panels)
    with style(salt=""):
        stream = io.BytesIO()
        draw(records, names).savefig(stream, format="png", dpi=_DOTS_PER_INCH)
    return stream.getvalue()


def draw(records: Sequence[RunRecord], panels: Sequence[str]) -> Figure:
    """Return a figure of panels by name, at most :data:`_COLUMNS` of them beside one another.

    Raises:
        ReportError: matplotlib is missing, or there is nothing to draw.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if not panels:
        raise ReportError("There is no number to draw in the metrics of these runs; let them train for longer.")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in range(rows * columns):
        axis = axes[place // columns][place % columns]
        if place < len(panels):
            _draw_panel(axis, records, PANELS[panels[place]])
        else:
            axis.axis("off")
    return figure


def require_matplotlib() -> None:
    """Raise ReportError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ReportError("Plots need matplotlib; run pip install 'mlx-cpo-plugin[report]'.")


def _draw_panel(axis: Axes, records: Sequence[RunRecord], panel: Panel) -> None:
    several = len(records) > 1
    names = names_of_runs([record.folder for record in records])
    for place, (name, record) in enumerate(zip(names, records, strict=True)):
        # A line whose label begins with an underscore has no entry in the legend.
        label = name[-_LONGEST_NAME:].lstrip("_") or "run"
        for number_of_curve, curve in enumerate(panel.curves):
            iterations, values = points(record, curve)
            if not iterations:
                continue
            few = len(iterations) <= _MOST_MARKERS
            axis.plot(
                iterations,
                values,
                color=colour(place if several else number_of_curve),
                linestyle="--" if curve.dashed else "-",
                marker=_MARKERS[place // len(COLOURS) % len(_MARKERS)] if few else "",
                label=(label if several else curve.label) or "_",
            )
            label = ""  # one entry a run
    dashed = next((curve.label for curve in panel.curves if curve.dashed), None)
    axis.set_title(f"{panel.title} (dashed: {dashed})" if several and dashed else panel.title, loc="left")
    axis.set_xlabel("iteration")
    axis.locator_params(axis="x", integer=True)
    if panel is PANELS["accuracy"]:
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if several or len(panel.curves) > 1:
        axis.legend()


def colour(place: int) -> str:
    """Return the colour of the run, or of the curve of a single run, in that place, counted from 0."""
    return COLOURS[place % len(COLOURS)]


def points(record: RunRecord, curve: Curve) -> tuple[list[float], list[float]]:
    """Return iterations and values of a curve, without those that are no numbers."""
    rows: tuple[Row, ...] = getattr(record, curve.kind)
    points = [(number(row, "iteration"), number(row, curve.metric)) for row in rows]
    points = [point for point in points if not any(map(math.isnan, point))]
    return [iteration for iteration, _ in points], [value for _, value in points]


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Draw as reports are drawn, with the same bytes for the same salt; raises ReportError without matplotlib."""
    require_matplotlib()
    import matplotlib

    # Whatever the user's own style is, a report looks the same.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": f"mlx-cpo report {salt}",
                "svg.fonttype": "none",
                "font.family": ["sans-serif"],
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.titleweight": "bold",
                "axes.edgecolor": "#888888",
                "axes.grid": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": "#dddddd",
                "grid.linewidth": 0.6,
                "figure.facecolor": "white",
                "legend.frameon": False,
                "legend.fontsize": 8,
                "lines.linewidth": 1.6,
                "lines.markersize": 3.5,
                "text.color": "#222222",
                "axes.labelcolor": "#444444",
                "xtick.color": "#444444",
                "ytick.color": "#444444",
                "text.parse_math": False,
            }
        )
        yield
