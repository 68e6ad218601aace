"""Write what a run has trained in the form that other programs take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.export.command import TARGETS
from mlx_cpo_plugin.export.folder import HOW_TO_REPLACE
from mlx_cpo_plugin.studio.child import Jobs
from mlx_cpo_plugin.studio.confirmation import build_confirmation
from mlx_cpo_plugin.studio.messages import fault_html, note_html


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
            cancel = gr.Button("Cancel", variant="stop", size="md", interactive=False, elem_id="export-cancel")
        said = gr.HTML("", elem_id="export-said")
        confirmation = build_confirmation(root, "export")

    def write(
        request: gr.Request, folder: str, to: str, force: bool, ticked: bool, asked: list[str]
    ) -> Iterator[dict[Any, Any]]:
        done = {button: gr.update(interactive=True), cancel: gr.update(interactive=False)}
        try:
            # It is written beside the adapter.
            question, answer = confirmation.ask({"adapter_path": str(Path(folder).parent)}, ticked, asked)
            yield dict(zip(confirmation.parts, answer, strict=True)) | {said: question}
            if question:
                return
            words = ["mlx_cpo_plugin", "export", folder, "--to", to, *["--force"] * force]
            with jobs.start(request.session_hash, words, root, writes=False) as job:
                for step in job.steps():
                    yield {
                        said: step.html(f"Exporting {Path(folder).name}"),
                        button: gr.update(interactive=False),
                        cancel: gr.update(interactive=True),
                    }
                printed = job.printed()
        except UserError as error:
            yield done | {said: fault_html(str(error).replace(HOW_TO_REPLACE, "tick the box to replace it"))}
            return
        yield done | {said: "".join(note_html(line) for line in printed.splitlines() if line.strip())}

    def end(request: gr.Request) -> None:
        jobs.cancel(request.session_hash)

    button.click(
        write,
        [watched, target, replaces, *confirmation.parts],
        [said, button, cancel, *confirmation.parts],
        show_progress="hidden",
        concurrency_limit=None,
    )
    cancel.click(end, queue=False)
    return form
