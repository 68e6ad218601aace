"""A button that starts a job, what the page says meanwhile, and a button that cancels it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio.child import Cancelled, Job, Jobs
from mlx_cpo_plugin.studio.confirmation import Confirmation
from mlx_cpo_plugin.studio.messages import fault_html, note_html

Updates = dict[Any, Any]


class Task(NamedTuple):
    """What a click begins.

    Attributes:
        title: says what is being done.
        settings: their paths outside the folder are confirmed first.
        begin: starts the job for a visit.
        result: waits for the job's end and returns the updates that show what came of it.
        meanwhile: returns those that show what it has written so far.
        cleared: those before it begins.
    """

    title: str
    settings: Mapping[str, Any]
    begin: Callable[[str | None], AbstractContextManager[Job]]
    result: Callable[[Job], Updates]
    meanwhile: Callable[[Job], Updates] = lambda job: {}
    cleared: Mapping[Any, Any] = {}


class TaskButtons(NamedTuple):
    """The controls of a task, which stands for one at a time in each visit.

    Attributes:
        start, cancel: the buttons; the latter is shown while there is something to cancel.
        said: how far it is, or what is wrong.
    """

    jobs: Jobs
    start: gr.Button
    cancel: gr.Button
    said: gr.HTML
    confirmation: Confirmation

    def on(
        self,
        event: Callable[..., Any],
        prepare: Callable[..., Task],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Do what ``prepare`` returns, given ``inputs``, at an event; a UserError that it raises is told.

        Args:
            outputs: what updates of the task may change.
        """

        def work(request: gr.Request, *values: Any) -> Iterator[Updates]:
            *given, ticked, asked = values
            try:
                task = prepare(*given)
                question, answer = self.confirmation.ask(task.settings, ticked, asked)
                yield {self.said: question, **task.cleared} | dict(zip(self.confirmation.parts, answer, strict=True))
                if question:
                    return
                with task.begin(request.session_hash) as job:
                    for step in job.steps():
                        # Of updates that follow each other closely a browser may skip one: each step says all.
                        yield self._working(True) | {self.said: step.html(task.title)} | task.meanwhile(job)
                    done = {self.said: ""} | task.result(job)
            except Cancelled as error:
                done = {self.said: note_html(str(error))}
            except (UserError, OSError, ValueError) as error:  # the system's, as of a full disk
                done = {self.said: fault_html(error)}
            yield self._working(False) | done

        def end(request: gr.Request) -> None:
            self.jobs.cancel(request.session_hash)

        parts = [self.said, self.start, self.cancel, *self.confirmation.parts]
        event(
            work,
            [*inputs, *self.confirmation.parts],
            [*parts, *outputs],
            show_progress="hidden",
            concurrency_limit=None,
        )
        self.cancel.click(end, queue=False)

    def _working(self, now: bool) -> Updates:
        return {self.start: gr.update(interactive=not now), self.cancel: gr.update(visible=now)}


def build_cancel(name: str) -> gr.Button:
    """Lay out the button that cancels a task, which is hidden until there is something to cancel."""
    return gr.Button("Cancel", variant="stop", size="md", visible=False, elem_id=f"{name}-cancel")
