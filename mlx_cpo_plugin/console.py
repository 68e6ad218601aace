"""Output that never ends a run and suits whoever reads it: a person at a terminal, or a file or another program."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

WIDTH = 80
_STREAMS = ("stdout", "stderr")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Frames, which must not be wrapped.
_DRAWN = re.compile("[\u2500-\u259f]")
# Rows of a table, and commands behind what they are for.
_COPIED = re.compile(r"\|.*\|$|\w+: +mlx[-_]\w+")
# A number stays with its name and its unit.
_BESIDE_NUMBERS = re.compile(r"(?<=[\w:±]) (?=[-+]?\d)|(?<=\d) (?=[\w±])")


def is_live(stream: TextIO) -> bool:
    """Whether ``stream`` shows colours and lines that are written over: a terminal does, unless the user wants neither.

    ``NO_COLOR`` and ``TERM=dumb`` say so; ``FORCE_COLOR`` makes a terminal of a stream that is none.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("FORCE_COLOR"):
        return not os.environ.get("NO_COLOR")
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


class LastingStream:
    """Passes text on to another stream, and drops it if the reader has left, the disk is full, or it is closed.

    A terminal gets long sentences in lines of :data:`WIDTH` columns at most. Where the process writes to anything that
    is not :func:`is_live`, no escape code arrives, and of a line that is written over only what it says last. A stream
    that is not the process's own, such as a notebook's, gets everything as it is.

    Attributes:
        stream: the other one; ``None`` as in a process without a console.
        speaks: whether anything is passed on.
        failed: whether anything was dropped that should have been.
    """

    def __init__(self, stream: TextIO, speaks: bool = True) -> None:
        self.stream, self.speaks = stream, speaks
        self.failed = False
        self._own = stream is not None and stream in (sys.__stdout__, sys.__stderr__)
        self._overwritten = ""

    @property
    def is_live(self) -> bool:
        """Whether lines may be written over."""
        return not self._own or self._asks(is_live)

    def __getattr__(self, name: str) -> object:
        if name == "stream":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; characters that cannot be encoded become question marks."""
        if not self.speaks:
            return len(text)
        shown = wrapped(text) if self._own and self._is_terminal() else text
        shown = shown if self.is_live else self._as_it_ends(shown)
        try:
            self.stream.write(shown)
        except UnicodeEncodeError as error:
            with suppress(OSError, ValueError):
                self.stream.write(shown.encode(error.encoding, "replace").decode(error.encoding))
        except (OSError, ValueError, AttributeError):
            self.failed = True
        return len(text)

    def _as_it_ends(self, text: str) -> str:
        """Return what can be passed on of the text so far: whole lines as a terminal would show them in the end."""
        *whole, rest = (self._overwritten + ESCAPES.sub("", text)).split("\n")
        self._overwritten = "\r" + rest.rpartition("\r")[2] if "\r" in rest else ""
        return "".join(f"{_last(line)}\n" for line in whole) + ("" if self._overwritten else rest)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self.stream.flush()
        except (OSError, ValueError, AttributeError):
            self.failed = True

    def isatty(self) -> bool:
        """Whether somebody may be watching, and wants to be shown more than lines."""
        return self.is_live if self._own else self._is_terminal()

    def _is_terminal(self) -> bool:
        return self._asks(lambda stream: bool(stream.isatty()))

    def _asks(self, question: Callable[[TextIO], bool]) -> bool:
        try:
            return question(self.stream)
        except (OSError, ValueError, AttributeError):
            return False


def wrapped(text: str) -> str:
    """Return ``text`` with its long lines broken between words, to :data:`WIDTH` columns or a narrower terminal's.

    A line that is written over, that draws a frame or a table, or that has a command to copy, is left as it is.
    """
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    if len(ESCAPES.sub("", line)) <= width or "\r" in line or _DRAWN.search(line) or _COPIED.match(line):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    lines = textwrap.wrap(
        _BESIDE_NUMBERS.sub("\0", line),
        width,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,  # paths and flags
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace("\0", " ")


def _last(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


def last_lines(file: Path, since: int, most: int = 64 * 1024) -> list[str]:
    """Return the last lines of a console's file that are not empty; of one that was written over, what it says last.

    Args:
        since: where to begin, in bytes; the whole file where it has become shorter.
        most: how many bytes to read.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(since if since <= size else 0, size - most))
        text = stream.read().decode("utf-8", errors="replace")
    return [last for line in text.split("\n") if (last := _last(line)).strip()]


@contextmanager
def lasting_output(of_process: bool = False, speaks: bool = True, streams: Sequence[str] = _STREAMS) -> Iterator[None]:
    """Keep print from raising until the context ends; contexts may be nested.

    Args:
        of_process: the process ends with the context, and must not fail because of output still to be written.
        speaks: whether standard output is passed on; errors are in any case.
        streams: which streams of ``sys``.
    """
    if of_process:
        keep_standard_descriptors()
    replaced = {}
    for name in streams:
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            replaced[name] = LastingStream(stream, speaks or name != "stdout")
            setattr(sys, name, replaced[name])
    try:
        yield
    finally:
        for name, lasting in replaced.items():
            lasting.flush()
            if getattr(sys, name) is lasting:  # and not what somebody else has put over it
                setattr(sys, name, lasting.stream)
            if of_process and lasting.failed:
                discard(lasting.stream)


def keep_standard_descriptors() -> None:
    """Reopen standard input, output and error if they are closed, so that no other file gets their numbers.

    Output would end up in that file, and MLX takes the number 0 for a file that was not opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest free number


def discard(stream: TextIO) -> None:
    """Discard what a stream still buffers, since the interpreter will try to write it once more."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
