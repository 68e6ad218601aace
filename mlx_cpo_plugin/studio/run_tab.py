"""Start, stop and watch a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio import document, run_process
from mlx_cpo_plugin.studio.confirmation import build_confirmation, outside_paths
from mlx_cpo_plugin.studio.messages import fault_html, note_html
from mlx_cpo_plugin.studio.run_view import (
    CURVES,
    Curve,
    amounts_written,
    console_html,
    curve_frame,
    read_metrics,
    status_html,
)

# Blue and orange, which people who see no red or green can tell apart.
COLOURS = ("#2f81f7", "#e3820b")
SECONDS_BETWEEN_LOOKS = 1.0
FEWEST_POINTS = 2

# A folder, the bytes of metrics and of console in it, and how its run stood.
Seen = tuple[str, int, int, str]


@dataclass(frozen=True)
class RunTab:
    """The parts of the tab that others read or change.

    Attributes:
        watched: the adapter folder of the run that is shown, as text; may be empty.
        look: returns updates for ``parts`` from the watched folder, and what was seen last.
        parts: status, console and curves.
    """

    watched: gr.State
    look: Any
    seen: gr.State
    parts: list[Any]


def build_run_tab(root: Path, yaml: gr.Code) -> RunTab:
    """Lay out the tab; runs are of the configuration that ``yaml`` holds."""
    watched, seen = gr.State(""), gr.State(("", -1, -1, ""))
    with gr.Row():
        start_button = gr.Button("Start", size="md", variant="primary", elem_id="start")
        stop_button = gr.Button("Stop (saves)", size="md", variant="stop", elem_id="stop")
        resume_button = gr.Button("Resume", size="md", elem_id="resume")
    said = gr.HTML("", elem_id="run-said")
    confirmation = build_confirmation(root, "run")
    status = gr.HTML("", elem_id="status")
    with gr.Row(elem_classes="curves"):
        plots = [_plot(curve) for curve in CURVES]
    console = gr.HTML("", elem_id="console")
    parts = [status, console, *plots]

    def look(folder: str, before: Seen) -> list[Any]:
        """Return what is new: nothing, the words, or the curves, too."""
        if not folder:
            return [*[gr.skip()] * len(parts), before]
        path = Path(folder)
        now = (folder, *amounts_written(path), run_process.state(path).status)
        if now == tuple(before):
            return [*[gr.skip()] * len(parts), before]
        rows = read_metrics(path)
        drawn = [gr.skip()] * len(CURVES)
        if now[:2] != tuple(before)[:2]:
            drawn = [_drawn(curve, rows) for curve in CURVES]
        return [status_html(path, rows), console_html(path), *drawn, now]

    def begin(text: str, resume: bool, ticked: bool, asked: list[str]) -> list[Any]:
        """Start a run, and return what there is to say and the folder to watch; that of a run already in it, too."""
        answer, folder = confirmation.unchanged, None
        try:
            settings = document.resolved(text).settings
            question, answer = confirmation.ask(vars(settings), ticked, asked)
            if question:
                return [question, "", *answer]
            folder = document.adapter_folder(text, root)
            run_process.start(folder, text, root, resume)
        except UserError as error:
            found = folder is not None and run_process.state(folder).running
            return [fault_html(error), str(folder) if found else "", *answer]
        return [note_html(f"Started in {folder}."), str(folder), *answer]

    def end(folder: str) -> str:
        if not folder or not run_process.state(Path(folder)).running:
            return note_html("Nothing is running.")
        try:
            run_process.stop(Path(folder))
        except (UserError, OSError) as error:
            return fault_html(error)
        return note_html("Stopping after this micro-batch or validation; press again to stop without saving.")

    def began(folder: str, present: str) -> str:
        return folder or present

    for button, resume in ((start_button, False), (resume_button, True)):
        started = gr.State("")
        button.click(
            lambda text, ticked, asked, resume=resume: begin(text, resume, ticked, asked),
            [yaml, *confirmation.parts],
            [said, started, *confirmation.parts],
        ).then(began, [started, watched], watched).then(look, [watched, seen], [*parts, seen], show_progress="hidden")
    stop_button.click(end, watched, said)
    timer = gr.Timer(SECONDS_BETWEEN_LOOKS)
    timer.tick(look, [watched, seen], [*parts, seen], show_progress="hidden", queue=False)
    return RunTab(watched, look, seen, parts)


def folder_to_watch(root: Path, text: str) -> str:
    """Return the folder of a run that is at work, or else that of the configuration, if anything ran in it.

    Folders outside ``root`` are not looked into.
    """
    running = run_process.running_folders(root)
    if running:
        return str(running[0])
    try:
        folder = document.adapter_folder(text, root)
        if outside_paths({"adapter_path": str(folder)}, root):
            return ""  # it is looked at once a run in it was asked for, and confirmed
    except UserError:
        return ""
    return str(folder) if any(amounts_written(folder)) or run_process.read_record(folder) else ""


def _drawn(curve: Curve, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Show a plot once there is a line to see, the first one: it takes its lines from the first table it is given."""
    frame = curve_frame(rows, curve)
    if (frame["line"] == next(iter(curve.lines))).sum() < FEWEST_POINTS:
        return gr.update(visible=False)
    return gr.update(value=frame, visible=True)


def _plot(curve: Curve) -> gr.LinePlot:
    return gr.LinePlot(
        None,
        visible=False,
        x="iteration",
        y="value",
        color="line",
        color_map=dict(zip(curve.lines, COLOURS, strict=False)),
        color_title=" ",
        title=curve.title,
        x_title="Iteration",
        y_title=" ",
        height=240,
        min_width=300,
        elem_id="curve-" + curve.title.split(",")[0].lower().replace(" ", "-"),
    )
