"""What was trained in a folder: overlaid curves, settings that differ, a report to keep."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.report.command import write_report
from mlx_cpo_plugin.report.record import RunRecord, differing_settings, folders_of_runs
from mlx_cpo_plugin.studio.messages import fault_html
from mlx_cpo_plugin.studio.run_view import overlaid_html

SHOWN_AT_FIRST = 3


def run_names(root: Path) -> list[str]:
    """Return the runs below ``root``, the one that wrote last first, by their folders relative to it; none is read."""
    return [str(folder.relative_to(root)) for folder in folders_of_runs(root)]


def chosen_runs(root: Path, names: Sequence[str]) -> list[RunRecord]:
    """Return the runs of these names.

    Raises:
        ConfigError: none is named, or there is no such run below ``root``.
        ReportError: one of them cannot be read.
    """
    if not names:
        raise ConfigError("Pick a run.")
    runs = run_names(root)
    missing = next((name for name in names if name not in runs), None)
    if missing is not None:
        message = f"There is no run {missing!r} below {root}; pick one from the list."
        raise ConfigError(message, place=str(root), allowed=", ".join(runs))
    return [RunRecord.read(root / name) for name in names]


def build_runs_tab(root: Path) -> gr.CheckboxGroup:
    """Lay out the tab; return the control that names the runs, whose choices are those at the time."""
    names = run_names(root)
    runs = gr.CheckboxGroup(names, value=names[:SHOWN_AT_FIRST], label="Runs", elem_id="runs")
    with gr.Row():
        show = gr.Button("Show", variant="primary", size="md", elem_id="show-runs")
        make = gr.Button("Make a report", size="md", elem_id="make-report")
    said = gr.HTML("", elem_id="runs-said")
    report = gr.File(label="Report", visible=False, elem_id="report")
    table = gr.HTML("", elem_id="runs-table")
    curves = gr.HTML("", elem_id="runs-curves")

    def compare(chosen: Sequence[str]) -> tuple[str, str, str]:
        try:
            names = dict(zip(chosen, chosen_runs(root, chosen), strict=True))
            return "", table_html(names), overlaid_html(names)
        except UserError as error:
            return fault_html(error), "", ""

    def write(chosen: Sequence[str]) -> tuple[str, Any]:
        try:
            output = report_of([record.folder for record in chosen_runs(root, chosen)])
        except UserError as error:
            return fault_html(error), gr.update(visible=False)
        return "", gr.update(value=output, visible=True)

    show.click(compare, runs, [said, table, curves], show_progress="minimal")
    make.click(write, runs, [said, report], show_progress="minimal")
    return runs


def report_of(folders: Sequence[Path]) -> str:
    """Write the report of runs where the browser may fetch it, a folder that holds nothing else; return its path.

    Raises:
        ReportError: there is no run, or it cannot be drawn.
    """
    output = Path(tempfile.mkdtemp(prefix="mlx-cpo-report-")) / "report.html"
    write_report(folders, output)
    return str(output)


def table_html(named: Mapping[str, RunRecord]) -> str:
    """Return the newest figures of each run and the settings in which they differ, a column each."""
    records = list(named.values())
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in named)
    rows = {
        "Iterations": [f"{record.iteration}" + (f" of {record.iters}" if record.iters else "") for record in records],
        **{
            title: [_figure(record.last.get(key)) for record in records]
            for title, key in (
                ("Loss", "train_loss"),
                ("Validation loss", "val_loss"),
                ("Validation accuracy", "val_accuracies"),
                ("Validation margin", "val_margins"),
            )
        },
        **{key: [str(value) for value in values] for key, values in differing_settings(records).items()},
    }
    body = "".join(
        f"<tr><th scope='row'>{escape(title)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for title, values in rows.items()
    )
    warnings = "".join(
        f'<p class="alarm">{escape(name)}: {escape(warning)}</p>'
        for name, record in named.items()
        for warning in record.warnings
    )
    return (
        f"<div class='wide'><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>{warnings}"
    )


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
