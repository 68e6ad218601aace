"""A run's report as one HTML file that needs no other: results, warnings, curves, settings and versions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.report.plots import PANELS, as_svg, colour, panels_with_points
from mlx_cpo_plugin.report.record import (
    ReportError,
    Row,
    RunRecord,
    answers_over_time,
    differing_settings,
    names_of_runs,
    number,
)
from mlx_cpo_plugin.report.standings import Standing

TEMPLATE = Path(__file__).with_name("page.html")
COLUMNS = ("First", "Best", "Last", "Test")
ABSENT = "-"


class Measure(NamedTuple):
    """A row of the table of results.

    Attributes:
        kind, metric: which rows of ``metrics.jsonl``, and the name in them.
        test_metric: its name in the test's row; empty where there is none.
        sign: 1 where more is better, -1 where less is.
        form: how a value is written.
    """

    title: str
    kind: str
    metric: str
    test_metric: str
    sign: int
    form: str


MEASURES = (
    Measure("Validation accuracy", "valid", "val_accuracies", "test_accuracies", 1, "{:.1%}"),
    Measure("Validation margin", "valid", "val_margins", "test_margins", 1, "{:+.3f}"),
    Measure("Validation loss", "valid", "val_loss", "test_loss", -1, "{:.4f}"),
    Measure("Training loss", "train", "train_loss", "", -1, "{:.4f}"),
)


class Figure(NamedTuple):
    """A cell: the value as text, and at which iteration it was reached where that is of interest."""

    value: str
    iteration: str = ""


def as_html(records: Sequence[RunRecord], standings: Sequence[Standing] = ()) -> str:
    """Return the page, with what a comparison says of the models; what comes from files is escaped.

    Raises:
        ReportError: matplotlib or Jinja is missing, or there is nothing to draw.
    """
    if find_spec("jinja2") is None:
        raise ReportError("A page needs jinja2; run pip install 'mlx-cpo-plugin[report]'.")
    from jinja2 import Environment
    from markupsafe import Markup

    names = names_of_runs([record.folder for record in records])
    panels = panels_with_points(records)
    if not panels:
        raise ReportError("There is no number to show in the metrics of these runs; let them train for longer.")
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"CPO run {names[0]}" if len(records) == 1 else f"{len(records)} CPO runs",
        several=len(records) > 1,
        columns=COLUMNS,
        runs=[_run(name, record, place) for place, (name, record) in enumerate(zip(names, records, strict=True))],
        standings=standings,
        warnings=[(name, text) for name, record in zip(names, records, strict=True) for text in record.warnings],
        differing=[(key, list(map(_shown, values))) for key, values in differing_settings(records).items()],
        # matplotlib escapes what it writes.
        plots=[{"title": PANELS[name].title, "svg": Markup(as_svg(records, [name]))} for name in panels],
        version=__version__,
    )


def _run(name: str, record: RunRecord, place: int) -> dict[str, Any]:
    return {
        "name": name,
        "colour": colour(place),
        "course": course(record),
        "verdict": None if record.verdict is None else record.verdict.sentence(),
        "measures": [
            {"title": measure.title, "figures": figures}
            for measure in MEASURES
            if (figures := _figures(record, measure)) is not None
        ],
        "samples": answers_over_time(record.samples),
        "settings": [(key, _shown(value)) for key, value in record.settings.items()],
        "versions": record.versions,
    }


def course(record: RunRecord) -> str:
    """Return one sentence: when the run was, how far it got and how long it took."""
    parts = [f"Iteration {record.iteration:,}" + (f" of {record.iters:,}" if record.iters else "")]
    started, updated = record.started, record.updated
    if started and updated:
        ended = "finished" if record.finished else "last report"
        parts.append(f"started {_moment(started)}, {ended} {_moment(updated)}, {_duration(started, updated)}")
    tokens = number(record.last, "trained_tokens")
    if not math.isnan(tokens):
        parts.append(f"{tokens:,.0f} scored tokens")
    return "; ".join(parts) + "."


def _figures(record: RunRecord, measure: Measure) -> list[Figure] | None:
    """Return the first, best, last and test figure; None where there are none but perhaps the test's."""
    rows = [row for row in getattr(record, measure.kind) if not math.isnan(number(row, measure.metric))]
    test = [row for row in record.test if not math.isnan(number(row, measure.test_metric))]
    if not rows:
        return None
    best = max(rows, key=lambda row: measure.sign * number(row, measure.metric))

    def figure(row: Row, metric: str, with_iteration: bool = False) -> Figure:
        iteration = number(row, "iteration")
        shown = with_iteration and not math.isnan(iteration)
        return Figure(measure.form.format(number(row, metric)), f"{iteration:.0f}" if shown else "")

    return [
        figure(rows[0], measure.metric),
        figure(best, measure.metric, with_iteration=True),
        figure(rows[-1], measure.metric),
        figure(test[-1], measure.test_metric) if test else Figure(ABSENT),
    ]


def _shown(value: Any) -> str:
    """Return a setting as YAML writes it, in one line."""
    if value is None:
        return ABSENT
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()
    )


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _duration(start: datetime, end: datetime) -> str:
    seconds = round((end - start).total_seconds())
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
