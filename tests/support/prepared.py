"""Processes that begin with everything imported, for tests whose subject is not how a process starts.

On Linux they are forks of one process that has imported the plugin and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from support.tiny import TESTS

_context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _context.set_forkserver_preload(["support.preloaded"])
SECONDS = 600  # on a machine that is busy with much else


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code, or minus the signal that ended it, and what it wrote."""

    code: int
    printed: str
    told: str

    @property
    def errors(self) -> list[str]:
        """The sentences that end a run; MLX may have begun their line."""
        return [line[line.index("error: ") :] for line in self.told.splitlines() if "error: " in line]


class Prepared:
    """A process that calls an importable function with ``arguments``.

    Args:
        output: a file that does not exist yet; both streams are written to files that are named like it.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, output: Path, **environment: str) -> None:
        self._files = [output.with_suffix(suffix) for suffix in (".out", ".err")]
        whole = {**os.environ, **environment}  # as it is now, not as it was when the first of them was prepared
        _start_server()
        self._process = _context.Process(target=_call, args=(function, arguments, self._files, whole))
        self._process.start()

    def ended(self) -> Ended:
        """Wait for it; one that hangs fails the test, and none is left behind."""
        self._process.join(SECONDS)
        code = self._process.exitcode
        self._process.kill()
        assert code is not None, f"still running: {[file.read_text() for file in self._files]}"
        return Ended(code, *(file.read_text(errors="replace") for file in self._files))


@cache
def _start_server() -> None:
    """Start the process that forks, which finds ``support`` by the environment alone."""
    if sys.platform == "linux":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(TESTS))
            forkserver.ensure_running()


def run_module(name: str, *words: str) -> None:
    """Do what ``python -m`` does."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], files: list[Path], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = function(*arguments)
    sys.exit(code if isinstance(code, int) else 0)
