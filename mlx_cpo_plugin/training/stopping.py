"""Stopping a run: at a request after the micro-batch at hand, at a second one now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.training.exchange import of_all_ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(UserError):
    """A run stopped because it was asked to; what was done is saved.

    Attributes:
        exit_code: of the process, as shells know it for a process that a signal ended.
    """

    def __init__(self, iteration: int, signal_number: int) -> None:
        super().__init__(
            f"stopped after iteration {iteration}, which is saved; run the same command with resume: auto (or "
            "--resume auto) to go on."
        )
        self.exit_code = 128 + signal_number


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        signal_number: of the request; 0 while there is none.
    """

    def __init__(self) -> None:
        self.signal_number = 0

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
    """Let Ctrl-C and SIGTERM ask for a stop until the context ends; a second one is obeyed at once.

    In a thread, which gets no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal_number:
            for each, handler in previous.items():
                signal.signal(each, handler)
            os.kill(os.getpid(), number)
            return
        request.signal_number = number
        print("\nStopping after this micro-batch; once more to stop without saving.", flush=True)

    previous: dict[signal.Signals, Any] = {each: signal.signal(each, ask) for each in _SIGNALS}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
