"""A run that the page starts is a process of its own, which is found again, stopped and gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from support.refusals import refused

from mlx_cpo_plugin.checkpoints.run_folder import begin_run, only_run_in, record_done
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED, RunIdentity, RunRecord
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.report.record import RunRecord as RunFolder
from mlx_cpo_plugin.studio import run_process
from mlx_cpo_plugin.studio.metrics_file import MetricsFile, read_metrics
from mlx_cpo_plugin.studio.run_view import (
    Progress,
    banner_html,
    charts_html,
    console_html,
    overlaid_html,
    progress_of,
    status_html,
)


def wait_until(reached: Callable[[], bool], folder: Path) -> None:
    """Wait for what a process does, as long as it is alive."""
    for _ in range(2400):
        if reached():
            return
        Event().wait(0.05)  # the core is for the process
    pytest.fail("\n".join(run_process.console_tail(folder)))


@pytest.fixture(autouse=True)
def nothing_is_left_running(tmp_path: Path) -> Iterator[None]:
    """End what a test that fails has left at work."""
    yield
    for file in tmp_path.rglob(run_process.RECORD_NAME):
        record = run_process.read_record(file.parent)
        if record is not None and record.training_pid is not None and record.exit_code is None:
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(record.training_pid) == record.pid != os.getsid(0):
                    os.killpg(record.pid, signal.SIGKILL)


@pytest.fixture
def config(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings | {"iters": 4000, "save_every": 2000})


@pytest.mark.slow
def test_a_run_is_found_refused_a_second_time_stopped_and_gone_on_with(
    config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"

    run_process.start(folder, config, tmp_path, resume=False)
    assert run_process.state(folder).running
    assert run_process.state(folder).running
    with refused(ConfigError, "already writing", key="adapter_path", place=str(folder)):
        run_process.start(folder, config, tmp_path, resume=False)
    wait_until(lambda: len(read_metrics(folder)) > 3, folder)
    run_process.stop(folder)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert run_process.state(folder).status == "stopped"
    assert "stopped after iteration" in run_process.console_tail(folder)[-1]
    assert 'class="alarm"' not in status_html(folder, [])
    done = read_metrics(folder)[-1]["iteration"]

    short = yaml.safe_dump(yaml.safe_load(config) | {"iters": 4000})
    run_process.start(folder, short, tmp_path, resume=True)
    wait_until(lambda: read_metrics(folder)[-1]["iteration"] > done + 2, folder)
    run_process.stop(folder)
    wait_until(lambda: not run_process.state(folder).running, folder)
    assert any("Resuming after iteration" in line for line in run_process.console_tail(folder, 400))


@pytest.mark.slow
def test_a_stop_right_after_the_start_stops(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"

    run_process.start(folder, config, tmp_path, resume=False)
    run_process.stop(folder)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert run_process.state(folder).status in ("ended", "stopped")
    assert len(read_metrics(folder)) < 100
    assert not (folder / run_process.STOP_NAME).exists()


class TestWatch:
    """The process that watches over the training, with another command in the place of the training."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    def lock(self, folder: Path) -> Iterator[int]:
        """The lock of a run that has been started."""
        with (folder / run_process.LOCK_NAME).open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            (folder / run_process.RECORD_NAME).write_text(json.dumps({"console_start": 0}))
            yield stream.fileno()

    def watcher(self, folder: Path, lock: int, code: str) -> subprocess.Popen[bytes]:
        words = ["-m", "mlx_cpo_plugin.studio.run_process", str(folder), str(lock), "-c", code]
        return subprocess.Popen([sys.executable, *words], pass_fds=[lock], start_new_session=True)

    def test_a_stop_before_the_training_has_begun_is_kept_and_delivered(self, folder: Path, lock: int) -> None:
        run_process.stop(folder)
        run_process.stop(folder)

        with self.watcher(folder, lock, f"open({str(folder / 'began')!r}, 'w')") as watcher:
            assert watcher.wait(60) == 128 + signal.SIGTERM

        assert not (folder / "began").exists()
        assert not (folder / run_process.STOP_NAME).exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert run_process.state(folder) == run_process.RunState("ended", -signal.SIGTERM)

    def test_a_stop_while_the_training_is_being_written_down_is_delivered_once(
        self, folder: Path, lock: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = (
            "import signal, time\nsignal.signal(15, lambda *_: exit(143))\nprint('ready', flush=True)\nsignal.pause()"
        )
        read, records = run_process.read_record, []

        def late(of: Path) -> run_process.RunRecord | None:
            """What is read the first time is from before the training began."""
            records.append(read(of))
            if len(records) == 1:
                watchers.append(self.watcher(folder, lock, code))
                wait_until(lambda: (record := read(of)) is not None and record.training_pid is not None, folder)
            return records[-1]

        watchers: list[subprocess.Popen[bytes]] = []
        monkeypatch.setattr(run_process, "read_record", late)
        run_process.stop(folder)

        assert watchers[0].wait(60) == 128 + signal.SIGTERM
        assert not (folder / run_process.STOP_NAME).exists()

    def test_a_process_that_got_the_number_of_an_ended_training_is_left_alone(self, folder: Path, lock: int) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            record = {"pid": os.getsid(0) + 1, "training_pid": stranger.pid}
            (folder / run_process.RECORD_NAME).write_text(json.dumps(record))
            run_process.stop(folder)
            stranger.communicate(b"\n")

        assert stranger.returncode == 0

    def test_a_run_that_cannot_be_written_down_does_not_begin(self, folder: Path, lock: int) -> None:
        (folder / run_process.RECORD_NAME).unlink()
        (folder / run_process.RECORD_NAME / "x").mkdir(parents=True)

        with self.watcher(folder, lock, f"open({str(folder / 'began')!r}, 'w')") as watcher:
            assert watcher.wait(60) == 2

        assert not (folder / "began").exists()


@pytest.mark.slow
def test_a_run_whose_watcher_is_killed_is_found_refused_a_second_time_and_stopped(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    run_process.start(folder, config, tmp_path, resume=False)
    wait_until(lambda: len(read_metrics(folder)) > 1, folder)
    record = run_process.read_record(folder)
    assert record is not None
    assert record.pid is not None

    os.kill(record.pid, signal.SIGKILL)
    os.waitpid(record.pid, 0)

    assert run_process.state(folder).running
    assert "Running" in status_html(folder, read_metrics(folder))
    printed = (folder / run_process.CONSOLE_NAME).read_bytes()
    for resume in (False, True):
        with refused(ConfigError, "already writing", key="adapter_path", place=str(folder)):
            run_process.start(folder, config, tmp_path, resume=resume)
    assert (folder / run_process.CONSOLE_NAME).read_bytes().startswith(printed)
    run_process.stop(folder)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert "stopped after iteration" in run_process.console_tail(folder)[-1]
    assert run_process.state(folder).status == "stopped"
    assert "Stopped and saved" in status_html(folder, read_metrics(folder))


@pytest.mark.slow
def test_what_earlier_runs_printed_stays_in_the_file_and_is_not_shown(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / run_process.CONSOLE_NAME).write_text("Warning: of an earlier run\n")

    run_process.start(folder, "train: true\ntrain_mode: cpo\nbeta: -1\n", tmp_path, resume=False)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert "earlier run" not in status_html(folder, [])
    assert "beta is -1" in status_html(folder, [])
    assert (folder / run_process.CONSOLE_NAME).read_text().startswith("Warning: of an earlier run\n")


@pytest.mark.parametrize("name", [run_process.CONSOLE_NAME, run_process.LOCK_NAME])
def test_a_link_is_not_written_through(name: str, tmp_path: Path) -> None:
    foreign, folder = tmp_path / "foreign", tmp_path / "adapters"
    foreign.write_text("mine\n")
    folder.mkdir()
    (folder / name).symlink_to(foreign)

    with refused(ConfigError, "a link or not a regular file", place=str(folder / name)):
        run_process.start(folder, "", tmp_path, resume=False)

    assert foreign.read_text() == "mine\n"
    assert not run_process.state(folder).running


@pytest.mark.slow
def test_a_link_in_the_place_of_a_record_is_replaced(tmp_path: Path) -> None:
    foreign, folder = tmp_path / "foreign", tmp_path / "adapters"
    foreign.write_text("mine\n")
    folder.mkdir()
    for name in (run_process.CONFIG_NAME, run_process.RECORD_NAME):
        (folder / name).symlink_to(foreign)

    run_process.start(folder, "train_mode: cpo\nbeta: -1\n", tmp_path, resume=False)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert run_process.state(folder).status == "failed"
    assert foreign.read_text() == "mine\n"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with refused(ConfigError, key="adapter_path", place=str(tmp_path / "file" / "adapters")):
        run_process.start(tmp_path / "file" / "adapters", "", tmp_path, resume=False)


@pytest.mark.slow
def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"

    run_process.start(folder, "train: true\ntrain_mode: cpo\nmodel: nowhere\nbeta: -1\n", tmp_path, resume=False)
    wait_until(lambda: not run_process.state(folder).running, folder)

    assert run_process.state(folder) == run_process.RunState("failed", 2)
    assert "beta is -1" in status_html(folder, [])


def test_a_run_whose_end_nobody_saw_is_lost(tmp_path: Path) -> None:
    (tmp_path / run_process.RECORD_NAME).write_text(json.dumps({"pid": os.getpid(), "training_pid": 1}))

    assert run_process.state(tmp_path).status == "lost"


def test_a_folder_that_nothing_ran_in_has_no_run(tmp_path: Path) -> None:
    assert run_process.state(tmp_path).status == "none"
    run_process.stop(tmp_path)


def test_progress_is_that_of_the_last_bar_and_says_where_a_run_was_resumed() -> None:
    lines = [
        "Training:  10%|# | 3/30 [00:01<00:10, 2.9it/s]",
        "Training:  40%|####  | 12/30 [00:10<00:15, 1.2it/s]",
        "x",
    ]

    assert progress_of(lines) == Progress(12, 30, "00:15")
    assert progress_of(["Resuming after iteration 3 from x.", *lines]) == Progress(12, 30, "00:15", 3)
    assert progress_of(["Training:  10%|# | 3/30 [00:00<?, ?it/s]"]) == Progress(3, 30)
    assert progress_of(["nothing"]) is None


def write_rows(folder: Path, *rows: dict[str, Any], torn: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def test_a_stopped_run_has_trained_the_iteration_that_it_reported_last(tmp_path: Path) -> None:
    write_rows(tmp_path, {"kind": "train", "iteration": 13, "train_loss": 0.5})
    (tmp_path / "studio_run.json").write_text(json.dumps({"exit_code": 143}))
    (tmp_path / "console.log").write_text("Training:  40%|####  | 12/30 [00:10<00:15, 1.2it/s]\n")

    assert "Iteration 13 of 30 (43 %)" in banner_html("adapters", tmp_path)


def test_metrics_are_read_on_from_where_the_last_look_ended_and_a_torn_line_once_it_is_whole(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    assert file.rows() == []
    first, second, third = ({"kind": "train", "run": "a", "iteration": number} for number in (1, 2, 3))

    write_rows(tmp_path, first, torn='{"kind": "tra')
    assert file.rows() == [first]
    with (tmp_path / "metrics.jsonl").open("r+") as stream:
        stream.write(" " * (len(json.dumps(first)) + 1))  # what has been read is not read again
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('in", "run": "a", "iteration": 2}\n')
    assert file.rows() == [first, second]

    write_rows(tmp_path / "new", third)
    (tmp_path / "new" / "metrics.jsonl").replace(tmp_path / "metrics.jsonl")
    assert file.rows() == [third]


def test_charts_are_of_the_metrics_that_there_are_and_leave_out_what_is_no_number(tmp_path: Path) -> None:
    rows = [
        {"kind": "valid", "iteration": 1, "val_loss": 0.9},
        {"kind": "train", "iteration": 2, "train_loss": 0.7},
        {"kind": "train", "iteration": 4, "train_loss": None},
    ]
    write_rows(tmp_path, *rows)

    drawn = charts_html(read_metrics(tmp_path))

    assert re.findall(r'id="curve-(\w+)"', drawn) == ["loss"]
    assert 'aria-label="Loss: training 0.7; validation 0.9"' in drawn


def test_several_runs_are_overlaid_in_a_colour_each_with_their_whole_names(tmp_path: Path) -> None:
    names = ("a-name-that-is-longer-than-a-line/adapters", "b")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        rows = [{"train_loss": 2.0, "train_chosen_reward": 1.0}, {"kind": "valid", "val_loss": 1.0}]
        write_rows(tmp_path / name, *({"kind": "train", "iteration": 1} | row for row in rows))

    drawn = overlaid_html({name: RunFolder.read(tmp_path / name) for name in names})

    assert re.findall(r'id="runs-(\w+)"', drawn) == ["loss"]
    assert re.findall(r"--line: var\((.*?)\)", drawn) == ["--chart-0", "--chart-0", "--chart-1", "--chart-1"]
    assert drawn.count('class="course dashed"') == 2
    assert names[0] in "".join(re.findall("<tspan.*?>(.*?)</tspan>", drawn))


def test_what_the_page_reads_of_runs_is_read_without_what_trains() -> None:
    code = (
        "import sys, mlx_cpo_plugin.studio.run_view, mlx_cpo_plugin.studio.live_runs, mlx_cpo_plugin.studio.document\n"
        "sys.exit(str({'mlx.core', 'mlx_lm', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert ended.stderr.strip() == "set()"


def test_accuracy_and_margin_of_validation_and_test_stand_in_tiles(tmp_path: Path) -> None:
    rows = [
        {"kind": "valid", "iteration": 1, "val_accuracies": 0.25, "val_margins": -2.0},
        {"kind": "valid", "iteration": 9, "val_accuracies": 0.75, "val_margins": 1.5},
        {"kind": "test", "test_accuracies": 0.625, "test_margins": 0.125, "test_loss": 0.5},
    ]

    tiles = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", status_html(tmp_path, rows)))

    assert tiles == {
        "Test loss": "0.5",
        "Validation accuracy": "0.75",
        "Test accuracy": "0.625",
        "Validation margin": "1.5",
        "Test margin": "0.125",
    }


class TestEnds:
    """How a run stands, by what has been left of it."""

    def left(self, folder: Path, console: str = "", **record: Any) -> None:
        (folder / run_process.CONSOLE_NAME).write_text(console)
        (folder / run_process.RECORD_NAME).write_text(json.dumps({"pid": 1, "training_pid": 1} | record))

    def test_a_run_that_was_killed_is_asked_about_its_memory_beside_its_last_lines(self, tmp_path: Path) -> None:
        self.left(tmp_path, "Iter 8: loss 0.5\n", exit_code=-signal.SIGKILL)

        assert run_process.state(tmp_path).status == "killed"
        assert "out of memory?" in status_html(tmp_path, [])
        assert "Iter 8: loss 0.5" in console_html(tmp_path)

    def test_the_end_of_a_run_whose_watcher_was_killed_is_read_from_what_it_wrote(self, tmp_path: Path) -> None:
        self.left(tmp_path)
        begin_run(tmp_path, RunRecord(RunIdentity.new()), print)
        assert run_process.state(tmp_path).status == "lost"

        record_done(tmp_path, TRAINED)

        assert run_process.state(tmp_path).status == "finished"

    def test_a_run_of_the_command_line_is_at_work_while_it_holds_the_folder(self, tmp_path: Path) -> None:
        write_rows(tmp_path, {"kind": "train", "iteration": 30}, {"kind": "train", "iteration": 60})
        (tmp_path / "run_settings.yaml").write_text("iters: 120\n")

        with only_run_in(tmp_path):
            assert run_process.state(tmp_path) == run_process.RunState("running", own=False)
            assert 'data-percent="50"' in banner_html("a", tmp_path)
            run_process.stop(tmp_path)
        assert run_process.state(tmp_path).status == "lost"

    def test_a_look_at_a_folder_does_not_keep_a_run_out_of_it(self, tmp_path: Path) -> None:
        with only_run_in(tmp_path):
            pass

        with (tmp_path / ".lock").open() as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            threading.Timer(0.01, fcntl.flock, [looking, fcntl.LOCK_UN]).start()
            with only_run_in(tmp_path):
                pass

    def test_a_run_that_began_later_on_the_command_line_is_not_taken_for_that_of_the_page(self, tmp_path: Path) -> None:
        self.left(tmp_path, "error: of the page\n", exit_code=1)
        begin_run(tmp_path, RunRecord(RunIdentity.new()), print)
        record_done(tmp_path, TRAINED)

        assert run_process.state(tmp_path) == run_process.RunState("finished", own=False)
        assert "of the page" not in status_html(tmp_path, []) + console_html(tmp_path)


def test_what_a_run_prints_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / run_process.CONSOLE_NAME).write_text("Warning: <script>alert(1)</script>\n")

    assert "<script>" not in status_html(tmp_path, [])


def test_what_the_page_writes_during_a_run_is_not_put_aside_with_it(tmp_path: Path) -> None:
    begin_run(tmp_path, RunRecord(RunIdentity.new(), files=("model.safetensors",)), print)
    page = {run_process.CONSOLE_NAME, run_process.CONFIG_NAME, run_process.RECORD_NAME}
    for name in (*page, "model.safetensors"):
        (tmp_path / name).write_text("")

    begin_run(tmp_path, RunRecord(RunIdentity.new()), print)

    assert page <= {file.name for file in tmp_path.iterdir()}
    assert not (tmp_path / "model.safetensors").exists()
