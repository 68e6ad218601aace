"""Which runs the lists of the page name, and what says that one of them has moved on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.refusals import refused

from mlx_cpo_plugin.checkpoints.run_folder import only_run_in
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.report.record import RunRecord
from mlx_cpo_plugin.studio import run_process
from mlx_cpo_plugin.studio.live_runs import LiveRuns


def write_metrics(folder: Path, written: float = 1.0) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1}\n')
    os.utime(folder / "metrics.jsonl", (written, written))


def test_runs_are_found_below_the_folder_newest_first_and_those_at_work_are_known(tmp_path: Path) -> None:
    live = LiveRuns(tmp_path)
    for age, name in enumerate(("new", "old", "checkpoints", ".hidden")):
        write_metrics(tmp_path / name, 1e9 - age)
    (tmp_path / "none").mkdir()
    write_metrics(tmp_path / "1/2/3/4/too deep")
    (tmp_path / "link").symlink_to(tmp_path / "1/2/3/4/too deep")
    (tmp_path / "linked metrics").mkdir()
    (tmp_path / "linked metrics" / "metrics.jsonl").symlink_to(tmp_path / "old" / "metrics.jsonl")

    assert list(map(live.name, live.search())) == ["new", "old"]
    assert live.at_work() == []
    with only_run_in(tmp_path / "old"):
        assert live.at_work() == [tmp_path / "old"]
    assert live.folder("old") == tmp_path / "old"
    assert live.folder("../elsewhere") is None


def test_lists_name_every_run_that_is_followed_wherever_its_folder_is_and_read_none_that_is_not_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    deep, linked, begun = root / "a/b/c/d/e/f", root / "linked", root / "begun"
    for age, folder in enumerate((outside, deep, tmp_path / "target", root / "inside")):
        write_metrics(folder, 1e9 - age)
    linked.symlink_to(tmp_path / "target")
    begun.mkdir()
    (begun / run_process.RECORD_NAME).write_text("{}")
    live = LiveRuns(root)
    for folder in (outside, deep, linked, begun):
        live.add(folder)
    read: list[Path] = []
    monkeypatch.setattr(RunRecord, "read", lambda folder: read.append(folder))

    assert live.reported() == [str(outside), "a/b/c/d/e/f", "linked", "inside"]
    assert not read
    live.records(["linked", str(outside)])
    assert read == [linked, outside]
    with refused(ConfigError, place=str(root)):
        live.records(["begun"])
    with refused(ConfigError, "Pick a run."):
        live.records([])


def test_whatever_is_shown_of_runs_changes_a_text_and_nothing_else_does(tmp_path: Path) -> None:
    live, folder, aimed_at = LiveRuns(tmp_path), tmp_path / "run", tmp_path / "next"
    write_metrics(folder)
    live.search()
    live.heed(aimed_at)

    def is_told(what: Callable[[], object]) -> bool:
        before = live.changes()
        what()
        return live.changes() != before

    assert not is_told(lambda: (folder / "notes.txt").write_text("mine"))
    assert is_told(lambda: (folder / "metrics.jsonl").write_text('{"kind": "train", "iteration": 10}\n'))
    assert is_told(lambda: (folder / run_process.CONSOLE_NAME).write_text("begun"))
    assert is_told(lambda: (folder / "adapters.safetensors").write_text(""))
    assert is_told(lambda: (aimed_at / "checkpoints").mkdir(parents=True))
    with only_run_in(folder):
        at_work = live.changes()
    assert live.changes() != at_work
