"""How long training takes, by what a few of its own micro-batches took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

MEASURED = 5
"""Micro-batches that the forecast of a run is made from; the first one, which compiles, is none of them."""
WORTH_SAYING = 60.0
"""Seconds from which on the rest of a run is announced."""


class Forecast:
    """Says once, after the first micro-batches of a run, how long the rest takes.

    Args:
        tokens: of each micro-batch of the run, in order.
        done: micro-batches that a resumed run does not repeat.
        clock: returns seconds.
    """

    def __init__(self, tokens: Sequence[int], done: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.tokens, self.first, self.clock = tokens, done + 1, clock
        self.began: float | None = None

    def line(self, iteration: int) -> str | None:
        """Return the sentence after a complete iteration, if it is due; it counts no validation to come."""
        if self.began is None:
            self.began = self.clock()
        if iteration != self.first + MEASURED:
            return None
        measured, left = sum(self.tokens[self.first : iteration]), sum(self.tokens[iteration:])
        seconds = (self.clock() - self.began) / max(1, measured) * left
        if seconds < WORTH_SAYING:
            return None
        between = f"iterations {self.first + 1} to {iteration}"
        return f"About {spoken(seconds)} of training are left, by the tokens and the time of {between}."


def expected_seconds(measured: Iterable[tuple[float, float]], tokens: Iterable[float]) -> float:
    """Return the seconds that micro-batches of so many ``tokens`` take together.

    Args:
        measured: tokens and seconds of at least one; between two of them time is taken to be linear in the tokens, and
            outside proportional to them.
    """
    sizes, seconds = np.array(sorted(measured), np.float64).T
    wanted = np.fromiter(tokens, np.float64)
    inside = np.interp(wanted, sizes, seconds)
    outside = np.where(wanted < sizes[0], wanted / sizes[0], np.maximum(1.0, wanted / sizes[-1]))
    return float((inside * outside).sum())


def spoken(seconds: float) -> str:
    """Return a duration in the unit that fits: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
