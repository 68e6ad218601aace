"""What a signal ends has time to tidy up."""

from __future__ import annotations

import os
import signal

import pytest

from mlx_cpo_plugin.termination import stopped_by_termination


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_process_as_an_exception_and_what_it_did_before_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    with pytest.raises(SystemExit) as caught, stopped_by_termination():
        os.kill(os.getpid(), number)

    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_termination():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
