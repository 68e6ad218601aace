"""The form and the YAML that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.form import BLOCKS, LOSS_KEY, PREFERENCE, Content, Field, form_fields, has_effect
from mlx_cpo_plugin.studio.messages import fault_html, note_html

# Blocks that stand open; the others are what most people leave as it is.
OPEN_BLOCKS = (PREFERENCE, "Model & Data", "Fine-tune")
CONFIG_DEPTH = 2

Updates = dict[Any, Any]


def build_train_tab(root: Path, text: str, name: str) -> gr.Code:
    """Lay out the tab; return what holds the YAML that the form stands for.

    Args:
        root: the folder that configurations are read from and written into.
        text: the configuration to begin with.
        name: its file, below ``root``; may be empty.
    """
    fields = {field.key: field for field in form_fields()}
    contents = document.contents_of(text, fields.values())
    controls: dict[str, Any] = {}
    errors: dict[str, gr.HTML] = {}
    opened = gr.State(text)
    shown = gr.State(
        {key: (field.error_of(contents[key]), has_effect(field, contents, fields)) for key, field in fields.items()}
    )

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            for block in BLOCKS:
                with gr.Accordion(block, open=block in OPEN_BLOCKS), gr.Row(elem_classes="fields"):
                    for field in fields.values():
                        if field.block == block:
                            with gr.Column(min_width=230, elem_classes="field"):
                                works = has_effect(field, contents, fields)
                                controls[field.key] = _control(field, contents[field.key], works)
                                fault = field.error_of(contents[field.key])
                                errors[field.key] = gr.HTML(
                                    fault_html(fault), elem_id=f"error-{_id(field)}", visible=bool(fault)
                                )
        with gr.Column(scale=2, min_width=320, elem_classes="side"):
            file = gr.Dropdown(
                _configurations(root),
                value=name or None,
                label="Configuration file",
                info=f"Below {root}. Type a new name to save to a new file.",
                allow_custom_value=True,
                elem_id="file",
            )
            with gr.Row():
                open_button = gr.Button("Open", size="sm", elem_id="open")
                save_button = gr.Button("Save", size="sm", variant="primary", elem_id="save")
            said = gr.HTML("", elem_id="said")
            yaml = gr.Code(text, language="yaml", label="YAML of this form", elem_id="yaml")
            verdict = gr.HTML(_verdict(text), elem_id="verdict")

    def judged(base: str, known: dict[str, Any], contents: dict[str, Content]) -> Updates:
        """Return the YAML, and what changes beside the controls."""
        try:
            changed = document.with_contents(base, contents, fields.values())
        except Exception as error:
            raise gr.Error(f"The opened file cannot be changed: {error}") from error
        updates: Updates = {yaml: changed, verdict: _verdict(changed)}
        now = {}
        for key, field in fields.items():
            works, fault = has_effect(field, contents, fields), field.error_of(contents[key])
            now[key] = (fault, works)
            if known.get(key) != now[key]:
                updates[errors[key]] = gr.update(value=fault_html(fault), visible=bool(fault))
                if known.get(key, ("", True))[1] != works:
                    updates[controls[key]] = gr.update(interactive=works)
        return updates | {shown: now}

    def on_input(base: str, known: dict[str, Any], *values: Content) -> Updates:
        return judged(base, known, dict(zip(fields, values, strict=True)))

    def filled(text: str, name: str) -> Updates:
        """Return what changes where another file is opened."""
        contents = document.contents_of(text, fields.values())
        updates = judged(text, {}, contents)
        for key, content in contents.items():
            works = has_effect(fields[key], contents, fields)
            updates[controls[key]] = gr.update(value=content, interactive=works)
        return updates | {opened: text, file: gr.update(choices=_configurations(root), value=name)}

    def open_file(name: str | None) -> Updates:
        try:
            text = document.read_document(document.path_in(root, name or ""))
            return filled(text, name or "") | {said: note_html(f"Opened {name}.")}
        except (UserError, ValueError) as error:
            return {said: fault_html(error)}

    def save_file(name: str | None, text: str) -> Updates:
        try:
            path = document.path_in(root, name or "")
            document.save_document(text, path)
        except UserError as error:
            return {said: fault_html(error)}
        return {said: note_html(f"Saved {name}."), file: gr.update(choices=_configurations(root))}

    judged_parts = [*controls.values(), *errors.values(), yaml, verdict, shown]
    for control in controls.values():
        control.input(
            on_input,
            [opened, shown, *controls.values()],
            judged_parts,
            show_progress="hidden",
            trigger_mode="always_last",
        )
    open_button.click(open_file, file, [*judged_parts, opened, file, said], show_progress="hidden")
    save_button.click(save_file, [file, yaml], [said, file], show_progress="hidden")
    return yaml


def _control(field: Field, content: Content, works: bool) -> Any:
    common: dict[str, Any] = {
        "label": field.option.label,
        "info": field.help,
        "elem_id": f"field-{_id(field)}",
        "interactive": works,
    }
    if field.option.type is bool:
        return gr.Checkbox(bool(content), **common)
    if field.key == LOSS_KEY:
        return gr.Radio(field.choices, value=str(content), **common)
    if field.option.choices:
        return gr.Dropdown(field.choices, value=str(content), **common)
    return gr.Textbox(
        str(content), placeholder="" if field.option.default is None else str(field.option.default), **common
    )


def _id(field: Field) -> str:
    return field.key.replace("_", "-").replace(".", "-")


def _configurations(root: Path) -> list[str]:
    """Return the configuration files below ``root``, as paths relative to it."""
    patterns = [
        "/".join(["*"] * levels + [f"*{suffix}"]) for levels in range(CONFIG_DEPTH) for suffix in document.SUFFIXES
    ]
    found = {file.relative_to(root) for pattern in patterns for file in root.glob(pattern)}
    return sorted(str(file) for file in found if not any(part.startswith(".") for part in file.parts))


def _verdict(text: str) -> str:
    """Return the notes that a run of this configuration would print first."""
    try:
        notes = document.resolved(text).notes
    except ConfigError as error:
        return fault_html(error)
    return note_html("Ready to train.") + "".join(note_html(note) for note in notes)
