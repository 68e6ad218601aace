"""Ways out of training before its end: a stop that was asked for, and whatever fails; what was done is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import mlx.core as mx

from mlx_cpo_plugin.errors import OUT_OF_MEMORY, StoppedError, TrainingError, UserError, is_out_of_memory
from mlx_cpo_plugin.exchange import LostRankError, gather

# SIGHUP comes when the terminal closes.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        signal_number: of the request; 0 while there is none.
        forced: whether there was a second one: stop without saving.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.forced = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all of them have to call this at the same point."""
        wanted = max(gather(self.signal_number))
        if wanted:  # only then: a signal that arrives meanwhile counts the next time
            self.signal_number = wanted
        return wanted != 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Let Ctrl-C, SIGTERM and SIGHUP ask for a stop until the context ends; a second one ends the process at once.

    In a thread, which gets no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal_number:
            request.forced = True
            for each, handler in previous.items():
                signal.signal(each, signal.SIG_DFL if handler == signal.SIG_IGN else handler)
            os.kill(os.getpid(), number)
            return
        request.signal_number = number
        if sys.__stderr__ is not None:  # closed from the start, another file may have its number
            with suppress(OSError):  # not print, which may be what was interrupted
                os.write(
                    2, b"\nStopping after this micro-batch or validation; press Ctrl-C again to stop without saving.\n"
                )

    previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {
        each: signal.signal(each, ask)
        for each in _SIGNALS
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN  # as set by nohup
    }
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if request.signal_number:  # too late for this run, but not for its caller
        signal.raise_signal(request.signal_number)


@contextmanager
def saved_on_failure(save: Callable[[], str], stop: StopRequest, say: Callable[[str], None]) -> Iterator[None]:
    """Save where an exception ends the context, and append what was saved to its message, or say it.

    A stop has saved already, a second request wants nothing saved, and ranks have no common state once one is lost.

    Args:
        save: saves what it can without raising, and returns a sentence on it; empty for nothing.
    """
    try:
        yield
    except (StoppedError, LostRankError):
        raise
    except BaseException as error:
        if stop.forced:
            raise
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            traceback.clear_frames(error.__traceback__)  # they hold the arrays of the micro-batch
            mx.clear_cache()
        saved = save()
        if out_of_memory and not isinstance(error, UserError):
            raise TrainingError(f"{OUT_OF_MEMORY} {saved}".strip()) from error
        if isinstance(error, UserError):
            error.args = (f"{error} {saved}".strip(),)
        elif saved:
            say(saved)
        raise


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError with a readable message."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, UserError):
            raise TrainingError(OUT_OF_MEMORY) from error
        raise
