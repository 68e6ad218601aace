"""A worker of the page tells how far it is, is cancelled with all that it has started, and says why it failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from mlx_cpo_plugin.studio.child import Cancelled, ChildError, Job, Jobs, Step

Words = Callable[[str], list[str]]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Makes a module of some lines and returns the words that run it; ``output`` is where it has to write."""

    def made(lines: str) -> list[str]:
        beginning = "import os, signal, subprocess, sys\nfrom pathlib import Path\noutput = Path(sys.argv[1])\n"
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / "worker.py").write_text(beginning + lines)
        return ["worker"]

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    return made


def test_a_module_that_lies_in_the_folder_is_not_taken_for_one_of_a_library(worker: Words, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong one')")

    with Job(worker("import queue\noutput.write_text('{}')"), tmp_path) as job:
        assert job.result() == {}


def test_what_it_prints_is_its_progress_and_what_it_writes_its_result(worker: Words, tmp_path: Path) -> None:
    words = worker(
        "output.write_text('{\"part\": 1}')\nprint('half', file=sys.stderr, flush=True)\n"
        "while not Path('go').exists(): pass\noutput.with_name('x').write_text('{\"part\": 2}')\n"
        "output.with_name('x').replace(output)\n"
    )
    with Job(words, tmp_path) as job:
        seen = next(step for step in job.steps() if step.line)
        assert "half" in seen.html("Working")
        assert job.written() == {"part": 1}
        assert job.written() is None
        (tmp_path / "go").touch()

        assert job.result() == {"part": 2}
        assert list(job.steps()) == []


def test_what_is_typed_is_not_among_its_words(worker: Words, tmp_path: Path) -> None:
    words = worker("import json\noutput.write_text(json.dumps({'read': sys.stdin.read(), 'words': sys.argv}))")

    with Job(words, tmp_path, typed="Wie heißt du?\n") as job:
        result = job.result()

    assert result["read"] == "Wie heißt du?\n"
    assert "Wie" not in "".join(result["words"])


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("output.write_text('{}')\nsys.exit('error: no such file')", "no such file"),
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out of memory?"),
    ],
)
def test_one_that_fails_says_why(lines: str, reason: str, worker: Words, tmp_path: Path) -> None:
    with Job(worker(lines), tmp_path) as job, pytest.raises(ChildError, match=reason.replace("?", r"\?")):
        job.result()


def test_a_bar_shows_how_much_is_done_where_that_is_told() -> None:
    told, untold = (Step(line, 2.4).html("Checking") for line in ("300 of 1000 rows are done.", "<b>"))

    assert '<progress aria-label="Checking" value="300" max="1000">' in told
    assert "<progress" not in untold
    assert "Checking: &lt;b&gt; <span>2 s" in untold


def test_a_cancelled_one_ends_with_all_that_it_has_started(worker: Words, tmp_path: Path) -> None:
    words = worker(
        "child = subprocess.Popen(['sleep', '600'])\nprint(child.pid, file=sys.stderr, flush=True)\nsignal.pause()"
    )
    jobs = Jobs()
    with jobs.start("a", words, tmp_path) as job:
        child = int(next(step for step in job.steps() if step.line).line)
        jobs.cancel("b")
        assert not job.cancelled
        jobs.cancel("a")
        with pytest.raises(Cancelled):
            job.result()

    while _is_alive(child):
        Event().wait(0.01)


def test_a_new_one_of_the_same_visit_ends_the_one_before(worker: Words, tmp_path: Path) -> None:
    words, jobs = worker("signal.pause()"), Jobs()
    first = jobs.start("a", words, tmp_path)
    second = jobs.start("a", words, tmp_path)

    with first, pytest.raises(Cancelled):
        first.result()
    assert not second.cancelled
    with second:
        pass
    assert second.cancelled


def test_one_that_is_over_kills_nothing_any_more(
    worker: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs()
    with jobs.start("a", worker("output.write_text('{}')"), tmp_path) as job:
        job.result()
    monkeypatch.setattr("os.killpg", lambda group, number: pytest.fail("its number may be another's"))

    jobs.cancel("a")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
