"""Work in a process of its own that tells how far it is, can be cancelled, and leaves JSON behind."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any, NamedTuple

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.types import Values

SECONDS_BETWEEN_STEPS = 2.0
_SO_MANY = re.compile(r"\b(\d+) of (\d+)\b")
# Without modules that happen to lie in the folder of the page, which the commands of a terminal do not import either.
PYTHON = (sys.executable, "-P")


class ChildError(UserError):
    """A worker process of the page failed; says why."""


class Cancelled(ChildError):
    """It was cancelled."""


class Step(NamedTuple):
    """How far a worker is.

    Attributes:
        line: what it printed last.
        seconds: since it began.
    """

    line: str
    seconds: float

    def html(self, title: str) -> str:
        """Return it as a piece of the page."""
        said = f": {escape(self.line)}" if self.line else " …"
        found = _SO_MANY.search(self.line)
        # A bar that only moves, because nobody knows how far it is, keeps a browser busy all the time.
        bar = found and f'<progress aria-label="{escape(title)}" value="{found[1]}" max="{found[2]}"></progress>'
        return (
            f'<div class="working" role="status">{bar or ""}'
            f"<p>{escape(title)}{said} <span>{self.seconds:.0f} s</span></p></div>"
        )


class Job:
    """``python -m WORDS FILE`` in a process of its own, and what it writes into the file.

    What it prints to standard error is progress; the last line of a process that failed is its reason. The process ends
    with the context.

    Args:
        words: the module and its arguments but the last.
        root: where it runs.
        writes: whether it gets the name of a file to write into; otherwise what it prints is its result.
        typed: its standard input: texts that are nobody else's to read, as the words of a process are.
    """

    def __init__(self, words: Sequence[str], root: Path, writes: bool = True, typed: str = "") -> None:
        self.cancelled = False
        self._began = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="mlx-cpo-studio-")
        self._output = Path(self._folder.name) / "output.json"
        self._read = 0
        self._printed = self._output.with_name("printed")
        entered = self._output.with_name("entered")
        entered.write_text(typed, encoding="utf-8")
        with self._printed.open("wb") as printed, entered.open("rb") as entrance:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", *words, *[str(self._output)] * writes],
                cwd=root,
                stdin=entrance,
                stdout=printed,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                start_new_session=True,
            )
        self._lines: Queue[str | None] = Queue()
        self._last, self._ended, self._is_over = "", False, False
        Thread(target=self._listen, daemon=True).start()
        atexit.register(self.cancel)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._process.wait()
        self._is_over = True
        self._folder.cleanup()
        atexit.unregister(self.cancel)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._lines.put(line.strip())
        self._lines.put(None)

    def steps(self) -> Iterator[Step]:
        """Yield how far it is, from time to time and with each line that it prints, until it has ended."""
        while not self._ended:
            yield Step(self._last, time.monotonic() - self._began)
            try:
                line = self._lines.get(timeout=SECONDS_BETWEEN_STEPS)
                while line is not None:
                    self._last = line
                    line = self._lines.get_nowait()
                self._ended = True
            except Empty:
                continue

    def written(self) -> dict[str, Any] | None:
        """Return what it has written; None where that is nothing, or nothing new."""
        try:
            status = self._output.stat()
        except OSError:
            return None
        if status.st_mtime_ns == self._read:
            return None
        self._read = status.st_mtime_ns
        result: dict[str, Any] = json.loads(self._output.read_text(encoding="utf-8"))
        return result

    def result(self) -> dict[str, Any]:
        """Wait for its end and return what it wrote.

        Raises:
            Cancelled: it was.
            ChildError: it failed.
        """
        self._wait()
        self._read = 0
        result = self.written()
        if result is None:
            raise ChildError(self._last or "Nothing was written.")
        return result

    def printed(self) -> str:
        """Wait for its end and return what it printed; raises as :meth:`result` does."""
        self._wait()
        return self._printed.read_text(encoding="utf-8", errors="replace")

    def _wait(self) -> None:
        for _ in self.steps():
            pass
        code = self._process.wait()
        if self.cancelled:
            raise Cancelled("Cancelled.")
        if code != 0:
            killed = " It was killed: out of memory?" if code == -signal.SIGKILL else ""
            raise ChildError((self._last.removeprefix("error: ") or f"exit code {code}") + killed)

    def cancel(self) -> None:
        """End it and the processes that it has started; their number may be others' once all is over."""
        if self._is_over:
            return
        if self._process.poll() is None:
            self.cancelled = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def leave(values: Values, output: Path) -> None:
    """Write what a job has found so far, in the job's process."""
    replace_whole(output, lambda partial: partial.write_text(json.dumps(values), encoding="utf-8"))


def work_on_config(work: Callable[[Path, Path], None]) -> int:
    """Do the work of a job on the configuration and into the file that the command line names; return the exit code."""
    from mlx_cpo_plugin.data import conversion  # which the page itself does not need

    conversion.LINE_EVERY = SECONDS_BETWEEN_STEPS
    try:
        work(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class Jobs:
    """The job of each visit of the page, at most one; a new one ends the one before."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, visit: str | None, words: Sequence[str], root: Path, writes: bool = True, typed: str = "") -> Job:
        """Start a job; see :class:`Job`."""
        self.cancel(visit)
        job = Job(words, root, writes, typed)
        with self._lock:
            self._jobs[visit or ""] = job
        return job

    @contextmanager
    def on_config(self, visit: str | None, module: str, text: str, root: Path) -> Iterator[Job]:
        """Start ``python -m MODULE CONFIG FILE`` with a configuration that need not be saved."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as config:
            config.write(text)
            config.flush()
            with self.start(visit, [module, config.name], root) as job:
                yield job

    def cancel(self, visit: str | None) -> None:
        """End the job of a visit, if there is one."""
        with self._lock:
            job = self._jobs.pop(visit or "", None)
        if job is not None:
            job.cancel()
