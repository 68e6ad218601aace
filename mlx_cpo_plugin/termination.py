"""Time to tidy up before a signal ends the process: to stop what it has started, to remove what is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopped_by_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, until the context ends."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # nohup ignores SIGHUP
    for own in heard:
        signal.signal(own, stop)
    try:
        yield
    finally:
        for own in heard:
            signal.signal(own, before[own])
