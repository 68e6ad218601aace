"""A run has an identity: by that it finds what it goes on from, and what it puts aside; and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.refusals import refused
from support.resumable_runs import adapter_in, checkpoints, cut_short, metrics, policy, stopped, train
from support.tiny import assert_same, build_pairs, saved_arrays

from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.folder import read_checkpoint
from mlx_cpo_plugin.checkpoints.resuming import planned_run
from mlx_cpo_plugin.checkpoints.run_folder import make_way, only_run_in
from mlx_cpo_plugin.checkpoints.run_identity import read_record, run_in
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.training.arguments import FREE_TO_CHANGE, CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo

pytestmark = pytest.mark.slow


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder, with when it was written; the lock is no one's."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in snapshot(folder).items()}


def damage_all(folder: Path) -> None:
    for name in checkpoints(folder):
        cut_short(folder / "checkpoints" / name)


def entered_elsewhere(folder: Path) -> str:
    """What another thread is told that wants to be the only run in a folder."""
    told: list[str] = []

    def enter() -> None:
        try:
            with only_run_in(folder):
                told.append("let in")
        except ConfigError as error:
            told.append(str(error))

    other = threading.Thread(target=enter)
    other.start()
    other.join()
    return told[0]


def test_a_run_bears_one_identity_in_all_that_it_leaves(tmp_path: Path) -> None:
    train(tmp_path, iters=4, val_pairs=build_pairs(2, seed=1), steps_per_eval=2, save_best="loss")

    run = run_in(tmp_path)
    assert run is not None
    (checkpoint, *_) = (tmp_path / "checkpoints").iterdir()
    assert read_checkpoint(checkpoint).run == run
    assert {row["run"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open())} == {run.id}
    assert f"# run {run.id}, begun {run.begun.isoformat()}" in (tmp_path / "run_settings.yaml").read_text()
    for name in ("adapters", "best/adapters", "0000002_adapters"):
        _, said = mx.load(str(tmp_path / f"{name}.safetensors"), return_metadata=True)
        assert said["run"] == run.id


def test_every_save_is_kept_under_the_number_of_its_iteration_too(tmp_path: Path) -> None:
    train(tmp_path, iters=4)

    assert sorted(path.name for path in tmp_path.glob("0*.safetensors")) == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
    ]
    assert (tmp_path / "0000004_adapters.safetensors").read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()


def test_a_new_run_puts_an_older_one_aside_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, iters=12)
    (tmp_path / "notes.txt").write_text("mine")
    older, before = run_in(tmp_path), contents(tmp_path)
    assert older is not None
    capsys.readouterr()

    train(tmp_path, iters=4, beta=0.3)

    told = [line for line in capsys.readouterr().out.splitlines() if older.id in line]
    assert len(told) == 1
    assert checkpoints(tmp_path) == ["0000003", "0000004"]
    aside = contents(tmp_path / "previous" / older.id)
    del before["notes.txt"]
    assert aside == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    # And it can be resumed, though the older one had done more.
    assert_same(train(tmp_path, iters=6, beta=0.3, resume="auto"), train(tmp_path / "whole", iters=6, beta=0.3))


def test_what_was_there_before_runs_had_identities_is_put_aside_under_its_date(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "0000900").mkdir(parents=True)
    (tmp_path / "adapters.safetensors").write_bytes(b"older")
    for path in (tmp_path / "checkpoints", tmp_path / "adapters.safetensors"):
        os.utime(path, (86400, 86400))

    train(tmp_path, iters=2)

    aside = tmp_path / "previous" / "19700102T000000Z-undated"
    assert (aside / "adapters.safetensors").read_bytes() == b"older"
    assert (aside / "checkpoints" / "0000900").is_dir()


def test_best_adapters_of_this_version_and_of_earlier_ones_are_put_aside_with_their_run(tmp_path: Path) -> None:
    train(tmp_path, **VALIDATED | {"iters": 4})
    older = run_in(tmp_path)
    assert older is not None
    left = ("best_adapters.safetensors", "best-loss-0000004/adapters.safetensors", "best_of_all/mine.txt")
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("older")

    train(tmp_path, iters=2, beta=0.3)

    aside = contents(tmp_path / "previous" / older.id)
    assert {*left[:2], "best/adapters.safetensors", "best/adapter_config.json"} <= aside.keys()
    assert {path.name for path in tmp_path.glob("best*")} == {"best_of_all"}


def test_a_best_folder_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(tmp_path / "foreign")

    train(tmp_path / "run", **VALIDATED | {"iters": 4})

    assert not list((tmp_path / "foreign").iterdir())
    assert (tmp_path / "run" / "best" / "adapters.safetensors").is_file()


def test_what_a_fused_model_adds_or_replaces_is_put_aside_with_its_run_and_nothing_else(tmp_path: Path) -> None:
    train(tmp_path, iters=1)
    older = run_in(tmp_path)
    assert older is not None
    for name in ("README.md", "notes.txt"):
        (tmp_path / name).write_text("mine")
    for name in ("runs", "previous"):
        (tmp_path / name).mkdir()
    told: list[str] = []
    make_way(tmp_path, ["README.md", "additional_chat_templates"], told.append)
    for name in ("README.md", "additional_chat_templates/tool.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the model's")

    train(tmp_path, iters=1, beta=0.3)

    assert (tmp_path / "previous" / f"before-{older.id}" / "README.md").read_text() == "mine"
    assert len(told) == 1
    aside = contents(tmp_path / "previous" / older.id)
    assert aside["README.md"] == aside["additional_chat_templates/tool.jinja"] == b"the model's"
    left = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "runs", "previous"} < left
    assert not {"README.md", "additional_chat_templates"} & left


def test_an_adapter_of_another_name_is_put_aside_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    for beta in (0.5, 0.3):
        train_cpo(
            policy(),
            optimizers.SGD(1e-2),
            build_pairs(4),
            args=CPOTrainingArgs(iters=1, beta=beta, adapter_file=str(tmp_path / "named" / "mine.safetensors")),
        )

    (aside,) = (tmp_path / "named" / "previous").iterdir()
    assert (aside / "mine.safetensors").is_file()
    assert (tmp_path / "named" / "mine.safetensors").is_file()


def test_what_cannot_be_put_aside_is_a_sentence(tmp_path: Path) -> None:
    train(tmp_path, iters=1)
    for name in ("previous", "README.md"):
        (tmp_path / name).write_text("mine")

    with refused(CheckpointError, "README.md cannot be moved to", key="adapter_path"):
        make_way(tmp_path, ["README.md"], print)

    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_adapter_config_stays_where_another_program_has_written_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"model": "mine"}')

    train(tmp_path, iters=1)

    assert json.loads((tmp_path / "adapter_config.json").read_text())["model"] == "mine"
    assert not (tmp_path / "previous").exists()


def test_auto_is_refused_where_no_checkpoint_is_whole_and_nothing_is_touched(tmp_path: Path) -> None:
    train(tmp_path)
    damage_all(tmp_path)
    before = snapshot(tmp_path)

    with refused(ConfigError, "none of the checkpoints", key="resume"):
        train(tmp_path, resume="auto", beta=0.3)

    assert snapshot(tmp_path) == before


def test_a_torn_checkpoint_never_counts_as_kept(tmp_path: Path) -> None:
    stopped(tmp_path, 5, keep_checkpoints=3)
    for name in ("0000004", "0000005"):
        cut_short(tmp_path / "checkpoints" / name)

    train(tmp_path, resume="auto", iters=6, keep_checkpoints=1)

    assert read_checkpoint(tmp_path / "checkpoints" / "0000006").iteration == 6


def test_another_folders_run_is_copied_from_and_the_folders_own_put_aside(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "other", 5)
    train(tmp_path / "run", iters=7, seed=3)
    other, own, before = snapshot(tmp_path / "other"), run_in(tmp_path / "run"), contents(tmp_path / "run")

    resumed = train(tmp_path / "run", resume=str(tmp_path / "other"))

    assert_same(resumed, whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert snapshot(tmp_path / "other") == other
    record = read_record(tmp_path / "run")
    assert own is not None
    assert record is not None
    assert record.origin is not None
    assert record.origin.run_id == run_in(tmp_path / "other").id  # type: ignore[union-attr]
    assert record.run.begun == run_in(tmp_path / "other").begun  # type: ignore[union-attr]
    assert contents(tmp_path / "run" / "previous" / own.id) == before


def test_an_older_checkpoint_of_the_folders_own_run_begins_a_new_one(tmp_path: Path) -> None:
    whole = train(tmp_path, keep_checkpoints=9)
    own, before = run_in(tmp_path), contents(tmp_path)
    assert own is not None

    resumed = train(tmp_path, resume=str(tmp_path / "checkpoints" / "0000004"))

    assert_same(resumed, whole)
    assert run_in(tmp_path) != own
    assert contents(tmp_path / "previous" / own.id) == before


def test_the_newest_checkpoint_of_the_folders_own_run_goes_on_with_it(tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    own = run_in(tmp_path)

    train(tmp_path, resume=str(tmp_path / "checkpoints" / "0000005"))

    assert run_in(tmp_path) == own
    assert not (tmp_path / "previous").exists()


def test_a_folder_whose_name_is_a_number_is_a_folder(tmp_path: Path) -> None:
    stopped(tmp_path / "42", 5)

    assert_same(train(tmp_path / "run", resume=str(tmp_path / "42")), train(tmp_path / "whole"))


def test_a_checkpoint_that_was_copied_elsewhere_can_be_gone_on_from(tmp_path: Path) -> None:
    stopped(tmp_path / "other", 5)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "0000005", tmp_path / "kept")

    assert_same(train(tmp_path / "run", resume=str(tmp_path / "kept")), train(tmp_path / "whole"))


def test_rows_that_are_missing_from_the_metrics_are_told_and_no_line_is_glued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(tmp_path, 5)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-200])

    train(tmp_path, resume="auto")

    assert "Of 5 reports up to iteration 5, 1 are missing in" in capsys.readouterr().out
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_the_identity_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert planned_run(folder, "auto") != planned_run(folder, "auto")
    stopped(folder, 5)

    assert planned_run(folder, "auto") == run_in(folder)
    assert planned_run(folder, None) != run_in(folder)
    other = planned_run(tmp_path / "new", str(folder))
    assert other.id != run_in(folder).id  # type: ignore[union-attr]
    assert other.begun == run_in(folder).begun  # type: ignore[union-attr]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("theirs\n")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "adapters.safetensors", "run_settings.yaml", "run.json"):
        (folder / name).symlink_to(foreign)

    train(folder, iters=1)

    assert foreign.read_text() == "theirs\n"
    assert not (folder / "metrics.jsonl").is_symlink()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "foreign")

    with only_run_in(tmp_path / "run"):
        assert entered_elsewhere(tmp_path / "run").startswith("Another run")

    assert (tmp_path / "foreign").read_text() == "theirs"
    assert entered_elsewhere(tmp_path / "run") == "let in"


@pytest.mark.parametrize("number", ["ENOTSUP", "ENOLCK", "ENOSYS"])
def test_where_a_file_system_has_no_locks_a_file_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    import errno
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(getattr(errno, number), "not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    with only_run_in(tmp_path), only_run_in(tmp_path):
        assert entered_elsewhere(tmp_path).startswith("Another run is writing to ")

    assert entered_elsewhere(tmp_path) == "let in"


def test_the_lock_is_held_by_whoever_has_it_already(tmp_path: Path) -> None:
    with only_run_in(tmp_path):
        train(tmp_path, iters=1)


def test_home_folders_are_expanded_in_a_direct_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    train(tmp_path / "run", iters=1, adapter_file="~/run/adapters.safetensors")

    assert not (tmp_path / "~").exists()
    assert adapter_in(tmp_path / "run")


def test_what_a_killed_run_had_not_finished_is_swept_and_what_others_write_is_not(tmp_path: Path) -> None:
    others = {".17130-partial-report.html", ".17130-notes"}
    for name in (".17130-partial-0000002_adapters.safetensors", ".17130-partial-run.json", *others):
        (tmp_path / name).write_text("half")

    train(tmp_path, iters=1)

    assert {path.name for path in tmp_path.glob(".[!l]*")} == others


# What a resumed run may change. Each is either without a part in the weights, or goes on as if it had been so always.
CHANGES: dict[str, dict[str, Any]] = {
    "val_batches": {"val_batches": 1},
    "steps_per_report": {"steps_per_report": 3},
    "steps_per_eval": {"steps_per_eval": 3},
    "steps_per_save": {"steps_per_save": 3},
    "keep_checkpoints": {"keep_checkpoints": 5},
    "pass_overhead": {"pass_overhead": 5},
    "save_best": {"save_best": "margin"},
    "eval_per_epoch": {"eval_per_epoch": True},
    "save_per_epoch": {"save_per_epoch": True},
    "sample_prompts": {"sample_prompts": ["Why?"]},
    "steps_per_sample": {"steps_per_sample": 3},
    "early_stopping_patience": {"early_stopping_patience": 99},
    "reference_model_path": {"reference_model_path": "nothing"},
}


VALIDATED: dict[str, Any] = {"val_pairs": build_pairs(3, seed=1), "steps_per_eval": 2, "save_best": "loss"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The adapter of a run that is never interrupted; what changes below has no part in it."""
    return train(tmp_path_factory.mktemp("whole"), **VALIDATED)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_at_a_resume_ends_like_never_interrupted(
    tmp_path: Path, whole_run: dict[str, np.ndarray], change: str
) -> None:
    stopped(tmp_path, 5, **VALIDATED)

    assert_same(train(tmp_path, resume="auto", **VALIDATED | CHANGES[change]), whole_run)


# The tenth iteration is inside a step, the twelfth ends one and an epoch.
@pytest.mark.parametrize(("iters", "more"), [(1, 10), (4, 12), (5, 10), (9, 10), (10, 12)])
def test_more_iterations_than_a_finished_run_had_end_like_never_interrupted(
    tmp_path: Path, iters: int, more: int
) -> None:
    train(tmp_path / "run", **VALIDATED | {"iters": iters})

    resumed = train(tmp_path / "run", resume="auto", **VALIDATED | {"iters": more})

    assert_same(resumed, train(tmp_path / "whole", **VALIDATED | {"iters": more}))
    best = [saved_arrays(tmp_path / name / "best" / "adapters.safetensors") for name in ("run", "whole")]
    assert best[0] == best[1]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(("report", "evaluate", "last"), [(3, 2, 6), (1, 6, 6), (4, 2, 3), (2, 4, 3)])
def test_a_longer_run_goes_on_after_the_last_iteration_if_nothing_there_was_due_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: int, evaluate: int, last: int
) -> None:
    due = VALIDATED | {"steps_per_report": report, "steps_per_eval": evaluate}
    train(tmp_path / "run", **due | {"iters": 6})

    resumed = train(tmp_path / "run", resume="auto", **due)

    assert f"Resuming after iteration {last} " in capsys.readouterr().out
    assert_same(resumed, train(tmp_path / "whole", **due))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_every_setting_that_may_change_is_tried() -> None:
    tried = {name for change in CHANGES.values() for name in change} | {"iters", "load_best"}
    only_about_files_and_names = {"adapter_file", "resume", "run_settings", "run_identity"}
    compared_by_their_effect = {"max_seq_length", "loss_options"}  # on the data, and one by one

    assert tried | only_about_files_and_names | compared_by_their_effect == FREE_TO_CHANGE


def test_fewer_iterations_than_are_done_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, iters=6)
    before = snapshot(tmp_path)

    train(tmp_path, iters=3, resume="auto")

    assert "has done 6 iterations, and iters is 3: nothing was changed" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_finished_run_says_so_and_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, iters=4)
    before = snapshot(tmp_path)

    train(tmp_path, iters=4, resume="auto")

    assert "finished at iteration 4: nothing was changed" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_finished_run_whose_adapter_is_gone_writes_it_again(tmp_path: Path) -> None:
    train(tmp_path, iters=4)
    before = snapshot(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()

    train(tmp_path, iters=4, resume="auto")

    assert snapshot(tmp_path)["adapters.safetensors"][1] == before["adapters.safetensors"][1]


@pytest.mark.parametrize("iters", [10, 12])
def test_what_another_program_has_left_in_the_place_of_the_adapter_is_put_aside_and_the_runs_own_restored(
    tmp_path: Path, iters: int
) -> None:
    train(tmp_path)
    run = run_in(tmp_path)
    assert run is not None
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"foreign": mx.ones(2)})

    restored = train(tmp_path, resume="auto", iters=iters)

    assert_same(restored, train(tmp_path / "whole", iters=iters))
    assert set(adapter_in(tmp_path / "previous" / f"before-{run.id}")) == {"foreign"}
    before = snapshot(tmp_path)
    train(tmp_path, resume="auto", iters=iters)
    assert snapshot(tmp_path) == before


def test_a_finished_run_whose_checkpoints_were_removed_is_not_begun_anew(tmp_path: Path) -> None:
    train(tmp_path, iters=2)
    shutil.rmtree(tmp_path / "checkpoints")
    before = snapshot(tmp_path)

    with refused(match="has finished and its checkpoints have been removed. Nothing was changed; .* mlx-cpo export"):
        train(tmp_path, iters=4, resume="auto")

    assert snapshot(tmp_path) == before


def test_an_older_checkpoint_begins_the_run_that_was_planned_where_the_newest_is_no_start(tmp_path: Path) -> None:
    # Three iterations and windows of two: the last step closes early, and more iterations go on from before it.
    train(tmp_path, iters=3, gradient_accumulation_steps=2)
    resumed = str(tmp_path / "checkpoints" / "0000002")
    older, planned = run_in(tmp_path), planned_run(tmp_path, resumed)
    assert older is not None
    assert planned != older

    longer = train(tmp_path, iters=6, gradient_accumulation_steps=2, resume=resumed, run_identity=planned)

    assert run_in(tmp_path) == planned
    assert checkpoints(tmp_path / "previous" / older.id) == ["0000002", "0000003"]
    assert_same(longer, train(tmp_path / "whole", iters=6, gradient_accumulation_steps=2))


def test_a_loss_is_never_taken_for_a_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"val_pairs": build_pairs(3, seed=1), "steps_per_eval": 1}
    stopped(tmp_path, 4, save_best="loss", **arguments)
    by_loss = saved_arrays(tmp_path / "best" / "adapters.safetensors")
    _, said = mx.load(str(tmp_path / "best" / "adapters.safetensors"), return_metadata=True)
    (tmp_path / f"best-loss-{int(said['iteration']):07d}" / "left by a resume that was killed").mkdir(parents=True)

    train(tmp_path, resume="auto", save_best="margin", early_stopping_patience=99, **arguments)

    assert "The best validation so far, by loss at iteration" in capsys.readouterr().out
    margins = {row["iteration"]: row["val_margins"] for row in metrics(tmp_path) if row["kind"] == "valid"}
    best = max((value, step) for step, value in margins.items() if step > 4)
    _, said = mx.load(str(tmp_path / "best" / "adapters.safetensors"), return_metadata=True)
    assert said["iteration"] == str(best[1])
    (kept,) = tmp_path.glob("best-loss-*/adapters.safetensors")
    assert saved_arrays(kept) == by_loss


def test_how_pairs_are_scored_is_kept_when_the_probe_turns_out_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "run", 5)
    monkeypatch.setattr("mlx_cpo_plugin.training.wiring.choose_scorer", lambda *_: None)

    assert_same(train(tmp_path / "run", resume="auto"), whole)


def test_speed_and_time_go_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(np.arange(0.0, 1e6))
    monkeypatch.setattr("mlx_cpo_plugin.training.reporting.time.perf_counter", lambda: float(next(ticks)))
    stopped(tmp_path, 5, steps_per_report=5)
    before = read_checkpoint(tmp_path / "checkpoints" / "0000005").values["reporter"]

    train(tmp_path, resume="auto", steps_per_report=5)

    after = read_checkpoint(tmp_path / "checkpoints" / "0000009").values["reporter"]
    assert before["elapsed"] > 5
    assert after["elapsed"] > before["elapsed"]
    # Since the last report four iterations have been done, and the clock has gone on by a second at each look.
    assert 4 <= after["seconds"] < after["elapsed"]
