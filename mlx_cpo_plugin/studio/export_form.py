"""Write what a run has trained in the form that other programs take."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from mlx_cpo_plugin.export.command import TARGETS
from mlx_cpo_plugin.export.folder import HOW_TO_REPLACE
from mlx_cpo_plugin.studio.child import ChildError, Job, Jobs
from mlx_cpo_plugin.studio.confirmation import build_confirmation
from mlx_cpo_plugin.studio.messages import note_html
from mlx_cpo_plugin.studio.tasks import Task, TaskButtons, Updates, build_cancel


def build_export_form(root: Path, watched: gr.State, jobs: Jobs) -> gr.Accordion:
    """Lay out the form for the run that is shown; return what holds it.

    Args:
        watched: the adapter folder of the run, as text.
    """
    with gr.Accordion("Export", open=False, visible=False, elem_id="export-form") as form:
        choices = [(f"{name}: {what}", name) for name, what in TARGETS.items()]
        target = gr.Radio(choices, value=choices[0][1], label="For", elem_id="export-target")
        replaces = gr.Checkbox(False, label="Replace an export that is there", elem_id="export-replaces")
        with gr.Row():
            button = gr.Button("Export", size="md", elem_id="export")
            cancel = build_cancel("export")
        said = gr.HTML("", elem_id="export-said")
        confirmation = build_confirmation(root, "export")

    def write(folder: str, to: str, force: bool) -> Task:
        words = ["mlx_cpo_plugin", "export", folder, "--to", to, *["--force"] * force]

        def result(job: Job) -> Updates:
            try:
                return {said: "".join(note_html(line) for line in job.printed().splitlines() if line.strip())}
            except ChildError as error:
                raise type(error)(str(error).replace(HOW_TO_REPLACE, "tick the box to replace it")) from error

        return Task(
            f"Exporting {Path(folder).name}",
            {"adapter_path": str(Path(folder).parent)},  # it is written beside the adapter
            lambda visit: jobs.start(visit, words, root, writes=False),
            result,
        )

    TaskButtons(jobs, button, cancel, said, confirmation).on(button.click, write, [watched, target, replaces], [])
    return form
