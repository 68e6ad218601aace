"""Paths of a configuration that lead out of the folder of the page, whatever way they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.extras import STUDIO
from support.refusals import refused

from mlx_cpo_plugin.errors import ConfigError

if TYPE_CHECKING:
    from mlx_cpo_plugin.studio.confirmation import Confirmation

pytestmark = STUDIO
KEYS = ("adapter_path", "data", "hf_dataset", "resume", "resume_adapter_file")


def outside_paths(settings: dict[str, Any], root: Path) -> list[str]:
    from mlx_cpo_plugin.studio.confirmation import outside_paths

    return outside_paths(settings, root)


def test_these_are_all_keys_that_name_paths() -> None:
    from mlx_cpo_plugin.studio import confirmation

    assert confirmation.KEYS == KEYS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("")
    return folder


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("written", ["{elsewhere}", "../elsewhere", "data/../../elsewhere", "~/elsewhere", "link"])
def test_every_way_out_is_found(
    key: str, written: str, root: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(elsewhere.parent))
    (root / "link").symlink_to(elsewhere)
    text = written.format(elsewhere=elsewhere)

    assert outside_paths({key: text}, root) == [f"{key}: {elsewhere}"]


@pytest.mark.parametrize("text", ["data", "data/train.jsonl", "adapters", "org/rows-of-the-hub", "auto", "{root}/new"])
def test_what_lies_in_the_folder_is_no_way_out(text: str, root: Path) -> None:
    assert outside_paths(dict.fromkeys(KEYS, text.format(root=root)), root) == []


def test_a_link_in_a_folder_that_is_named_leads_out(root: Path, elsewhere: Path) -> None:
    (root / "data" / "valid.jsonl").symlink_to(elsewhere / "rows.jsonl")
    (root / "data" / "test.jsonl").symlink_to("train.jsonl")

    assert outside_paths({"data": "data"}, root) == [f"data: {elsewhere / 'rows.jsonl'}"]


def test_a_root_that_is_a_link_itself_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(root)

    assert outside_paths({"data": str(root / "data"), "adapter_path": "adapters"}, tmp_path / "short") == []


def test_paths_anywhere_in_an_entry_of_hf_dataset_are_found(root: Path, elsewhere: Path) -> None:
    entry = {"path": "json", "config": {"data_files": {"train": [str(elsewhere / "rows.jsonl")]}}, "rows": 3}

    assert outside_paths({"hf_dataset": [entry]}, root) == [f"hf_dataset: {elsewhere / 'rows.jsonl'}"]


@pytest.mark.parametrize("text", ["a\0b", "~nobody-of-this-name/x"])
def test_what_cannot_be_followed_is_an_error(text: str, root: Path) -> None:
    with refused(ConfigError, key="data"):
        outside_paths({"data": text}, root)


class TestConfirmation:
    @pytest.fixture
    def confirmation(self, root: Path) -> Confirmation:
        import gradio as gr

        from mlx_cpo_plugin.studio.confirmation import build_confirmation

        with gr.Blocks():
            return build_confirmation(root, "x")

    def test_it_asks_until_the_box_is_ticked_for_these_paths(self, confirmation: Confirmation) -> None:
        settings: dict[str, Any] = {"data": "/<b>rows", "adapter_path": "/there"}

        question, (box, asked) = confirmation.ask(settings, False, [])

        assert "data: /&lt;b&gt;rows" in question
        assert "adapter_path: /there" in question
        assert box["visible"]
        assert confirmation.ask(settings, False, asked)[0]
        assert not confirmation.ask(settings, True, asked)[0]

    def test_a_tick_is_none_for_other_paths(self, confirmation: Confirmation) -> None:
        _, (_, asked) = confirmation.ask({"data": "/rows"}, False, [])

        question, (box, _) = confirmation.ask({"data": "/other"}, True, asked)

        assert "/other" in question
        assert box["value"] is False
        assert confirmation.ask({"data": "/rows", "adapter_path": "/x"}, True, asked)[0]

    def test_where_nothing_leads_out_the_box_is_hidden(self, confirmation: Confirmation) -> None:
        question, (box, asked) = confirmation.ask({"data": "data"}, True, ["data: /rows"])

        assert (question, box["visible"], box["value"], asked) == ("", False, False, [])
