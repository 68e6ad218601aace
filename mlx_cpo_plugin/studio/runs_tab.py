"""What was trained in a folder: overlaid curves, settings that differ, a report to keep."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.report.command import write_report
from mlx_cpo_plugin.report.record import RunRecord, differing_settings
from mlx_cpo_plugin.studio.live_runs import LiveRuns
from mlx_cpo_plugin.studio.messages import fault_html
from mlx_cpo_plugin.studio.run_view import overlaid_html

SHOWN_AT_FIRST = 3


def build_runs_tab(live: LiveRuns) -> gr.CheckboxGroup:
    """Lay out the tab; return the control that names the runs, whose choices are those at the time."""
    names = live.reported()
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
            names = dict(zip(chosen, live.records(chosen), strict=True))
            return "", table_html(names), overlaid_html(names)
        except UserError as error:
            return fault_html(error), "", ""

    def write(chosen: Sequence[str]) -> tuple[str, Any]:
        try:
            output = report_of([record.folder for record in live.records(chosen)])
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
