"""What the page says before a run: whether it can begin, what there is to pick from, and what is in the way."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny import preference_rows

pytest.importorskip("ruamel.yaml", reason="needs the extra 'studio'")
pytest.importorskip("support.gradio_import", reason="needs the extra 'studio'")

from huggingface_hub import constants

from mlx_cpo_plugin.checkpoints.run_folder import begin_run
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity, RunRecord
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.studio import pickers, planning
from mlx_cpo_plugin.studio.drafts import Draft, Drafts
from mlx_cpo_plugin.studio.readiness import READY, readiness
from mlx_cpo_plugin.studio.used_folder import can_be_resumed, unused_folder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "root"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "models" / "tiny" / "config.json").write_text("{}")
    (folder / "models" / "tiny" / "model.safetensors").write_text("")
    (folder / "rows").mkdir()
    lines = [json.dumps(row) + "\n" for row in preference_rows(4)]
    (folder / "rows" / "train.jsonl").write_text("".join(lines))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


def config(**values: Any) -> str:
    named = {"train": True, "train_mode": "cpo", "model": "models/tiny", "data": "rows", "fuse": False}
    return yaml.safe_dump({key: value for key, value in (named | values).items() if value is not None})


def test_a_folder_beside_that_of_the_page_itself_has_a_name(root: Path) -> None:
    assert unused_folder(".", root) == str(root.with_name("root-2"))
    assert unused_folder("runs/first-2", root) == "runs/first-2"


def test_drafts_that_are_kept_at_once_are_all_kept(root: Path) -> None:
    drafts = Drafts(root)
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(lambda name: drafts.keep(Draft(name, "", "typed"), is_saved=False), map(str, range(16))))

    assert all(drafts.get(str(number)) for number in range(16))


class TestReadiness:
    def test_what_names_a_model_and_rows_that_are_there_is_ready_and_its_first_pairs_are_shown(
        self, root: Path
    ) -> None:
        ready = readiness(config(), root)

        assert (ready.faults, ready.notes, ready.fetched) == ([], [], [])
        assert READY in ready.html()
        assert ready.pairs_html().count("<article") == pickers.PAIRS_SHOWN

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"model": None}, "No model is chosen"),
            ({"model": "./nowhere"}, "model names './nowhere', which does not exist"),
            ({"model": "models"}, "holds no config.json"),
            ({"model": "models/tin"}, "did you mean"),
            ({"data": None}, "No data is chosen"),
            ({"data": "row"}, "did you mean"),
            ({"data": "models"}, "holds no training rows"),
            ({"data": [{"path": "rows"}, {"path": "./nowhere"}]}, "'./nowhere', which does not exist"),
            ({"chosen_feature": "better"}, "no column 'better'"),
            ({"adapter_path": "rows/train.jsonl"}, "is a file"),
            ({"resume_adapter_file": "none.safetensors"}, "there is no such file"),
            ({"beta": -1}, "beta is -1"),
            ({"model": "m" * 300}, "File name too long"),
            ({"data": "d" * 300}, "File name too long"),
        ],
    )
    def test_what_a_run_would_refuse_is_told_and_is_not_ready(
        self, root: Path, values: dict[str, Any], told: str
    ) -> None:
        ready = readiness(config(**values), root)

        assert told in " ".join(ready.faults)
        assert READY not in ready.html()

    def test_a_new_document_is_not_ready(self, root: Path) -> None:
        assert len(readiness("train: true\ntrain_mode: cpo\n", root).faults) == 2

    def test_what_has_to_be_fetched_is_named(self, root: Path) -> None:
        ready = readiness(config(model="org/model", data="org/rows"), root)

        assert ready.faults == []
        assert ready.fetched == ["the model org/model", "the data set org/rows"]
        assert READY not in ready.html()

    def test_a_used_folder_is_noted(self, root: Path) -> None:
        begin_run(root / "adapters", RunRecord(RunIdentity.new()), print)

        assert "holds a run already" in " ".join(readiness(config(), root).notes)

    def test_files_outside_the_folder_are_not_read_before_that_is_confirmed(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere.jsonl").write_text((root / "rows" / "train.jsonl").read_text())

        ready = readiness(config(data=str(tmp_path / "elsewhere.jsonl")), root)

        assert (ready.faults, ready.pairs) == ([], None)

    def test_rows_cannot_become_a_part_of_the_page(self, root: Path) -> None:
        row = {"prompt": "<script>", "chosen": "<b>a", "rejected": "b"}
        (root / "rows" / "train.jsonl").write_text(json.dumps(row) + "\n")

        assert "<script>" not in readiness(config(), root).pairs_html()


def test_an_estimate_has_steps_and_memory_and_then_the_time_and_leaves_nothing_behind(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(planning, "_write", lambda lines, output: written.append(lines))

    planning.plan(tmp_path / "my.yaml", tmp_path / "plan.json")

    assert [[line.partition(":")[0] for line in lines if not line.startswith("note")] for lines in written] == [
        ["Steps per epoch", "Steps of the run", "Estimate"],
        ["Steps per epoch", "Steps of the run", "Estimate", "Time"],
    ]
    assert not Path(settings["adapter_path"]).exists()


class TestPickers:
    def test_models_and_rows_of_the_folder_and_of_the_cache_are_found(self, root: Path, tmp_path: Path) -> None:
        for kind, name in (("models", "org--model"), ("datasets", "org--rows")):
            snapshot = tmp_path / "cache" / f"{kind}--{name}" / "snapshots" / "abc"
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text("{}")
            (snapshot / "model.safetensors").write_text("")
        (root / "adapters" / "checkpoints" / "1").mkdir(parents=True)
        (root / "adapters" / "checkpoints" / "1" / "train.jsonl").write_text("")

        assert pickers.models_here(root) == ["models/tiny", "org/model"]
        assert pickers.datasets_here(root) == ["rows", "rows/train.jsonl", "org/rows"]

    def test_of_a_large_file_only_the_beginning_is_read(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = root / "rows" / "train.jsonl"
        file.write_text(file.read_text() + "not JSON " * 100)
        size = len(file.read_text().splitlines()[0]) + 5
        monkeypatch.setattr(pickers, "BEGINNING", size)

        pairs = pickers.first_pairs(RunSettings.of({"data": "rows"}), root)

        assert pairs is not None
        assert len(pairs) == 1

    @pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl.gz", "rows.jsonl"])
    def test_a_beginning_that_ends_within_a_row_is_none_of_a_damaged_file(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Whatever its kind; a file that is unpacked while it is read never is so as a whole."""
        row = {"prompt": "p", "chosen": "one\ntwo", "rejected": "three"}
        lines = f"{json.dumps(row)}\n" if "jsonl" in name else 'p,"one\ntwo",three\n'
        text = ("" if "jsonl" in name else "prompt,chosen,rejected\n") + lines * 40
        pack = gzip.compress if name.endswith(".gz") else bytes
        (root / name).write_bytes(pack(text.encode()))
        monkeypatch.setattr(pickers, "LARGEST_WHOLE", 0)

        for size in range(2 * len(lines) + 24, 4 * len(lines) + 24):
            monkeypatch.setattr(pickers, "BEGINNING", size)
            pickers._rows_at_first.cache_clear()

            pairs = pickers.first_pairs(RunSettings.of({"data": name}), root)

            assert pairs is not None
            assert pairs[0] == pickers.PairText("p", "one\ntwo", "three"), size

    def test_a_file_is_read_again_when_it_has_changed_and_not_before(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[Path] = []
        whole = pickers.read_file
        monkeypatch.setattr(pickers, "read_file", lambda path, *name: reads.append(path) or whole(path, *name))
        settings = RunSettings.of({"data": "rows"})
        first = pickers.first_pairs(settings, root)
        assert pickers.first_pairs(settings, root) == first
        assert len(reads) == 1

        row = {"prompt": "p", "chosen": "other", "rejected": "b"}
        (root / "rows" / "train.jsonl").write_text(json.dumps(row) + "\n")

        assert pickers.first_pairs(settings, root) == [pickers.PairText("p", "other", "b")]

    def test_rows_of_several_answers_are_shown_as_pairs(self, root: Path) -> None:
        row = {"prompt": "p", "completions": ["bad", "good"], "scores": [0.1, 0.9]}
        (root / "rows" / "train.jsonl").write_text(json.dumps(row) + "\n")

        assert pickers.first_pairs(RunSettings.of({"data": "rows"}), root) == [pickers.PairText("p", "good", "bad")]


class TestDrafts:
    def test_what_was_not_saved_is_there_in_the_next_process(self, root: Path) -> None:
        Drafts(root).keep(Draft("a.yaml", "old", "new"), is_saved=False)
        Drafts(root).keep(Draft("b.yaml", "same", "same"), is_saved=True)

        assert Drafts(root).current == "b.yaml"
        assert Drafts(root).get("a.yaml") == Draft("a.yaml", "old", "new")
        assert Drafts(root).get("b.yaml") is None

    def test_folders_have_drafts_of_their_own(self, root: Path) -> None:
        Drafts(root).keep(Draft("a.yaml", "old", "new"), is_saved=False)

        assert Drafts(root / "rows").current is None

    def test_a_damaged_file_holds_none(self, root: Path) -> None:
        Drafts(root).keep(Draft("a.yaml", "old", "new"), is_saved=False)
        Drafts(root).file.write_text('{"drafts": [')

        assert (Drafts(root).current, Drafts(root).get("a.yaml")) == (None, None)


class TestUsedFolder:
    def test_another_folder_has_the_next_free_number(self, root: Path) -> None:
        assert unused_folder("out/adapters", root) == "out/adapters-2"
        (root / "adapters-2").mkdir()
        assert unused_folder("adapters", root) == unused_folder("adapters-2", root) == "adapters-3"

    @pytest.mark.parametrize(("iters", "resumes"), [(4, False), (5, True), (None, True)])
    def test_a_run_is_resumed_where_it_has_a_checkpoint_and_iterations_left(
        self, root: Path, iters: int | None, resumes: bool
    ) -> None:
        folder = root / "adapters"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"kind": "train", "iteration": 4, "train_loss": 1.0}\n')
        settings = RunSettings.of({"iters": iters})
        assert not can_be_resumed(folder, settings)

        (folder / "checkpoints" / "0000004").mkdir(parents=True)

        assert can_be_resumed(folder, settings) is resumes
