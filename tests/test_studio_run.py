"""A run that the page starts is a process of its own, which is found again, stopped and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("gradio", reason="needs the extra 'studio'")

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.studio import run_process
from mlx_cpo_plugin.studio.run_view import CURVES, curve_frame, progress_of, read_metrics, status_html
from mlx_cpo_plugin.studio.server import OwnPageOnly, free_port


def wait_until(reached: Callable[[], bool], folder: Path) -> None:
    """Wait for what a process does, as long as it is alive."""
    for _ in range(600):
        if reached():
            return
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    pytest.fail("\n".join(run_process.console_tail(folder)))


@pytest.fixture
def config(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings | {"iters": 4000, "save_every": 2000})


def test_a_run_is_found_refused_a_second_time_stopped_and_gone_on_with(
    config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"

    run_process.start(folder, config, tmp_path, resume=False)
    assert run_process.state(folder).running
    assert run_process.running_folders(tmp_path) == [folder]
    with pytest.raises(ConfigError, match="A run is writing to"):
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
    assert run_process.running_folders(tmp_path) == []


def test_progress_is_that_of_the_last_bar() -> None:
    lines = [
        "Training:  10%|# | 3/30 [00:01<00:10, 2.9it/s]",
        "Training:  40%|####  | 12/30 [00:10<00:15, 1.2it/s]",
        "x",
    ]

    assert progress_of(lines) == (12, 30, "00:15")
    assert progress_of(["nothing"]) is None


def test_curves_have_the_points_of_the_metrics_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"kind": "valid", "iteration": 1, "val_loss": 0.9},
        {"kind": "train", "iteration": 2, "train_loss": 0.7},
        {"kind": "train", "iteration": 4, "train_loss": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"kind": "tra')

    frame = curve_frame(read_metrics(tmp_path), CURVES[0])

    assert frame.to_dict("list") == {"iteration": [2, 1], "value": [0.7, 0.9], "line": ["train", "validation"]}


def test_what_a_run_prints_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / run_process.CONSOLE_NAME).write_text("Warning: <script>alert(1)</script>\n")

    assert "<script>" not in status_html(tmp_path, [])


class TestOwnPageOnly:
    @pytest.mark.parametrize(
        ("headers", "own"),
        [
            ({"host": "127.0.0.1:7870"}, True),
            ({"host": "localhost:7870", "origin": "http://localhost:7870"}, True),
            ({"host": "127.0.0.1:7870", "sec-fetch-site": "same-origin"}, True),
            ({"host": "evil.example:7870"}, False),
            ({"host": "127.0.0.1:7870", "origin": "http://evil.example"}, False),
            ({"host": "127.0.0.1:7870", "origin": "null"}, False),
            ({"host": "127.0.0.1:7870", "sec-fetch-site": "cross-site"}, False),
            ({}, False),
        ],
    )
    def test_only_the_page_itself_is_answered(self, headers: dict[str, str], own: bool) -> None:
        async def app(*_: Any) -> None: ...

        scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}

        assert OwnPageOnly(app, 7870).is_own(scope) is own


def test_a_port_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match="Port 99999 is taken; give another one with --port"):
        free_port(99999)
