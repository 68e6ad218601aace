"""What a chat template reads from outside of a row, the time and chance, held still."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from threading import RLock
from typing import Any

_LOCK = RLock()


class _StoppedClock:
    def __init__(self, now: datetime) -> None:
        self._now = now

    def now(self, *_: Any) -> datetime:
        return self._now


@contextmanager
def inputs_held_at(now: datetime) -> Iterator[None]:
    """Within it, ``strftime_now`` of templates tells ``now``, and what they draw by chance is always the same.

    `transformers` gives templates its own ``datetime``, and nothing to replace it by; where it has none, time goes on.
    """
    from transformers.utils import chat_template_utils  # costly, and there before any tokenizer

    with _LOCK:
        clock, chance = getattr(chat_template_utils, "datetime", None), random.getstate()
        try:
            if clock is not None:
                vars(chat_template_utils)["datetime"] = _StoppedClock(now)
            random.seed(0)
            yield
        finally:
            random.setstate(chance)
            if clock is not None:
                vars(chat_template_utils)["datetime"] = clock
