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


def test_open_with_a_name_that_was_only_typed_brings_back_what_was_not_saved_of_it(tab: Tab, tmp_path: Path) -> None:
    from mlx_cpo_plugin.studio.drafts import Draft, Drafts

    Drafts(tmp_path).keep(Draft("second.yaml", YAML, f"{YAML}beta: 0.123\n"), is_saved=False)

    tab.answer("open", "click", file="second.yaml")

    draft = Drafts(tmp_path).get("second.yaml")
    assert draft is not None
    assert "beta: 0.123" in draft.text


def test_the_bars_of_lengths_stand_where_the_lengths_are() -> None:
    from mlx_cpo_plugin.studio.check_tab import BINS, histogram

    def bars(lengths: list[int]) -> list[list[int]]:
        shown = histogram({"splits": [{"lengths": {"prompt": lengths}}]}, "prompt")
        return shown[shown["pairs"] > 0].to_numpy().tolist()

    assert bars([5, 6, 7, 8, 9, 10, 10]) == [[5, 1], [6, 1], [7, 1], [8, 1], [9, 1], [10, 2]]
    assert bars([7]) == [[7, 1]]
    assert bars([]) == []
    many = bars(list(range(1000)))
    assert len(many) <= BINS
    assert sum(pairs for _, pairs in many) == 1000


@pytest.mark.parametrize(("resume", "flag"), [(True, "auto"), (False, "false")])
def test_a_run_resumes_as_the_button_says_and_not_as_the_file_does(
    resume: bool, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_cpo_plugin.studio import run_process

    started: list[list[str]] = []
    monkeypatch.setattr(run_process.subprocess, "Popen", lambda words, **_: started.append(words))

    run_process.start(tmp_path / "adapters", f"{YAML}resume: auto\n", tmp_path, resume)

    assert started[0][-2:] == ["--resume", flag]
