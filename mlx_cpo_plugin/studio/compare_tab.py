"""Answers of the base model and the tuned one side by side, and preference accuracy before and after."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from mlx_cpo_plugin.studio.child import Job, Jobs
from mlx_cpo_plugin.studio.confirmation import build_confirmation
from mlx_cpo_plugin.studio.live_runs import LiveRuns
from mlx_cpo_plugin.studio.messages import note_html
from mlx_cpo_plugin.studio.tasks import Task, TaskButtons, Updates, build_cancel

MOST_ROWS = 16
ANSWER_TOKENS = 128


def build_compare_tab(live: LiveRuns, jobs: Jobs) -> gr.Dropdown:
    """Lay out the tab; return the control that names the run, whose choices are those at the time."""
    run = gr.Dropdown(live.reported(), label="Run", info="Adapter folder of a run.", elem_id="compare-run")
    prompt = gr.Textbox(
        "", lines=3, label="Prompt", info="Your own; leave it empty for held-out rows only.", elem_id="compare-prompt"
    )
    rows = gr.Slider(0, MOST_ROWS, value=2, step=1, label="Held-out rows to answer", elem_id="compare-rows")
    with gr.Row():
        button = gr.Button("Compare", variant="primary", size="md", elem_id="compare")
        cancel = build_cancel("compare")
    said = gr.HTML("", elem_id="compare-said")
    confirmation = build_confirmation(live.root, "compare")
    answers = gr.HTML("", elem_id="compare-answers")

    def compare(name: str | None, prompt: str, rows: int) -> Task:
        (record,) = live.records([name] if name else [])
        words = ["mlx_cpo_plugin", "compare", str(record.folder), "--rows", str(int(rows))]
        words += ["--max-tokens", str(ANSWER_TOKENS)]
        words += ["--prompt", "-"] if prompt.strip() else []

        def result(job: Job) -> Updates:
            comparison = job.result()
            title = f"<h3>{escape(str(name))} against {escape(str(comparison['models'][0]['model']))}</h3>"
            return {answers: title + preference_html(comparison) + answers_html(comparison)}

        return Task(
            f"Comparing {name} with its base model",
            record.settings | {"adapter_path": str(record.folder)},
            lambda visit: jobs.start(visit, [*words, "--json"], live.root, typed=prompt),
            result,
            cleared={answers: ""},
        )

    TaskButtons(jobs, button, cancel, said, confirmation).on(button.click, compare, [run, prompt, rows], [answers])
    return run


def preference_html(comparison: dict[str, Any]) -> str:
    """Return accuracy and margin before and after, of all held-out pairs and by their length."""
    if not comparison["preference"]:
        return note_html("There are no held-out rows to measure the preference on.")
    rows = "".join(
        f"<tr><th scope='row'>{escape(group['name'])}</th><td>{group['pairs']}</td>"
        f"<td>{group['shortest']} to {group['longest']}</td>"
        f"<td>{_percent(base)}</td><td>{_percent(tuned)}</td><td>{_margin(base)}</td><td>{_margin(tuned)}</td></tr>"
        for group in comparison["preference"]
        for base, tuned in [group["models"]]
    )
    titles = ("Held-out pairs", "Pairs", "Tokens", "Accuracy before", "after", "Margin before", "after")
    head = "".join(f"<th scope='col'>{title}</th>" for title in titles)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def answers_html(comparison: dict[str, Any]) -> str:
    """Return each prompt with both models' answers side by side."""
    return "".join(
        f"<article class='pair'><h5>{escape(answer['source'])}</h5><p class='prompt'>{escape(answer['prompt'])}</p>"
        f"<div class='sides'>{_answer('Base model', base)}{_answer('Tuned model', tuned)}</div></article>"
        for answer in comparison["answers"]
        for base, tuned in [answer["models"]]
    )


def _answer(title: str, answer: dict[str, Any]) -> str:
    cut = "" if answer["finished"] else " …"
    return f"<div><h5>{title}</h5><p>{escape(answer['text'])}{cut}</p></div>"


def _percent(means: dict[str, float | None]) -> str:
    accuracy = means["accuracy"]
    return "-" if accuracy is None else f"{accuracy:.0%}"


def _margin(means: dict[str, float | None]) -> str:
    margin = means["margin"]
    return "-" if margin is None else f"{margin:+.3g}"
