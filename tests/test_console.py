"""Output never ends a run."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from tqdm import tqdm

from mlx_cpo_plugin.console import LastingStream, last_lines, lasting_output


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


class Console(io.StringIO):
    """A stream of the process's own."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Console]:
    """What standard output and error of the process are replaced with: a terminal, or anything else."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def replaced(terminal: bool) -> Console:
        console = Console(terminal)
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            monkeypatch.setattr(sys, name, console)
        return console

    return replaced


def print_in_colour_around_a_bar() -> None:
    with lasting_output():
        print("\033[94m[INFO]\033[0m One.")
        for _ in tqdm(range(3), desc="Rows", mininterval=0):
            tqdm.write("Two.")
        print("Half", end="", flush=True)
        print(" a line.")


@pytest.mark.parametrize(
    ("terminal", "variables"),
    [(False, {}), (True, {"NO_COLOR": "1"}), (True, {"TERM": "dumb"}), (False, {"NO_COLOR": "1", "FORCE_COLOR": "1"})],
)
def test_who_cannot_show_or_does_not_want_colours_gets_lines_as_they_are_in_the_end(
    terminal: bool,
    variables: dict[str, str],
    console: Callable[[bool], Console],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = console(terminal)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    print_in_colour_around_a_bar()

    *lines, bar, last = shown.getvalue().splitlines()
    assert not {"\r", "\x1b"} & set(shown.getvalue())
    assert lines == ["[INFO] One.", "Two.", "Two.", "Two."]
    assert bar.startswith("Rows: 100%")
    assert last == "Half a line."


@pytest.mark.parametrize(("terminal", "variables"), [(True, {}), (False, {"FORCE_COLOR": "1", "TERM": "dumb"})])
def test_a_terminal_and_who_asks_for_it_get_colours_and_bars(
    terminal: bool,
    variables: dict[str, str],
    console: Callable[[bool], Console],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = console(terminal)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    print_in_colour_around_a_bar()

    assert shown.getvalue().startswith("\x1b[94m[INFO]\x1b[0m One.\n")
    assert shown.getvalue().count("\rRows: ") > 3


def test_what_takes_the_place_of_the_processs_streams_gets_everything_as_it_is(
    console: Callable[[bool], Console], monkeypatch: pytest.MonkeyPatch
) -> None:
    console(False)
    notebook = Console(False)
    monkeypatch.setattr(sys, "stdout", notebook)

    with lasting_output():
        print("\033[94m" + "word " * 30, end="\r")

    assert notebook.getvalue() == "\033[94m" + "word " * 30 + "\r"


SENTENCE = (
    f"Iter 10: Saved adapter weights to {'/a-long-path' * 8}/x and to a file, with a loss of -1.5 after 20 steps."
)


@pytest.mark.parametrize(("columns", "widest"), [("200", 80), ("60", 60)])
def test_a_terminal_gets_long_sentences_in_lines_that_fit_and_keep_paths_and_numbers_whole(
    columns: str, widest: int, console: Callable[[bool], Console], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = console(True)
    monkeypatch.setenv("COLUMNS", columns)

    with lasting_output():
        print(SENTENCE)
        print(f"  {'word ' * 30}")

    lines = shown.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == f"{SENTENCE} {('word ' * 30).strip()}"
    assert all(len(line) <= widest for line in lines if "/a-long-path" not in line)
    assert lines[0] == "Iter 10: Saved adapter weights to"
    assert all(line.startswith("  ") for line in lines[1:])
    assert not any(line.endswith((" of", " after", "20")) for line in lines)


def test_elsewhere_a_sentence_is_one_line_so_that_it_can_be_searched_for(console: Callable[[bool], Console]) -> None:
    shown = console(False)

    with lasting_output():
        print(SENTENCE)

    assert shown.getvalue() == f"{SENTENCE}\n"


def test_a_frame_is_not_wrapped(console: Callable[[bool], Console]) -> None:
    shown = console(True)

    with lasting_output():
        print(f"║{' word' * 20} ║")

    assert shown.getvalue() == f"║{' word' * 20} ║\n"


def test_a_rank_that_does_not_speak_prints_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output(speaks=False):
        print("A banner.")
        with lasting_output():
            print("What is trained.")
        print("error: one.", file=sys.stderr)

    assert capsys.readouterr() == ("", "error: one.\n")


@pytest.mark.slow
def test_a_run_on_a_terminal_fits_80_columns_and_in_a_pipe_has_neither_escape_codes_nor_bars(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**settings, "test": True}))
    command = [sys.executable, "-m", "mlx_lm_lora.train", "--config", str(config)]

    piped = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    on_terminal = printed_on_a_terminal(command)

    assert not {"\r", "\x1b"} & set(piped)
    assert "Training:" not in piped
    assert "Training: 100%" in on_terminal
    lines = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal.replace("\r\n", "\n")).splitlines()
    assert [
        line for line in lines if len(line) > 80 and str(tmp_path) not in line and not set("║╔╚\r") & set(line)
    ] == []


def printed_on_a_terminal(command: list[str]) -> str:
    own, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        parts = []
        with suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(own, 65536):
                parts.append(part)
    os.close(own)
    return b"".join(parts).decode()


@pytest.mark.parametrize("output", ["> /dev/full 2> /dev/full", "<&- >&- 2>&-", "2>&1 | true"])
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
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
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


def test_of_a_consoles_file_what_each_line_says_last_is_read_from_a_place_on_and_not_more_than_wanted(
    tmp_path: Path,
) -> None:
    file = tmp_path / "console.log"
    file.write_bytes("before\n10%\r50%\r100%\r\n\n  caf\xe9\xff\n".encode("latin-1"))

    assert last_lines(file, len("before\n")) == ["100%", "  caf\ufffd\ufffd"]
    assert last_lines(file, 0, most=6) == ["caf\ufffd\ufffd"]
    assert last_lines(file, 10**6)[0] == "before"  # it has been begun anew since
