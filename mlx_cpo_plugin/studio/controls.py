"""The controls of the form, the faults beside them, and the YAML that they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mlx_cpo_plugin.studio.messages import fault_html

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
        self.opened = gr.State(opened)
        self._holders: dict[str, gr.Column] = {}
        self._errors: dict[str, gr.HTML] = {}
        contents = document.contents_of(text, self.fields.values())
        looks = self._looks(contents)
        self._looked = gr.State(looks)
        for block in BLOCKS:
            with gr.Accordion(block, open=block in OPEN_BLOCKS):
                with gr.Row(elem_classes="fields"):
                    for field in self.fields.values():
                        if field.block == block:
                            self._lay_out(field, contents[field.key], contents[PRESET_KEY], *looks[field.key])
                if block == MODEL_AND_DATA:
                    self.pairs = gr.HTML("", elem_id="first-pairs")
        self._keep_loss_and_preset_together()

    @property
    def parts(self) -> list[Any]:
        """What an update of the form may change."""
        return [*self.inputs.values(), *self._holders.values(), *self._errors.values(), self.opened, self._looked]

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

        def changed(text: str, looked: dict[str, Any], *rest: Any) -> Updates:
            contents = document.contents_of(text, self.fields.values())
            return self._look_updates(contents, looked) | self._placeholders(contents) | fn(text, *rest)

        placeholders = self._placeholders({PRESET_KEY: ""})
        triggers = [control.change for control in self.inputs.values()]

        def any_change(listener: Any, inputs: Any, outputs: Any, **how: Any) -> Any:
            return gr.on(triggers, listener, inputs, outputs, **how)

        self.on(
            any_change,
            changed,
            [self._looked, *inputs],
            [*placeholders, *self._holders.values(), *self._errors.values(), self._looked, *outputs],
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
        return updates | self._look_updates(contents, {}) | {self.opened: opened}

    def _placeholders(self, contents: Mapping[str, Content]) -> Updates:
        """Updates with which controls of the loss that are left empty show what a run has for them."""
        return {
            self.inputs[key]: gr.update(placeholder=left_empty(field, contents[PRESET_KEY]))
            for key, field in self.fields.items()
            if field.block == PREFERENCE and isinstance(self.inputs[key], gr.Textbox)
        }

    def _looks(self, contents: Mapping[str, Content]) -> dict[str, tuple[str, bool]]:
        """The fault of each field, and whether it is shown: where it does something, or something is wrong with it."""
        looks = {}
        for key, field in self.fields.items():
            fault = field.error_of(contents[key])
            looks[key] = (fault, bool(fault) or has_effect(field, contents, self.fields))
        return looks

    def _look_updates(self, contents: Mapping[str, Content], looked: Mapping[str, Any]) -> Updates:
        looks = self._looks(contents)
        updates: Updates = {self._looked: looks}
        for key, (fault, shown) in looks.items():
            before = looked.get(key)
            if before is None or before[0] != fault:
                updates[self._errors[key]] = gr.update(value=fault_html(fault), visible=bool(fault))
            if before is None or before[1] != shown:
                updates[self._holders[key]] = gr.update(visible=shown)
        return updates

    def _lay_out(self, field: Field, content: Content, preset: Content, fault: str, shown: bool) -> None:
        with gr.Column(min_width=230, elem_classes="field", visible=shown) as self._holders[field.key]:
            control = self.inputs[field.key] = _control(field, content, preset)
            if field.key in PICKED:
                picker = self.pickers[field.key] = gr.Dropdown(
                    picks(field.key, []),
                    value="",
                    label=f"{field.option.label} on this machine",
                    show_label=False,
                    container=False,
                    elem_id=f"pick-{field.key}",
                )
                picker.input(
                    lambda picked: (picked or gr.skip(), ""), picker, [control, picker], show_progress="hidden"
                )
            self._errors[field.key] = gr.HTML(
                fault_html(fault), elem_id=f"error-{_id(field)}", visible=bool(fault), padding=False
            )

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


def picks(key: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the choices of a picker: what it is for, and names."""
    return [
        (f"Pick {'a model' if key == 'model' else 'data'} on this machine …", ""),
        *((name, name) for name in names),
    ]


def _control(field: Field, content: Content, preset: Content) -> Any:
    common: dict[str, Any] = {
        "label": field.option.label,
        "info": field.help,
        "elem_id": f"field-{_id(field)}",
        "interactive": True,
    }
    if field.option.type is bool:
        return gr.Checkbox(bool(content), **common)
    if field.key == LOSS_KEY:
        return gr.Radio(field.choices, value=str(content), **common)
    if field.option.choices:
        return gr.Dropdown(field.choices, value=str(content), **common)
    return gr.Textbox(str(content), placeholder=left_empty(field, preset), **common)


def _id(field: Field) -> str:
    return field.key.replace("_", "-").replace(".", "-")
