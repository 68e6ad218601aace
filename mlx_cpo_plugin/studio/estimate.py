"""Memory and time of a run, beside the button that starts it."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.child import Job, Jobs
from mlx_cpo_plugin.studio.confirmation import Confirmation
from mlx_cpo_plugin.studio.tasks import Task, TaskButtons, Updates
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
    plan = gr.HTML("", elem_id="plan", padding=False)

    def estimate(text: str) -> Task:
        def meanwhile(job: Job) -> Updates:
            written = job.written()
            return {} if written is None else {plan: _lines_html(written)}

        return Task(
            "Estimating",
            vars(document.resolved(text).settings),
            lambda visit: jobs.on_config(visit, "mlx_cpo_plugin.studio.planning", text, root),
            lambda job: {plan: _lines_html(job.result())},
            meanwhile,
            {plan: ""},
        )

    TaskButtons(jobs, button, cancel, said, confirmation).on(
        partial(form.controls.on, button.click), estimate, [], [plan]
    )


def _lines_html(plan: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in plan["lines"])
    return f'<ul class="plan">{items}</ul>' if items else ""
