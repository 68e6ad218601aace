"""Output never ends a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from tqdm import tqdm

from mlx_cpo_plugin.console import LastingStream, lasting_output


def closed() -> IO[str]:
    stream = io.StringIO()
    stream.close()
    return stream


def broken() -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


def full() -> IO[str]:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    return open("/dev/full", "w", encoding="utf-8", buffering=1)


STREAMS: list[Callable[[], IO[str] | None]] = [closed, broken, full, lambda: None]


@pytest.mark.parametrize("make", STREAMS, ids=["closed", "broken", "full", "none"])
def test_whatever_prints_goes_on_without_a_working_stream(
    make: Callable[[], IO[str] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)

    with lasting_output():
        for _ in tqdm(range(2)):
            print("a line", flush=True)
            tqdm.write("another")
            print("a third", file=sys.stderr)
        sys.stdout.isatty()

    assert sys.stdout is stream
    if stream is not None and not stream.closed:
        lasting = LastingStream(stream)
        lasting.write("x" * 100_000)
        lasting.flush()
        assert lasting.failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_characters_that_the_stream_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))

    with lasting_output():
        print("[═ ok]")

    assert raw.getvalue() == b"[? ok]\n"


def test_a_working_stream_gets_everything_and_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr

    with lasting_output(), lasting_output():
        assert not isinstance(sys.stdout.stream, LastingStream)  # type: ignore[attr-defined]
        print("seen")

    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "seen\n"


def test_what_somebody_else_has_put_over_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    with lasting_output():
        sys.stdout = theirs

    assert sys.stdout is theirs


@pytest.mark.parametrize("output", ["| head -1 >&2", "> /dev/full 2> /dev/full", "<&- >&- 2>&-", "2>&1 | true"])
@pytest.mark.slow
def test_the_command_trains_to_the_end_wherever_its_output_goes(
    output: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"  # which is YAML, too
    config.write_text(json.dumps(settings))
    command = f"set -o pipefail; {sys.executable} -m mlx_lm_lora.train --config {config} {output}"

    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200, check=False)

    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    assert (Path(settings["adapter_path"]) / "adapters.safetensors").exists()
    lines = (Path(settings["adapter_path"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines if json.loads(line)["kind"] == "train"] == [1, 2]


@pytest.mark.parametrize("output", ["| true", "| head -c 1", ">&-"])
def test_other_commands_end_well_whoever_reads_them(output: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m mlx_cpo_plugin losses {output}"

    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_data_check_ends_well_without_standard_streams(
    closed: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    command = f"{sys.executable} -m mlx_cpo_plugin check --config {config} {closed}"

    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_other_commands_say_in_one_sentence_that_the_disk_under_their_output_is_full() -> None:
    command = [sys.executable, "-m", "mlx_cpo_plugin", "losses"]

    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200, check=False)

    assert ended.returncode == 2
    assert ended.stderr == "error: the disk under the output is full; free space or write elsewhere.\n"
