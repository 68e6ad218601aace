"""Stopping a run: at a request after the micro-batch at hand, at a second one now."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mlx_cpo_plugin.exchange import of_all_ranks

# SIGHUP comes where the terminal goes.
_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        signal_number: of the request; 0 while there is none.
        forced: whether there was a second one, which wants nothing saved.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.forced = False

    def agreed(self) -> bool:
        """Whether any rank was asked to; all of them have to call this at the same point.

        Raises:
            LostRankError: not all of them are there any more.
        """
        wanted = max(of_all_ranks(self.signal_number))
        if wanted:  # only then: a signal that came meanwhile counts the next time
            self.signal_number = wanted
        return wanted != 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Let Ctrl-C, SIGTERM and SIGHUP ask for a stop until the context ends; a second one is obeyed at once.

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
        if sys.__stderr__ is None:  # closed from the start: another file may have its number
            return
        with suppress(OSError):  # not print, which may be what was interrupted
            os.write(2, b"\nStopping after this micro-batch; once more to stop without saving.\n")

    previous: dict[signal.Signals, Any] = {
        each: signal.signal(each, ask)
        for each in _SIGNALS
        if each != getattr(signal, "SIGHUP", None) or signal.getsignal(each) != signal.SIG_IGN  # as nohup wants it
    }
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if request.signal_number:  # it came too late to be looked at: others may still want to know
        signal.raise_signal(request.signal_number)
