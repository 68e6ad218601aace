"""What a run has written so far, as tables for curves and as pieces of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from mlx_cpo_plugin.checkpoints import METRICS_FILE
from mlx_cpo_plugin.report.record import ReportError, answers_over_time, rows_of_last_run
from mlx_cpo_plugin.studio.run_process import CONSOLE_NAME, RunState, console_tail, state
from mlx_cpo_plugin.verdict import Verdict


@dataclass(frozen=True)
class Curve:
    """A plot of the page.

    Attributes:
        title: what it shows.
        lines: name of a line -> the key of the metrics that it follows.
    """

    title: str
    lines: Mapping[str, str]


CURVES = (
    Curve("Loss", {"train": "train_loss", "validation": "val_loss"}),
    Curve("Accuracy", {"train": "train_accuracies", "validation": "val_accuracies"}),
    Curve("Margin", {"train": "train_margins", "validation": "val_margins"}),
    Curve("Reward", {"chosen": "train_chosen_reward", "rejected": "train_rejected_reward"}),
    Curve("Log-prob", {"chosen": "train_policy_chosen_logps", "rejected": "train_policy_rejected_logps"}),
    Curve("Learning rate", {"learning rate": "learning_rate"}),
    Curve("Tokens per second", {"tokens": "tokens_per_second"}),
    Curve("Peak memory, GB", {"memory": "peak_memory"}),
)
FIGURES = {
    "Loss": "train_loss",
    "Validation loss": "val_loss",
    "Accuracy": "train_accuracies",
    "Margin": "train_margins",
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
    "failed": "Failed",
    "lost": "Ended, cause unknown",
}
# How the progress bar of a run writes: 40%|####  | 12/30 [00:10<00:15, 1.20it/s]
_PROGRESS = re.compile(r"Training:.*?(\d+)/(\d+) \[([\d:]+)<([\d:?]+)")
# A stop was asked for: that it took place is no alarm.
_ALARM = re.compile(r"^(?:Warning: |error: (?!stopped after iteration)|\[?ERROR|\S*Error: )")
_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that the last run in a folder has written whole; none where there are none."""
    try:
        return rows_of_last_run(folder)
    except ReportError:
        return []


def amounts_written(folder: Path) -> tuple[int, int]:
    """Return the bytes of metrics and of console that runs have written; 0 where there is nothing."""
    files = (folder / name for name in (METRICS_FILE, CONSOLE_NAME))
    metrics, console = (file.stat().st_size if file.is_file() else 0 for file in files)
    return metrics, console


def curve_frame(rows: Sequence[Mapping[str, Any]], curve: Curve) -> pd.DataFrame:
    """Return the columns ``iteration``, ``value`` and ``line`` of a plot."""
    points = [
        (row["iteration"], row[key], name)
        for name, key in curve.lines.items()
        for row in rows
        if "iteration" in row and row.get(key) is not None
    ]
    frame = pd.DataFrame(points, columns=["iteration", "value", "line"])
    return frame.astype({"iteration": "int64", "value": "float64", "line": "object"})


def progress_of(lines: Sequence[str]) -> tuple[int, int, str] | None:
    """Return iterations that are done, all of them, and the time left in words, from the last progress bar."""
    for line in reversed(lines):
        found = _PROGRESS.search(line)
        if found:
            return int(found[1]), int(found[2]), found[4]
    return None


def status_html(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how a run stands: status, progress, alarms and the latest figures."""
    now, lines = state(folder), console_tail(folder, 400)
    parts = [
        f'<p class="status {now.status}" role="status"><strong>{STATUS_WORDS[now.status]}</strong>'
        f" <span>{escape(str(folder))}</span></p>",
        _progress_html(now, lines),
    ]
    alarms = list(dict.fromkeys(line for line in lines if _ALARM.match(line)))
    parts += [f'<p class="alarm" role="alert">{escape(line)}</p>' for line in alarms[-5:]]
    verdicts = [verdict for row in rows if (verdict := Verdict.from_report(row)) is not None]
    if verdicts:
        parts.append(f"<p>The model is {escape(verdicts[-1].sentence())}.</p>")
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    known = {title: latest[key] for title, key in FIGURES.items() if latest.get(key) is not None}
    if known:
        cells = "".join(
            f"<div><dt>{escape(title)}</dt><dd>{_number(value)}</dd></div>" for title, value in known.items()
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
    return f'<div class="wide" tabindex="0" role="region" aria-label="Answers to a prompt"><table>{table}</table></div>'


def _progress_html(now: RunState, lines: Sequence[str]) -> str:
    progress = progress_of(lines)
    if progress is None or now.status == "none":
        return "<p>Loading data and model …</p>" if now.running else ""
    done, total, left = progress
    words = f"Iteration {done} of {total}" + (f", {left} left" if now.running and "?" not in left else "")
    return (
        f'<label class="progress">{words}<progress max="{total}" value="{done}">{done / total:.0%}</progress></label>'
    )


def console_html(folder: Path) -> str:
    """Return the last lines of the console."""
    text = "\n".join(_COLOUR_CODES.sub("", line) for line in console_tail(folder))
    return f'<div class="console" tabindex="0" aria-label="Console"><pre>{escape(text) or "Nothing yet."}</pre></div>'


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
