"""What the browser gets back once a configuration was picked, opened or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.extras import STUDIO

pytestmark = STUDIO
YAML = "model: m\ntrain: true\ntrain_mode: cpo\ndata: d\n"


class Tab:
    """The tab without a browser: what its file field and its buttons return for what a browser would send."""

    def __init__(self, root: Path) -> None:
        import gradio as gr

        from mlx_cpo_plugin.studio.train_tab import build_train_tab

        with gr.Blocks() as self.blocks:
            build_train_tab(root, "first.yaml")
        self.by_name = {block.elem_id: block for block in self.blocks.blocks.values()}

    def listener(self, element: str, event: str) -> Any:
        """Return what listens to an event of the control with this ``elem_id``."""
        target = (self.by_name[element]._id, event)
        return next(listener for listener in self.blocks.fns.values() if target in listener.targets)

    def answer(self, element: str, event: str, **sent: Any) -> dict[Any, Any]:
        """Return the updates by ``elem_id``, or by control where it has none.

        Args:
            element: the control that something happens to.
            event: what happens to it.
            sent: what the browser sends in place of what was laid out, by ``elem_id``.
        """
        listener = self.listener(element, event)
        values = [sent.get(control.elem_id, control.value) for control in listener.inputs]
        updates = listener.fn(*([None] if element != "file" else []), *values)
        return {control.elem_id or control: update for control, update in updates.items()}


@pytest.fixture
def tab(tmp_path: Path) -> Tab:
    for name in ("first.yaml", "second.yaml"):
        (tmp_path / name).write_text(YAML)
    return Tab(tmp_path)


def test_the_answer_leaves_the_field_of_the_file_alone_where_the_next_name_may_be_typed_by_now(tab: Tab) -> None:
    picked = tab.answer("file", "change", file="second.yaml")
    opened = tab.answer("open", "click", file="second.yaml")
    saved = tab.answer("save", "click", file="third.yaml")

    assert "Opened second.yaml" in picked["said"]
    assert "Opened second.yaml" in opened["said"]
    assert "Saved third.yaml" in saved["said"]
    assert "file" not in picked
    assert "file" not in opened
    assert "value" not in saved["file"]
    assert "third.yaml" in saved["file"]["choices"]


def test_a_name_written_in_another_way_is_put_right_in_the_field_of_the_file(tab: Tab) -> None:
    assert tab.answer("open", "click", file="./second.yaml")["file"]["value"] == "second.yaml"
    assert tab.answer("save", "click", file="./third.yaml")["file"]["value"] == "third.yaml"


def test_all_that_says_what_the_fields_are_an_edit_of_comes_from_the_browser_at_the_same_moment_as_they(
    tab: Tab,
) -> None:
    import gradio as gr

    for element in ("open", "save", "new", "confirm"):
        listener = tab.listener(element, "click")
        kept_by_the_server = [control for control in listener.inputs if isinstance(control, gr.State)]
        assert len(kept_by_the_server) == (element == "confirm"), element  # which knows what was asked


def test_what_the_fields_are_an_edit_of_reaches_the_browser_before_they_do(tab: Tab) -> None:
    import gradio as gr

    for element, event in (("file", "change"), ("open", "click"), ("save", "click"), ("new", "click")):
        outputs = tab.listener(element, event).outputs
        unseen = [index for index, control in enumerate(outputs) if getattr(control, "visible", True) == "hidden"]
        fields = [index for index, control in enumerate(outputs) if (control.elem_id or "").startswith("field-")]
        assert all(isinstance(outputs[index], gr.Textbox) for index in unseen)
        assert len(unseen) == 2
        assert max(unseen) < min(fields), element
