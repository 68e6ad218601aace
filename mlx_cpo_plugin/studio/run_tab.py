"""Start, stop and watch a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, CHECKPOINTS
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio import document, run_process
from mlx_cpo_plugin.studio.child import Jobs
from mlx_cpo_plugin.studio.confirmation import build_confirmation, outside_paths
from mlx_cpo_plugin.studio.estimate import build_estimate
from mlx_cpo_plugin.studio.export_form import build_export_form
from mlx_cpo_plugin.studio.live_runs import LiveRuns
from mlx_cpo_plugin.studio.messages import fault_html, note_html
from mlx_cpo_plugin.studio.metrics_file import read_metrics
from mlx_cpo_plugin.studio.run_view import amounts_written, banner_html, charts_html, console_html, status_html
from mlx_cpo_plugin.studio.runs_tab import report_of
from mlx_cpo_plugin.studio.tasks import build_cancel
from mlx_cpo_plugin.studio.train_tab import Form
from mlx_cpo_plugin.studio.used_folder import build_used_folder

# Charts of so many rows do not look otherwise with another one.
ROWS_A_STEP = 250
# What becomes of a run that the folder holds already.
RESUME, ASIDE = "resume", "aside"


class Seen(NamedTuple):
    """What a look at the runs has found; what has not changed since is not shown again.

    Attributes:
        folder: of the run that is shown.
        amounts: bytes of its metrics and its console.
        status: how it stands.
        at_work: the names of all runs that are at work.
        target: the folder that Start and Resume are about, whether it is in use, and whether there is a checkpoint.
        drawn: how many rows of metrics the charts show.
    """

    folder: str = ""
    amounts: tuple[int, int] = (-1, -1)
    status: str = ""
    at_work: tuple[str, ...] = ()
    target: tuple[str, bool, bool] = ("", False, False)
    drawn: int = 0


@dataclass(frozen=True)
class RunTab:
    """The parts of the tab that others read or change.

    Attributes:
        watched: the adapter folder of the run that is shown, as text; may be empty.
        look: returns updates for ``outputs``; its inputs are ``inputs``.
        compare: the button that asks for the run to be compared.
        visit: searches for runs; returns updates for ``visited``.
    """

    watched: gr.State
    look: Callable[..., dict[Any, Any]]
    inputs: list[Any]
    outputs: list[Any]
    compare: gr.Button
    visit: Callable[..., dict[Any, Any]]
    visited: list[Any]


def build_run_tab(root: Path, form: Form, banner: gr.HTML, live: LiveRuns, estimates: Jobs, exports: Jobs) -> RunTab:
    """Lay out the tab; runs are of the configuration that the form stands for.

    Args:
        banner: shows on every tab how the run stands.
    """
    watched, seen = gr.State(""), gr.State(Seen())
    picker = gr.Dropdown([], label="Run", info="The run that is shown below, which Stop stops.", elem_id="run-picker")
    with gr.Row():
        start_button = gr.Button("Start", size="md", variant="primary", elem_id="start")
        stop_button = gr.Button("Stop (saves)", size="md", variant="stop", interactive=False, elem_id="stop")
        resume_button = gr.Button("Resume", size="md", interactive=False, elem_id="resume")
        estimate_button = gr.Button("Estimate memory and time", size="md", elem_id="estimate")
        cancel_button = build_cancel("estimate")
    said = gr.HTML("", elem_id="run-said")
    confirmation = build_confirmation(root, "run")
    used = build_used_folder(root)
    build_estimate(root, form, estimates, confirmation, estimate_button, cancel_button)
    with gr.Row(visible=False) as ended:
        compare_button = gr.Button("Compare with the base model", size="md", elem_id="run-compare")
        report_button = gr.Button("Make a report", size="md", elem_id="run-report")
    report = gr.File(label="Report", visible=False, elem_id="run-report-file")
    export = build_export_form(root, watched, exports)
    status = gr.HTML("", elem_id="status")
    charts = gr.HTML("", elem_id="curves")
    console = gr.HTML("", elem_id="console")
    folder_of = lru_cache(maxsize=64)(lambda text: _folder_of(text, root))

    def look(folder: str, before: Seen, text: str) -> dict[Any, Any]:
        """Return what is new since the look before: nothing, the words, or the charts, too."""
        at_work = live.at_work()
        names = tuple(map(live.name, at_work))
        begun = [each for each, name in zip(at_work, names, strict=True) if name not in before.at_work]
        path = Path(folder) if folder else None
        if begun and (path is None or path not in at_work):
            path = begun[0]
        aimed_at = folder_of(text)
        if aimed_at is not None:
            live.heed(aimed_at)
        target = _target(aimed_at)
        if path is None:
            now = Seen(at_work=names, target=target)
        else:
            status_now = run_process.state(path).status
            now = Seen(str(path), amounts_written(path), status_now, names, target, before.drawn)
        updates: dict[Any, Any] = {seen: now}
        if now == before:
            return updates
        if now.target != before.target or now.status != before.status or now.folder != before.folder:
            updates |= buttons(path, target)
        if path is None:
            return updates
        if now.folder != before.folder:
            updates |= {watched: now.folder, picker: gr.update(choices=choices(path), value=live.name(path))}
            updates[report] = gr.update(visible=False)
        elif before.status == "running" != now.status:
            updates[said] = ""  # that it started, or is about to stop
        rows = read_metrics(path)
        is_other = (now.folder, now.status) != (before.folder, before.status)
        if is_other or abs(len(rows) - now.drawn) > len(rows) // ROWS_A_STEP:
            updates |= {charts: charts_html(rows), seen: now._replace(drawn=len(rows))}
        beside = "".join(
            note_html(f"{live.name(each)} is training, too: they share memory and processor.")
            for each in at_work
            if each != path and path in at_work
        )
        updates |= {
            status: beside + status_html(path, rows),
            console: console_html(path),
            banner: banner_html(live.name(path), path, sum(each != path for each in at_work)),
        }
        return updates

    def buttons(path: Path | None, target: tuple[str, bool, bool]) -> dict[Any, Any]:
        _, in_use, has_checkpoint = target
        now = None if path is None else run_process.state(path)
        has_ended = path is not None and now is not None and not now.running and (path / ADAPTER_FILE).is_file()
        return {
            start_button: gr.update(interactive=not in_use),
            resume_button: gr.update(interactive=has_checkpoint and not in_use),
            stop_button: gr.update(interactive=now is not None and now.running and now.own),
            ended: gr.update(visible=has_ended),
            export: gr.update(visible=has_ended),
        }

    def choices(shown: Path) -> list[str]:
        return list(dict.fromkeys([live.name(shown), *map(live.name, live.known())]))

    def begin(text: str, answer: str, ticked: bool, asked: list[str]) -> list[Any]:
        """Start a run, and return what there is to say and the folder to watch; that of a run already in it, too.

        Args:
            answer: what becomes of a run that the folder holds; empty where that has not been asked.
        """
        confirmed, folder = confirmation.unchanged, None
        try:
            settings = document.resolved(text).settings
            question, confirmed = confirmation.ask(vars(settings), ticked, asked)
            if question:
                return [question, "", *confirmed, *used.hidden]
            folder = document.adapter_folder(text, root)
            if not answer and not run_process.state(folder).running and (asking := used.ask(settings)):
                return ["", "", *confirmed, *asking]
            run_process.start(folder, text, root, resume=answer == RESUME)
        except (UserError, OSError) as error:
            found = folder is not None and run_process.state(folder).running
            return [fault_html(error), str(folder) if found else "", *confirmed, *used.hidden]
        live.add(folder)
        return [note_html(f"Started in {folder}."), str(folder), *confirmed, *used.hidden]

    def begin_elsewhere(text: str, ticked: bool, asked: list[str], adapter_path: str) -> list[Any]:
        fields = form.controls.fields.values()
        contents = document.contents_of(text, fields) | {"adapter_path": adapter_path}
        changed = document.with_contents(text, contents, fields)
        return [*begin(changed, "", ticked, asked), adapter_path]

    def end(folder: str) -> str:
        now = run_process.state(Path(folder)) if folder else run_process.RunState("none")
        if not now.running:
            return note_html("Nothing is running.")
        if not now.own:
            return note_html("This run was not started from the page; press Ctrl-C in its terminal.")
        try:
            run_process.stop(Path(folder))
        except (UserError, OSError) as error:
            return fault_html(error)
        return note_html("Stopping after this micro-batch or validation; press again to stop without saving.")

    def began(folder: str, present: str) -> str:
        return folder or present

    def pick(name: str, present: str) -> str:
        return str(live.folder(name or "") or present)

    def visit(folder: str, text: str) -> dict[Any, Any]:
        """Search for runs; show one that is at work, or that of the configuration, if anything ran in it."""
        known = live.search()
        found = [Path(folder)] if folder else live.at_work()
        own = folder_of(text)
        if not found and own is not None and own in known:
            found = [own]
        value = live.name(found[0]) if found else None
        return {
            watched: str(found[0]) if found else folder,
            picker: gr.update(choices=list(map(live.name, known)), value=value),
        }

    def write_report(folder: str) -> dict[Any, Any]:
        try:
            return {report: gr.update(value=report_of([Path(folder)]), visible=True), said: ""}
        except UserError as error:
            return {report: gr.update(visible=False), said: fault_html(error)}

    inputs = [watched, seen, form.yaml]
    outputs = [
        *(seen, watched, picker, start_button, stop_button, resume_button, ended, export, report),
        *(said, status, charts, console, banner),
    ]

    def then_watch(beginning: Any, started: gr.State) -> None:
        watching = beginning.then(began, [started, watched], watched)
        watching.then(look, inputs, outputs, show_progress="hidden")

    asked_first = [*confirmation.parts, *used.parts]
    for button, answer in ((start_button, ""), (resume_button, RESUME), (used.resume, RESUME), (used.aside, ASIDE)):
        started = gr.State("")
        beginning = form.controls.on(
            button.click,
            lambda text, ticked, asked, answer=answer: begin(text, answer, ticked, asked),
            confirmation.parts,
            [said, started, *asked_first],
        )
        then_watch(beginning, started)
    started = gr.State("")
    adapter_path = form.controls.inputs["adapter_path"]
    beginning = form.controls.on(
        used.fresh.click,
        begin_elsewhere,
        [*confirmation.parts, used.proposed],
        [said, started, *asked_first, adapter_path],
    )
    then_watch(beginning, started)
    stop_button.click(end, watched, said)
    picker.input(pick, [picker, watched], watched).then(look, inputs, outputs, show_progress="hidden")
    report_button.click(write_report, watched, [report, said], show_progress="minimal", show_progress_on=said)
    return RunTab(watched, look, inputs, outputs, compare_button, visit, [watched, picker])


def _folder_of(text: str, root: Path) -> Path | None:
    """Return the adapter folder of a configuration; None where it has none.

    One outside ``root`` is not looked into: that is done once a run in it was asked for, and confirmed.
    """
    try:
        folder = document.adapter_folder(text, root)
        return None if outside_paths({"adapter_path": str(folder)}, root) else folder
    except UserError:
        return None


def _target(folder: Path | None) -> tuple[str, bool, bool]:
    """Return a folder, whether a run is at work in it, and whether there is a checkpoint to go on from."""
    if folder is None:
        return "", False, True  # Resume says what is missing
    checkpoints = folder / CHECKPOINTS
    has_checkpoint = checkpoints.is_dir() and any(checkpoints.iterdir())
    return str(folder), run_process.state(folder).running, has_checkpoint
