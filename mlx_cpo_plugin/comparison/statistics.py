"""What is certain at 95 %: intervals of rates and means, and which of two models is better by a measure.

Rates have Wilson's interval, means and differences of two models on the same prompts or pairs Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.verdict import OUTCOMES, Change, Z, error_of_rows, students_t, sums_of_rows, worth_in_rows

Interval = tuple[float, float]
SHARE: Interval = (0, 1)


@dataclass(frozen=True)
class Measure:
    """Something that is measured of each model, once for each prompt or pair.

    Attributes:
        unit: what it is measured on, ``pairs`` or ``answers``.
        sign: 1 where more is better, -1 where less is, 0 where neither is.
        is_rate: whether each value is 0 or 1.
        within: what a value is never below and never above; of a rate, 0 and 1.
    """

    name: str
    unit: str
    sign: int = 1
    is_rate: bool = False
    within: Interval = (-math.inf, math.inf)

    @property
    def span(self) -> Interval:
        """The least and the greatest value that there can be."""
        return SHARE if self.is_rate else self.within


def wilson(successes: float, trials: int) -> Interval:
    """Return the interval of a rate; a tie may count as half a success, which makes it no narrower than it should be.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not trials:
        return math.nan, math.nan
    rate, share = successes / trials, Z**2 / trials
    half = Z * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    return max(0.0, (rate + share / 2 - half) / (1 + share)), min(1.0, (rate + share / 2 + half) / (1 + share))


def change_of(values: NDArray[np.float64], rows: NDArray[np.int64]) -> Change:
    """Return the mean of N values and its standard error, which those of a single row have none of.

    Args:
        rows: which row each is from, numbered from 0: int64 [N].
    """
    if not len(values):
        return Change(math.nan, math.nan, 0)
    mean, count = float(values.mean()), int(rows.max()) + 1
    (error,) = error_of_rows(sums_of_rows(values[None] - mean, rows, count), len(values))
    return Change(mean, float(error), worth_in_rows(rows))


def around(change: Change) -> Interval:
    """Return the interval of a mean."""
    half = students_t(change.rows - 1) * change.stderr if change.rows > 1 else math.nan
    return change.mean - half, change.mean + half


def figures(
    measure: Measure, names: Sequence[str], values: NDArray[np.float64], rows: NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Return what the JSON says of one measure: each model's mean, and who is better than whom.

    All are compared with the first, the base model, and with the best.

    Args:
        names: of the M models.
        values: float64 [M, N].
        rows: which row each is from, int64 [N]; without them each is from another.
    """
    rows = np.arange(values.shape[1]) if rows is None else rows
    with np.errstate(invalid="ignore"):  # of a model that diverged
        means = [change_of(of_model, rows) for of_model in values]
        best = None
        if measure.sign:
            best = max(range(len(means)), key=lambda place: _rank(measure.sign * means[place].mean))
        against = [(place, 0) for place in range(1, len(means))]
        against += [(place, best) for place in range(1, len(means)) if best and place != best]
        return {
            "name": measure.name,
            "of": measure.unit,
            "count": values.shape[1],
            "models": [_mean(measure, name, mean) for name, mean in zip(names, means, strict=True)],
            "best": None if best is None else names[best],
            "comparisons": [
                {"model": names[one], "against": names[other]} | _compared(measure, values[one], values[other], rows)
                for one, other in against
            ],
        }


def duel_figures(points: Sequence[float], rows: int | None = None) -> dict[str, Any]:
    """Return wins, ties and losses, the win rate and what is certain: of points that are 1, 0.5 and 0 for these.

    Args:
        rows: how many rows they are worth, where several are about one.
    """
    rows = len(points) if rows is None else rows
    wins, losses = (sum(point == value for point in points) for value in (1, 0))
    rate = sum(points) / len(points) if points else math.nan
    low, high = wilson(rate * rows, rows)
    return {
        "wins": wins,
        "ties": len(points) - wins - losses,
        "losses": losses,
        "win_rate": finite(rate),
        "win_rate_low": finite(low),
        "win_rate_high": finite(high),
        "outcome": OUTCOMES[(low > 0.5) - (high < 0.5)],
    }


def _mean(measure: Measure, name: str, mean: Change) -> dict[str, Any]:
    interval = wilson(mean.mean * mean.rows, mean.rows) if measure.is_rate else around(mean)
    low, high = np.clip(interval, *measure.span)
    return {"name": name, "mean": finite(mean.mean), "low": finite(low), "high": finite(high)}


def _compared(
    measure: Measure, own: NDArray[np.float64], others: NDArray[np.float64], rows: NDArray[np.int64]
) -> dict[str, Any]:
    change = change_of(own - others, rows)
    low, high = around(change)
    widest = measure.span[1] - measure.span[0]
    low, high = np.clip((low, high), -widest, widest)
    compared = {"difference": finite(change.mean), "low": finite(low), "high": finite(high)}
    if not measure.sign:
        return compared
    # What is no number is worse than any, and ties with its like.
    one, other = (np.where(np.isnan(values), -np.inf, measure.sign * values) for values in (own, others))
    points = 0.5 + 0.5 * ((one > other).astype(np.float64) - (one < other))
    outcome = OUTCOMES[measure.sign * change.sign(least=0.0)]
    return compared | duel_figures(points.tolist(), change.rows) | {"outcome": outcome}


def _rank(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return float(value) if math.isfinite(value) else None
