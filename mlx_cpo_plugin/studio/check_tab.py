"""The data report: what is skipped and why, how long the pairs are, and which tokens are scored."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.child import Job, Jobs
from mlx_cpo_plugin.studio.confirmation import build_confirmation
from mlx_cpo_plugin.studio.messages import fault_html, note_html
from mlx_cpo_plugin.studio.tasks import Task, TaskButtons, Updates, build_cancel
from mlx_cpo_plugin.studio.train_tab import Form

BINS = 24
SHOWN_AT_ONCE = 3
PARTS = ("prompt", "chosen", "rejected")


def build_check_tab(root: Path, form: Form, jobs: Jobs) -> None:
    """Lay out the tab; the configuration that the form stands for is looked at."""
    with gr.Row():
        button = gr.Button("Check data", size="md", variant="primary", elem_id="check")
        cancel = build_cancel("check")
    said = gr.HTML("", elem_id="check-said")
    confirmation = build_confirmation(root, "check")
    summary = gr.HTML("", elem_id="check-summary")
    with gr.Row(elem_classes="curves"):
        histograms = [
            gr.BarPlot(
                None,
                x="tokens",
                y="pairs",
                title=f"Tokens of the {part}" if part == "prompt" else f"Tokens of the {part} answer",
                x_title="Tokens",
                y_title="Pairs",
                height=240,
                min_width=260,
                visible=False,
                elem_id=f"lengths-{part}",
            )
            for part in PARTS
        ]
    pairs = gr.HTML("", elem_id="check-pairs")

    def shown(report: dict[str, Any]) -> dict[Any, Any]:
        drawn = (gr.update(value=histogram(report, part), visible=True) for part in PARTS)
        return dict(zip(histograms, drawn, strict=True)) | {summary: summary_html(report), pairs: pairs_html(report)}

    def check(text: str) -> Task:
        def meanwhile(job: Job) -> Updates:
            report = job.written()
            return {} if report is None else shown(report)

        def result(job: Job) -> Updates:
            report = job.result()
            return {said: fault_html(report["error"])} | shown(report)

        return Task(
            "Checking",
            vars(document.resolved(text).settings),
            lambda visit: jobs.on_config(visit, "mlx_cpo_plugin.studio.inspection", text, root),
            result,
            meanwhile,
            {summary: "", pairs: ""} | dict.fromkeys(histograms, gr.update(visible=False)),
        )

    buttons = TaskButtons(jobs, button, cancel, said, confirmation)
    buttons.on(partial(form.controls.on, button.click), check, [], [summary, *histograms, pairs])


def histogram(report: dict[str, Any], part: str) -> pd.DataFrame:
    """Return the columns ``tokens`` (where a bar begins) and ``pairs`` over all splits."""
    lengths = [length for split in report["splits"] for length in split["lengths"].get(part, [])]
    least, most = min(lengths, default=0), max(lengths, default=0)
    width = -(-(most + 1 - least) // BINS)
    counts, edges = np.histogram(lengths, bins=np.arange(least, most + 1 + width, width))
    return pd.DataFrame({"tokens": edges[:-1], "pairs": counts})


def summary_html(report: dict[str, Any]) -> str:
    """Return rows, pairs and what was skipped of each split as tables."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(split['name'])}</th><td>{split['rows']}</td><td>{split['pairs']}</td>"
        f"<td>{sum(count for count, _ in split['skipped'].values())}</td><td>{split['prompts_cut']}</td>"
        f"<td>{split['answers_cut']}</td>{_lengths(split)}</tr>"
        for split in report["splits"]
    )
    head = "".join(
        f"<th scope='col'>{title}</th>"
        for title in ("", "Rows", "Pairs", "Skipped", "Prompt cut", "Answer cut", "Median tokens", "Most tokens")
    )
    table = f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    skipped = "".join(
        f"<tr><td>{escape(split['name'])}</td><td>{escape(reason)}</td><td>{count}</td>"
        f"<td>{escape(', '.join(places))}{' …' if count > len(places) else ''}</td></tr>"
        for split in report["splits"]
        for reason, (count, places) in split["skipped"].items()
    )
    if skipped:
        table += (
            "<h3>Skipped rows</h3><div class='wide'><table><thead><tr><th>Split</th><th>Reason</th><th>Rows</th>"
            f"<th>Where</th></tr></thead><tbody>{skipped}</tbody></table></div>"
        )
    first = (
        note_html(f"Of the first {report['sample']} rows of each set; the others follow.") if report["sample"] else ""
    )
    notes = "".join(note_html(note) for split in report["splits"] for note in split["notes"])
    full = f"<details><summary>The report in full</summary><pre>{escape(report['text'])}</pre></details>"
    return f"{first}{table}{notes}{full if report['text'] else ''}"


def _lengths(split: dict[str, Any]) -> str:
    parts = [np.array(split["lengths"].get(part, [0]), int) for part in PARTS]
    longer = parts[0] + np.maximum(parts[1], parts[2])
    return f"<td>{np.median(longer):.0f}</td><td>{longer.max()}</td>"


def pairs_html(report: dict[str, Any]) -> str:
    """Return pairs of each split, both answers side by side, with the scored tokens marked."""
    parts = ["<h3>Pairs</h3><p class='note'><mark>Marked</mark> tokens are scored.</p>"]
    for split in report["splits"]:
        pairs = [_pair(example) for example in split["examples"]]
        parts += [f"<h4>{escape(split['name'].capitalize())}</h4>", *pairs[:SHOWN_AT_ONCE]]
        if pairs[SHOWN_AT_ONCE:]:
            rest = "".join(pairs[SHOWN_AT_ONCE:])
            parts.append(f"<details><summary>{len(pairs) - SHOWN_AT_ONCE} more pairs</summary>{rest}</details>")
    return "".join(parts)


def _pair(example: dict[str, Any]) -> str:
    answers = "".join(
        f"<div><h5>{side.capitalize()}</h5><p>{_marked(example[side])}</p></div>" for side in ("chosen", "rejected")
    )
    return (
        f"<article class='pair'><h5>{escape(example['source'])}</h5><p class='prompt'>{escape(example['prompt'])}</p>"
        f"<div class='sides'>{answers}</div></article>"
    )


def _marked(pieces: list[tuple[str, bool]]) -> str:
    return "".join(f"<mark>{escape(text)}</mark>" if scored else escape(text) for text, scored in pieces)
