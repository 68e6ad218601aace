"""The controls of the form, the faults beside them, and the YAML that they stand for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.form import (
    BLOCKS,
    FINE_TUNE,
    LOSS_KEY,
    MODEL_AND_DATA,
    PREFERENCE,
    PRESET_KEY,
    TRAINING,
    Content,
    Field,
    form_fields,
    has_effect,
    left_empty,
    loss_of_preset,
)

# Blocks that stand open; the others are what most people leave as it is.
OPEN_BLOCKS = (PREFERENCE, TRAINING, MODEL_AND_DATA, FINE_TUNE)
PICKED = ("model", "data")
"""Settings that can be picked from what is on this machine."""

Updates = dict[Any, Any]


class Controls:
    """The form as it is laid out. All that is done with it takes the contents of the controls at that moment.

    Args:
        opened: the configuration as it was opened or saved last.
        text: what the controls hold first, an edit of it.

    Attributes:
        fields: by key.
        inputs: the control of each field, by key.
        pickers: for each of :data:`PICKED`, what fills its control.
        pairs: where the first pairs of the data are shown.
        opened: the configuration as it was opened or saved last.
    """

    def __init__(self, opened: str, text: str) -> None:
        self.fields = {field.key: field for field in form_fields()}
        self.inputs: dict[str, Any] = {}
        self.pickers: dict[str, gr.Dropdown] = {}
        self.opened = carried(opened)
        contents = document.contents_of(text, self.fields.values())
        faults = self._faults(contents)
        shown = self._shown(contents, faults)
        self._faults_html = gr.HTML(faults_html(faults), elem_id="faults", padding=False)
        self._shown_before = gr.State(shown)
        for block in BLOCKS:
            with gr.Accordion(block, open=block in OPEN_BLOCKS):
                with gr.Row(elem_classes="fields"):
                    for field in self.fields.values():
                        if field.block == block:
                            self._lay_out(field, contents[field.key], contents[PRESET_KEY], shown[field.key])
                if block == MODEL_AND_DATA:
                    self.pairs = gr.HTML("", elem_id="first-pairs")
        self._keep_loss_and_preset_together()

    @property
    def parts(self) -> list[Any]:
        """What an update of the form may change: what it is an edit of comes before the fields, and so it must."""
        return [self.opened, *self.inputs.values(), self._faults_html, self._shown_before]

    def on(
        self,
        event: Callable[..., Any],
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        **how: Any,
    ) -> Any:
        """Listen to an event: ``fn``, perhaps a generator, gets the YAML of the form as it is then, and ``inputs``.

        If its first parameter is called ``request``, the request comes before.

        Returns:
            the dependency, as the event itself does.
        """

        takes_request = next(iter(inspect.signature(fn).parameters), "") == "request"

        def arguments(request: gr.Request, values: tuple[Any, ...]) -> tuple[Any, ...]:
            opened, own, rest = values[0], values[1 : 1 + len(self.inputs)], values[1 + len(self.inputs) :]
            text = self.text(opened, dict(zip(self.inputs, own, strict=True)))
            return (request, text, *rest) if takes_request else (text, *rest)

        def once(request: gr.Request, *values: Any) -> Any:
            return fn(*arguments(request, values))

        def repeatedly(request: gr.Request, *values: Any) -> Iterator[Any]:
            yield from fn(*arguments(request, values))

        listener = repeatedly if inspect.isgeneratorfunction(fn) else once
        return event(listener, [self.opened, *self.inputs.values(), *inputs], list(outputs), **how)

    def on_change(self, fn: Callable[..., Updates], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Listen to every change of a control, however it came about; ``fn`` gets the YAML, and ``inputs``.

        What changes beside the controls is part of the updates that ``fn`` returns.
        """

        def changed(text: str, before: dict[str, bool], *rest: Any) -> Updates:
            contents = document.contents_of(text, self.fields.values())
            looks = self._look_updates(contents, before)
            return _merged(self._placeholders(contents), looks) | fn(text, *rest)

        may_change = [*self._placeholders({PRESET_KEY: ""}), *(self.inputs[key] for key in self._hideable())]
        triggers = [control.change for control in self.inputs.values()]

        def any_change(listener: Any, inputs: Any, outputs: Any, **how: Any) -> Any:
            return gr.on(triggers, listener, inputs, outputs, **how)

        self.on(
            any_change,
            changed,
            [self._shown_before, *inputs],
            [*dict.fromkeys(may_change), self._faults_html, self._shown_before, *outputs],
            show_progress="hidden",
            trigger_mode="always_last",
        )

    def text(self, opened: str, contents: Mapping[str, Content]) -> str:
        """Return the YAML that the controls stand for."""
        try:
            return document.with_contents(opened, contents, self.fields.values())
        except Exception as error:  # the editor raises many kinds for what it cannot keep
            raise gr.Error(f"The opened file cannot be changed: {error}") from error

    def filled(self, opened: str, text: str) -> Updates:
        """Return updates for :attr:`parts` with which the form stands for ``text``.

        Args:
            opened: the file that it is an edit of.
        """
        contents = document.contents_of(text, self.fields.values())
        updates: Updates = {self.inputs[key]: gr.update(value=content) for key, content in contents.items()}
        return _merged(updates, self._look_updates(contents, {})) | {self.opened: opened}

    def _placeholders(self, contents: Mapping[str, Content]) -> Updates:
        """Updates with which controls of the loss that are left empty show what a run has for them."""
        return {
            self.inputs[key]: gr.update(placeholder=left_empty(field, contents[PRESET_KEY]))
            for key, field in self.fields.items()
            if field.block == PREFERENCE and isinstance(self.inputs[key], gr.Textbox)
        }

    def _faults(self, contents: Mapping[str, Content]) -> dict[str, str]:
        """What is wrong, by key."""
        faults = {key: field.error_of(contents[key]) for key, field in self.fields.items()}
        return {key: fault for key, fault in faults.items() if fault}

    def _shown(self, contents: Mapping[str, Content], faults: Mapping[str, str]) -> dict[str, bool]:
        """Whether each field is shown: where it does something, or something is wrong with it."""
        return {key: key in faults or has_effect(field, contents, self.fields) for key, field in self.fields.items()}

    def _hideable(self) -> list[str]:
        return [key for key, field in self.fields.items() if field.read_by or field.option.shown_when]

    def _look_updates(self, contents: Mapping[str, Content], before: Mapping[str, bool]) -> Updates:
        faults = self._faults(contents)
        shown = self._shown(contents, faults)
        updates: Updates = {self._shown_before: shown, self._faults_html: faults_html(faults)}
        changed = (key for key in self._hideable() if shown[key] != before.get(key))
        return updates | {self.inputs[key]: gr.update(visible=shown[key]) for key in changed}

    def _lay_out(self, field: Field, content: Content, preset: Content, shown: bool) -> None:
        if field.key not in PICKED:
            self.inputs[field.key] = _control(field, content, preset, shown, elem_classes="field")
            return
        with gr.Column(min_width=230, elem_classes="field"):
            control = self.inputs[field.key] = _control(field, content, preset, shown)
            picker = self.pickers[field.key] = gr.Dropdown(
                picks(field.key, []),
                value="",
                label=f"{field.option.label} on this machine",
                show_label=False,
                container=False,
                elem_id=f"pick-{field.key}",
            )
        picker.input(lambda picked: (picked or gr.skip(), ""), picker, [control, picker], show_progress="hidden")

    def _keep_loss_and_preset_together(self) -> None:
        """A preset brings its loss along, and another loss is that of no preset."""
        loss, preset = self.inputs[LOSS_KEY], self.inputs[PRESET_KEY]
        preset.input(lambda name: loss_of_preset(name) or gr.skip(), preset, loss, show_progress="hidden")
        loss.input(
            lambda chosen, name: gr.skip() if loss_of_preset(name) in (None, chosen) else "",
            [loss, preset],
            preset,
            show_progress="hidden",
        )


def carried(text: str) -> gr.Textbox:
    """Return a control that nobody sees, whose text the browser sends together with what stands in the fields.

    A ``gr.State`` may be another file's already while the fields still hold what stood there before.
    """
    return gr.Textbox(text, visible="hidden", container=False)


def picks(key: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the choices of a picker: what it is for, and names."""
    return [
        (f"Pick {'a model' if key == 'model' else 'data'} on this machine …", ""),
        *((name, name) for name in names),
    ]


def faults_html(faults: Mapping[str, str]) -> str:
    """Return faults by key for the script of the page, which writes each into its field."""
    named = {_id(key): fault for key, fault in faults.items()}
    return f'<div hidden data-faults="{escape(json.dumps(named))}"></div>'


def _merged(*each: Updates) -> Updates:
    """Several updates of the same controls as one."""
    merged: Updates = {}
    for updates in each:
        for control, update in updates.items():
            merged[control] = merged[control] | update if control in merged else update
    return merged


def _control(field: Field, content: Content, preset: Content, shown: bool, **how: Any) -> Any:
    common: dict[str, Any] = {
        "label": field.option.label,
        "info": field.help,
        "elem_id": f"field-{_id(field.key)}",
        "interactive": True,
        "visible": shown,
        "min_width": 230,
        **how,
    }
    if field.is_tick:
        return gr.Checkbox(bool(content), **common)
    if field.key == LOSS_KEY:
        return gr.Radio(field.choices, value=str(content), **common)
    if field.option.choices:
        return gr.Dropdown(field.choices, value=str(content), **common)
    return gr.Textbox(str(content), placeholder=left_empty(field, preset), **common)


def _id(key: str) -> str:
    return key.replace("_", "-").replace(".", "-")
