"""Output that never ends a run: what cannot be written is dropped, and the run continues."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_STREAMS = ("stdout", "stderr")


class LastingStream:
    """Passes text on to another stream, and drops it if the reader has left, the disk is full, or it is closed.

    Attributes:
        stream: the other one; ``None`` as in a process without a console.
        failed: whether anything was dropped.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; characters that cannot be encoded become question marks."""
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except (OSError, ValueError, AttributeError):
            self.failed = True
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self.stream.flush()
        except (OSError, ValueError, AttributeError):
            self.failed = True

    def isatty(self) -> bool:
        """Whether somebody may be watching."""
        try:
            return bool(self.stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False


@contextmanager
def lasting_output(of_process: bool = False) -> Iterator[None]:
    """Keep print from raising until the context ends; contexts may be nested.

    Args:
        of_process: the process ends with the context, and must not fail because of output still to be written.
    """
    if of_process:
        keep_standard_descriptors()
    replaced = {}
    for name in _STREAMS:
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            replaced[name] = LastingStream(stream)
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


def discard(stream: Any) -> None:
    """Discard what a stream still buffers, since the interpreter will try to write it once more."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
