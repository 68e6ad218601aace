"""Memory and time of a run, beside the button that starts it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.child import Jobs
from mlx_cpo_plugin.studio.confirmation import Confirmation
from mlx_cpo_plugin.studio.messages import fault_html
from mlx_cpo_plugin.studio.train_tab import Form


def build_estimate(
    root: Path, form: Form, jobs: Jobs, confirmation: Confirmation, button: gr.Button, cancel: gr.Button
) -> None:
    """Lay out what is estimated for the configuration that the form stands for.

    Args:
        confirmation: of the run.
        button, cancel: begin and end the estimate.
    """
    said = gr.HTML("", elem_id="estimate-said", padding=False)

    def estimate(request: gr.Request, text: str, ticked: bool, asked: list[str]) -> Iterator[dict[Any, Any]]:
        done = {button: gr.update(interactive=True), cancel: gr.update(visible=False)}
        shown = ""
        try:
            question, answer = confirmation.ask(vars(document.resolved(text).settings), ticked, asked)
            yield dict(zip(confirmation.parts, answer, strict=True)) | {said: question}
            if question:
                return
            with jobs.on_config(request.session_hash, "mlx_cpo_plugin.studio.planning", text, root) as job:
                busy = {button: gr.update(interactive=False), cancel: gr.update(visible=True)}
                for step in job.steps():
                    shown = _lines_html(job.written()) or shown
                    yield busy | {said: shown + step.html("Estimating")}
                shown = _lines_html(job.result())
        except UserError as error:
            shown += fault_html(error)
        yield done | {said: shown}

    def end(request: gr.Request) -> None:
        jobs.cancel(request.session_hash)

    form.controls.on(
        button.click,
        estimate,
        confirmation.parts,
        [said, button, cancel, *confirmation.parts],
        show_progress="hidden",
        concurrency_limit=None,
    )
    cancel.click(end, queue=False)


def _lines_html(plan: dict[str, Any] | None) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in plan["lines"]) if plan else ""
    return f'<ul class="plan">{items}</ul>' if items else ""
