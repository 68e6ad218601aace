"""The configuration file and the form: opened, edited, judged and saved, and nothing that was typed is lost."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.controls import Controls, Updates, carried, picks
from mlx_cpo_plugin.studio.drafts import Draft, Drafts
from mlx_cpo_plugin.studio.messages import fault_html, note_html
from mlx_cpo_plugin.studio.pickers import datasets_here, models_here
from mlx_cpo_plugin.studio.readiness import readiness

CONFIG_DEPTH = 2
NEW = "a new configuration"
DISCARD = "Discard the changes"


class Form(NamedTuple):
    """What other tabs take from the form.

    Attributes:
        controls: ``controls.on`` listens to a button and passes on the YAML as the form stands for it then.
        yaml: shows that YAML; it is read, never written to.
        load: brings the form into the state in which it was left, when the page is opened.
    """

    controls: Controls
    yaml: gr.Code
    load: Any


class _Files:
    """The part of the tab that opens and saves, with its controls.

    Args:
        root: the folder that configurations are read from and written into.
        name: the file to begin with; empty for what was last in the form.

    Attributes:
        begun: what the form holds first.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.drafts, self.name = root, Drafts(root), name
        if name:
            self.drafts.turn_to(name)
        self.begun = self.current()
        with gr.Row(elem_classes="file-row", equal_height=False):
            self.file = gr.Dropdown(
                configurations(root),
                value=self.begun.name or None,
                label="Configuration file",
                info=f"Below {root}. Pick one to open it; type a new name to save under it.",
                allow_custom_value=True,
                elem_id="file",
                scale=3,
                min_width=280,
            )
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    self.new_button = gr.Button("New", size="md", elem_id="new", min_width=80)
                    self.open_button = gr.Button("Open", size="md", elem_id="open", min_width=80)
                    self.save_button = gr.Button("Save", size="md", variant="primary", elem_id="save", min_width=80)
                self.state = gr.HTML(self.state_html(self.begun), elem_id="file-state", padding=False)
        self.said = gr.HTML("", elem_id="said", padding=False)
        with gr.Row(visible=False) as self.question:
            self.confirm = gr.Button("", size="sm", variant="stop", elem_id="confirm", min_width=120)
            self.refrain = gr.Button("Cancel", size="sm", elem_id="refrain", min_width=80)
        self.opened_name = carried(self.begun.name)
        self.asked = gr.State("")

    @property
    def parts(self) -> list[Any]:
        """What opening and saving change beside the form."""
        return [self.file, self.state, self.said, self.question, self.confirm, self.asked]

    def state_html(self, draft: Draft) -> str:
        """Return which file the form is an edit of, and whether it differs from it."""
        if not document.is_edited(draft.text, draft.opened):
            return note_html(f"{draft.name}: no unsaved changes." if draft.name else f"{NEW.capitalize()}.")
        return f'<p class="unsaved" role="status">Unsaved changes in {escape(draft.name or NEW)}.</p>'

    def current(self) -> Draft:
        """Return what was last in the form: what was typed, or else the file as it is now."""
        current = self.drafts.current
        name = self.name if current is None else current
        if not name:
            return self.new()
        try:
            return self.drafts.get(name) or self.as_on_disk(name)
        except (UserError, ValueError):  # it is not there any more
            return self.new()

    def new(self) -> Draft:
        """Return what was typed without a file, or else a new document."""
        text = document.new_document()
        return self.drafts.get("") or Draft("", text, text)

    def as_on_disk(self, name: str) -> Draft:
        """Return what a file holds; raise UserError or ValueError where it cannot be read."""
        path = document.path_in(self.root, name)
        text = document.read_document(path)
        return Draft(self.name_of(path), text, text)

    def name_of(self, path: Path) -> str:
        """Return the name of a file that ``document.path_in`` returned."""
        return str(path.relative_to(self.root.resolve()))

    def named(self, name: str) -> Any:
        """Return an update that writes a name into the field of the file."""
        return gr.update(choices=configurations(self.root), value=name or None)

    def keep(self, draft: Draft) -> Updates:
        """Write down what the form holds; return the updates that say whether it is saved."""
        self.drafts.keep(draft, not document.is_edited(draft.text, draft.opened))
        return {self.state: self.state_html(draft)}

    def ask(self, question: str, action: str, what: str) -> Updates:
        """Return updates that ask before something would be lost."""
        return {
            self.said: fault_html(question),
            self.question: gr.update(visible=True),
            self.confirm: action,
            self.asked: what,
        }

    def say(self, html: str) -> Updates:
        """Return updates that say something and ask nothing."""
        return {self.said: html, self.question: gr.update(visible=False), self.asked: ""}

    def why_not_overwrite(self, path: Path, opened_name: str, opened: str) -> str:
        """Return why a file that is there may not simply be written over; nothing where it may."""
        name = self.name_of(path)
        if not path.exists():
            return ""
        if name != opened_name:
            return f"{name} exists, and is not the file that is open."
        try:
            same = document.is_same(path.read_text(encoding="utf-8"), opened)
        except (OSError, UnicodeDecodeError):
            same = False
        return "" if same else f"{name} has changed on the disk since it was opened."


def build_train_tab(root: Path, name: str) -> Form:
    """Lay out the tab; return what other tabs take from it.

    Args:
        root: the folder that configurations are read from and written into.
        name: the file to begin with, below ``root``; empty for what was last in the form.
    """
    files = _Files(root, name)
    with gr.Row(equal_height=False, elem_classes="form-row"):
        with gr.Column(scale=3, min_width=320):
            controls = Controls(files.begun.opened, files.begun.text)
        with gr.Column(scale=2, min_width=320, elem_classes="side"):
            verdict = gr.HTML("", elem_id="verdict", padding=False)
            yaml = gr.Code(
                files.begun.text, language="yaml", label="YAML of this form", interactive=False, elem_id="yaml"
            )
    judged_parts = [yaml, verdict, controls.pairs]

    def judged(text: str) -> Updates:
        ready = readiness(text, root)
        return {yaml: text, verdict: ready.html(), controls.pairs: ready.pairs_html()}

    def changed(text: str, opened: str, opened_name: str) -> Updates:
        return judged(text) | files.keep(Draft(opened_name, opened, text))

    controls.on_change(changed, [controls.opened, files.opened_name], [*judged_parts, files.state])

    def filled(draft: Draft, said: str = "", asked_for: str | None = None) -> Updates:
        """Return what changes where another configuration comes into the form.

        Args:
            draft: the configuration.
            said: what to say.
            asked_for: what stood in the field of the file, where the next name may be typed by now.
        """
        text = controls.text(draft.opened, document.contents_of(draft.text, controls.fields.values()))
        updates = controls.filled(draft.opened, text) | judged(text) | files.say(said)
        updates |= files.keep(Draft(draft.name, draft.opened, text))
        if draft.name != asked_for:
            updates[files.file] = files.named(draft.name)
        return updates | {files.opened_name: draft.name}

    def load() -> Updates:
        choices = {"model": models_here(root), "data": datasets_here(root)}
        pickers = {controls.pickers[key]: gr.update(choices=picks(key, names)) for key, names in choices.items()}
        draft = files.current()
        if draft != files.begun:
            return filled(draft) | pickers
        return judged(draft.text) | {files.file: gr.update(choices=configurations(root))} | pickers

    def pick(name: str | None, opened_name: str, asked: str) -> Updates:
        """Open what was picked, with what was typed and not saved; a name of no file is one to save under."""
        if not name or name == opened_name:
            return {files.said: gr.skip()}
        try:
            path = document.path_in(root, name)
            if not path.exists():
                return files.say("") if asked else {files.said: gr.skip()}  # Save may have spoken already
            draft = files.drafts.get(files.name_of(path)) or files.as_on_disk(name)
        except (UserError, ValueError) as error:
            return files.say(fault_html(error))
        return filled(draft, note_html(f"Opened {name}."), name)

    def reopen(action: str, name: str | None) -> Updates:
        """Open a file as it is on the disk, or a new document."""
        if action == "new":
            files.drafts.keep(Draft("", "", ""), is_saved=True)
            return filled(files.new())
        try:
            draft = files.as_on_disk(name or "")
        except (UserError, ValueError) as error:
            return files.say(fault_html(error))
        return filled(draft, note_html(f"Opened {draft.name}."), name)

    def open_file(text: str, name: str | None, opened: str, opened_name: str) -> Updates:
        if name and name != opened_name and files.drafts.get(name):  # typed, and opened before it was picked
            return pick(name, opened_name, "")
        if name == opened_name and document.is_edited(text, opened):
            return files.ask(f"What was changed in {name} and not saved would be lost.", DISCARD, "open")
        return reopen("open", name)

    def new(text: str, name: str | None, opened: str, opened_name: str) -> Updates:
        if opened_name:
            return filled(files.new())
        if document.is_edited(text, opened):
            return files.ask("What was not saved would be lost.", DISCARD, "new")
        return reopen("new", name)

    def save(text: str, name: str | None, opened: str, opened_name: str, sure: bool = False) -> Updates:
        try:
            path = document.path_in(root, name or "")
            document.resolved(text)
            why_not = "" if sure else files.why_not_overwrite(path, opened_name, opened)
            if why_not:
                return files.ask(why_not, f"Overwrite {files.name_of(path)}", "save")
            document.save_document(text, path)
        except UserError as error:
            return files.say(fault_html(f"Not saved: {error}"))
        asked_for, name = name, files.name_of(path)
        if name != opened_name:  # which has none of what was typed any more
            files.drafts.keep(Draft(opened_name, "", ""), is_saved=True)
        updates = files.keep(Draft(name, text, text)) | files.say(note_html(f"Saved {name}."))
        shown = gr.update(choices=configurations(root)) if name == asked_for else files.named(name)
        return updates | {controls.opened: text, files.opened_name: name, files.file: shown}

    def confirmed(text: str, name: str | None, opened: str, opened_name: str, asked: str) -> Updates:
        return save(text, name, opened, opened_name, sure=True) if asked == "save" else reopen(asked, name)

    # The browser tells of a changed field before it reads what comes after it.
    outputs = [files.opened_name, *controls.parts, *judged_parts, *files.parts]
    given = [files.file, controls.opened, files.opened_name]
    quiet: Any = {"show_progress": "hidden"}
    files.file.change(pick, [files.file, files.opened_name, files.asked], outputs, **quiet)
    controls.on(files.new_button.click, new, given, outputs, **quiet)
    controls.on(files.open_button.click, open_file, given, outputs, **quiet)
    controls.on(files.save_button.click, save, given, outputs, **quiet)
    controls.on(files.confirm.click, confirmed, [*given, files.asked], outputs, **quiet)
    files.refrain.click(lambda: files.say(""), None, files.parts, **quiet)

    def on_load(event: Any) -> Any:
        return event(load, None, [*outputs, *controls.pickers.values()], queue=False, **quiet)

    return Form(controls, yaml, on_load)


def configurations(root: Path) -> list[str]:
    """Return the configuration files below ``root``, as paths relative to it."""
    patterns = [
        "/".join(["*"] * levels + [f"*{suffix}"]) for levels in range(CONFIG_DEPTH) for suffix in document.SUFFIXES
    ]
    found = {file.relative_to(root) for pattern in patterns for file in root.glob(pattern)}
    return sorted(str(file) for file in found if not any(part.startswith(".") for part in file.parts))
