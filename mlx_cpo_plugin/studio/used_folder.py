"""An adapter folder that holds a run already: whoever starts another says first what becomes of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.checkpoints import CHECKPOINTS, PREVIOUS
from mlx_cpo_plugin.checkpoints.run_identity import run_in
from mlx_cpo_plugin.report.record import ReportError, RunRecord
from mlx_cpo_plugin.settings.config import RunSettings


@dataclass(frozen=True)
class UsedFolder:
    """The question, which is hidden until it is asked.

    Attributes:
        root: the folder of the page.
        box: question and answers.
        said: the question.
        resume, fresh, aside: the answers: go on with the run, train in another folder, put the run aside.
        proposed: the other folder.
    """

    root: Path
    box: gr.Column
    said: gr.HTML
    resume: gr.Button
    fresh: gr.Button
    aside: gr.Button
    proposed: gr.State

    @property
    def parts(self) -> list[Any]:
        """Return the controls that :meth:`ask` and :attr:`hidden` update."""
        return [self.box, self.said, self.resume, self.fresh, self.proposed]

    @property
    def hidden(self) -> list[Any]:
        """Return updates for ``parts`` that ask nothing."""
        return [gr.update(visible=False), "", gr.skip(), gr.skip(), ""]

    def ask(self, settings: RunSettings) -> list[Any] | None:
        """Return updates for ``parts`` where a new run would find another in its folder; ``None`` where there is none.

        Raises:
            OSError: the folder cannot be looked into.
        """
        folder = self.root / settings.adapter_path
        if run_in(folder) is None:
            return None
        other = unused_folder(settings.adapter_path, self.root)
        question = f'<p class="fault" role="alert">{escape(settings.adapter_path)} holds {_run_in_words(folder)}.</p>'
        return [
            gr.update(visible=True),
            question,
            gr.update(visible=can_be_resumed(folder, settings)),
            f"Train in {other}",
            other,
        ]


def build_used_folder(root: Path) -> UsedFolder:
    """Lay out the question."""
    with gr.Column(visible=False, elem_id="used-folder") as box:
        said = gr.HTML("", padding=False)
        with gr.Row():
            resume = gr.Button("Resume that run", size="md", elem_id="used-resume", min_width=160)
            fresh = gr.Button("", size="md", variant="primary", elem_id="used-fresh", min_width=160)
            aside = gr.Button(f"Move it to {PREVIOUS}/ and start anew", size="md", elem_id="used-aside", min_width=160)
    return UsedFolder(root, box, said, resume, fresh, aside, gr.State(""))


def unused_folder(adapter_path: str, root: Path) -> str:
    """Return a path beside ``adapter_path`` at which there is nothing, named after it with a number."""
    path = Path(adapter_path)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(root / path))
    stem, number = re.sub(r"-\d+$", "", path.name), 2
    while os.path.lexists(root / path.with_name(f"{stem}-{number}")):
        number += 1
    return str(path.with_name(f"{stem}-{number}"))


def can_be_resumed(folder: Path, settings: RunSettings) -> bool:
    """Whether the folder's run has a checkpoint, and iterations left to train."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return False
    record = _record(folder)
    if record is None:
        return True
    return record.iteration < settings.iters if settings.iters is not None else record.finished is None


def _run_in_words(folder: Path) -> str:
    record = _record(folder)
    if record is None:
        return "the files of an earlier run"
    iters = f" of {record.iters}" if record.iters else ""
    begun = f" begun on {record.started.astimezone():%Y-%m-%d at %H:%M}," if record.started else ""
    return f"a run{begun} at iteration {record.iteration}{iters}"


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.read(folder)
    except ReportError:
        return None
