"""What a run has written so far, as pieces of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints import METRICS_FILE
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.report.record import Row, RunRecord, answers_over_time, number
from mlx_cpo_plugin.settings.run_settings import read_run_settings
from mlx_cpo_plugin.studio.charts import Line, Point, chart_html
from mlx_cpo_plugin.studio.charts import number as shortly
from mlx_cpo_plugin.studio.metrics_file import read_metrics
from mlx_cpo_plugin.studio.run_process import CONSOLE_NAME, RunState, console_tail, state
from mlx_cpo_plugin.verdict import Verdict


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        key: of the metrics that it follows.
        name: what stands beside it.
        colour: see the style.
        dashed: of a validation.
    """

    key: str
    name: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of the page: its element is called ``curve-`` and its name.

    Attributes:
        title: what it shows.
        unit: what stands beside the y axis.
        limits: of the y axis, where they do not depend on the values.
    """

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    limits: Point | None = None


def _train_and_valid(metric: str) -> tuple[Curve, Curve]:
    return (
        Curve(f"train_{metric}", "training", "train"),
        Curve(f"val_{metric}", "validation", "valid", dashed=True),
    )


def _chosen_and_rejected(metric: str) -> tuple[Curve, ...]:
    return tuple(
        Curve(f"{prefix}_{metric.format(side)}", f"{name}{side}", side, dashed=prefix == "val")
        for prefix, name in (("train", ""), ("val", "validation: "))
        for side in ("chosen", "rejected")
    )


CHARTS = (
    Chart("loss", "Loss", "Loss", _train_and_valid("loss")),
    Chart("accuracy", "Preference accuracy", "Share of pairs", _train_and_valid("accuracies"), (0.0, 1.0)),
    Chart("margin", "Margin of the rewards", "Chosen minus rejected", _train_and_valid("margins")),
    Chart("rewards", "Rewards", "Reward", _chosen_and_rejected("{}_reward")),
    Chart("logps", "Log-probs of the answers", "Nats", _chosen_and_rejected("policy_{}_logps")),
    Chart("rate", "Learning rate", "Learning rate", (Curve("learning_rate", "learning rate", "train"),)),
    Chart("speed", "Speed", "Scored tokens per second", (Curve("tokens_per_second", "tokens/s", "train"),)),
    Chart("memory", "Peak memory", "GB", (Curve("peak_memory", "peak", "train"),)),
)
FIGURES = {
    "Loss": "train_loss",
    "Validation loss": "val_loss",
    "Test loss": "test_loss",
    "Accuracy": "train_accuracies",
    "Validation accuracy": "val_accuracies",
    "Test accuracy": "test_accuracies",
    "Margin": "train_margins",
    "Validation margin": "val_margins",
    "Test margin": "test_margins",
    "Learning rate": "learning_rate",
    "Tokens per second": "tokens_per_second",
    "Peak memory, GB": "peak_memory",
}
STATUS_WORDS = {
    "none": "Not started",
    "running": "Running",
    "finished": "Finished",
    "stopped": "Stopped and saved",
    "ended": "Stopped at once",
    "killed": "Killed: out of memory?",
    "failed": "Failed",
    "lost": "Ended, cause unknown",
}
KILLED = (
    "The training was killed by a signal that cannot be caught, as the system does when memory runs out. Its last "
    "lines are in the console below. A lower batch_size or max_seq_length, or grad_checkpoint: true, takes less "
    "memory; Resume continues from the last checkpoint, if there is one."
)
_RUN_COLOURS = 6
# How the progress bar of a run writes: 40%|####  | 12/30 [00:10<00:15, 1.20it/s]
_PROGRESS = re.compile(r"Training:.*?(\d+)/(\d+) \[([\d:]+)<([\d:?]+)")
_RESUMED = re.compile(r"Resuming after iteration (\d+)")
# A stop was asked for: that it took place is no alarm.
_ALARM = re.compile(r"^(?:Warning: |error: (?!stopped after iteration)|\[?ERROR|\S*Error: )")
_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done, total: iterations, those before it was resumed included.
        left: the time left in words; empty where it is not known.
        resumed_after: the iteration after which it was resumed; None of a run that was not.
    """

    done: int
    total: int
    left: str = ""
    resumed_after: int | None = None

    @property
    def percent(self) -> int:
        return 100 * self.done // max(self.total, 1)

    def words(self) -> str:
        """Return it as a sentence."""
        resumed = "" if self.resumed_after is None else f", resumed after {self.resumed_after:,}"
        left = f", {self.left} left" if self.left else ""
        return f"Iteration {self.done:,} of {self.total:,} ({self.percent} %){left}{resumed}"


def amounts_written(folder: Path) -> tuple[int, int]:
    """Return the bytes of metrics and of console that runs have written; 0 where there is nothing."""
    files = (folder / name for name in (METRICS_FILE, CONSOLE_NAME))
    metrics, console = (file.stat().st_size if file.is_file() else 0 for file in files)
    return metrics, console


def points(rows: Iterable[Row], key: str) -> list[Point]:
    """Return iteration and value of every finite number of this name."""
    values = ((number(row, "iteration"), number(row, key)) for row in rows if key in row)
    return [(x, value) for x, value in values if x == x and value == value]


def charts_html(rows: Sequence[Row]) -> str:
    """Return all charts that have something to show."""
    drawn = (
        chart_html(
            f"curve-{chart.name}",
            chart.title,
            chart.unit,
            [Line(curve.name, points(rows, curve.key), curve.colour, curve.dashed) for curve in chart.curves],
            chart.limits,
        )
        for chart in CHARTS
    )
    return f'<div class="charts">{"".join(drawn)}</div>'


def overlaid_html(records: Mapping[str, RunRecord]) -> str:
    """Return a chart of every metric that a run has; of several runs, a colour and a name for each."""
    several = len(records) > 1

    def drawn(chart: Chart) -> str:
        curves = chart.curves[:2] if several else chart.curves
        if several and curves[-1].key.startswith("train_"):
            return ""  # chosen and rejected of several runs are too many lines; their margin is shown
        lines = [
            Line(
                curve.name if not several else name if curve is curves[0] else "",
                points([*record.train, *record.valid], curve.key),
                str(place % _RUN_COLOURS) if several else curve.colour,
                curve.dashed,
            )
            for place, (name, record) in enumerate(records.items())
            for curve in curves
        ]
        dashed = " (dashed: validation)" if several and curves[-1].dashed else ""
        return chart_html(f"runs-{chart.name}", chart.title + dashed, chart.unit, lines, chart.limits)

    return f'<div class="charts">{"".join(map(drawn, CHARTS))}</div>'


def progress_of(lines: Sequence[str]) -> Progress | None:
    """Return how far the run is that printed these lines, from its last progress bar."""
    resumed = next((int(found[1]) for line in lines if (found := _RESUMED.search(line))), None)
    for line in reversed(lines):
        if found := _PROGRESS.search(line):
            left = "" if "?" in found[4] else found[4]
            return Progress(int(found[1]), int(found[2]), left, resumed)
    return None


def progress_in(folder: Path, now: RunState, rows: Sequence[Row]) -> Progress | None:
    """Return how far the run in a folder is; of one that ended, or the page did not start, as far as metrics tell."""
    iterations = [number(row, "iteration") for row in rows if row.get("kind") == "train"]
    trained = int(iterations[-1]) if iterations else None
    if now.own:
        found = progress_of(console_tail(folder, 400))
        if found is None or now.running:
            return found
        # The last iteration of a run that was stopped is reported, but not drawn in its progress bar.
        return replace(found, done=min(max(found.done, trained or 0), found.total), left="")
    try:
        total = read_run_settings(folder)[0].get("iters")
    except (UserError, OSError, ValueError):
        total = None
    return Progress(trained, total) if trained is not None and isinstance(total, int) else None


def banner_html(name: str, folder: Path, others: int = 0) -> str:
    """Return one line that says how a run stands, for all tabs.

    Its attributes tell the script of the page the status and the per cent that are done.
    """
    now, rows = state(folder), read_metrics(folder)
    progress = progress_in(folder, now, rows)
    percent = "" if progress is None else str(progress.percent)
    words = [escape(name)]
    if progress is not None:
        words.append(escape(progress.words()))
    words += [f"{others} more at work"] if others else []
    return (
        f'<p class="status {now.status}" data-status="{now.status}" data-percent="{percent}" data-run="{escape(name)}">'
        f"<strong>{STATUS_WORDS[now.status]}</strong> <span>{' · '.join(words)}</span></p>"
    )


def status_html(folder: Path, rows: Sequence[Row]) -> str:
    """Return how a run stands: status, progress, alarms and the latest figures."""
    now, lines = state(folder), console_tail(folder, 400)
    parts = [
        f'<p class="status {now.status}" role="status"><strong>{STATUS_WORDS[now.status]}</strong>'
        f" <span>{escape(str(folder))}</span></p>",
        _progress_html(now, progress_in(folder, now, rows)),
    ]
    alarms = list(dict.fromkeys(line for line in lines if now.own and _ALARM.match(line)))[-5:]
    alarms += [KILLED] * (now.status == "killed")
    parts += [f'<p class="alarm" role="alert">{escape(line)}</p>' for line in alarms]
    verdicts = [verdict for row in rows if (verdict := Verdict.from_report(row)) is not None]
    if verdicts:
        parts.append(f"<p>The model is {escape(verdicts[-1].sentence())}.</p>")
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    known = {title: latest[key] for title, key in FIGURES.items() if latest.get(key) is not None}
    if known:
        cells = "".join(
            f"<div><dt>{escape(title)}</dt><dd>{shortly(value)}</dd></div>" for title, value in known.items()
        )
        parts.append(f'<dl class="figures">{cells}</dl>')
    samples = [dict(row) for row in rows if row.get("kind") == "sample"]
    parts += [_answers_html(prompt, answers) for prompt, answers in answers_over_time(samples, most=3)]
    return "".join(parts)


def _answers_html(prompt: str, answers: Sequence[tuple[int, str]]) -> str:
    """Return the answers to a prompt side by side."""
    heads = "".join(f'<th scope="col">Iteration {iteration}</th>' for iteration, _ in answers)
    cells = "".join(f"<td>{escape(answer) or '(nothing)'}</td>" for _, answer in answers)
    table = f"<caption>{escape(prompt)}</caption><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody>"
    label = escape(f"Answers to: {prompt}")
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{table}</table></div>'


def _progress_html(now: RunState, progress: Progress | None) -> str:
    if progress is None or now.status == "none":
        return "<p>Loading data and model …</p>" if now.running else ""
    return (
        f'<label class="progress">{escape(progress.words())}<progress max="{progress.total}" value="{progress.done}">'
        f"{progress.percent} %</progress></label>"
    )


def console_html(folder: Path) -> str:
    """Return the last lines of the console."""
    now = state(folder)
    if now.own or now.status == "none":
        text = "\n".join(_COLOUR_CODES.sub("", line) for line in console_tail(folder)) or "Nothing yet."
    else:
        text = "This run was not started from the page; what it prints is in its own terminal."
    return f'<div class="console" tabindex="0" role="region" aria-label="Console"><pre>{escape(text)}</pre></div>'
