"""What ``mlx-cpo compare --json`` wrote, as tables of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mlx_cpo_plugin.errors import named
from mlx_cpo_plugin.report.record import ReportError

# Measures that are shown in percent; differences of them in percentage points.
SHARES = ("accuracy", "repetition", "ended")
ABSENT = "-"


class Line(NamedTuple):
    """A mean of a model, or the difference of two models, with its 95 % interval."""

    title: str
    value: str
    interval: str
    wins: str = ""
    outcome: str = ""


class Standing(NamedTuple):
    """A measure, its lines, and whether they have wins."""

    title: str
    lines: list[Line]


def read_measures(file: Path) -> list[Standing]:
    """Return the measures in a file that ``mlx-cpo compare`` wrote.

    Raises:
        ReportError: it is none.
    """
    try:
        measures = json.loads(file.read_text(encoding="utf-8"))["measures"]
        return [Standing(f"{one['name']}, {one['count']} {one['of']}", _lines(one)) for one in measures]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no measures"
        raise ReportError(
            f"--comparison {named(str(file))} cannot be read ({reason}); give what mlx-cpo compare --json wrote.",
            key="comparison",
            place=str(file),
        ) from error


def _lines(measure: dict[str, Any]) -> list[Line]:
    share = measure["name"] in SHARES
    lines = [
        Line(model["name"], _shown(model["mean"], share), _interval(model["low"], model["high"], share))
        for model in measure["models"]
    ]
    for compared in measure["comparisons"]:
        title = f"{compared['model']} against {compared['against']}"
        value = interval = ""
        if "difference" in compared:
            value = _shown(compared["difference"], share, "+")
            interval = _interval(compared["low"], compared["high"], share, "+")
        wins = ""
        if "wins" in compared:
            rate = _interval(compared["win_rate_low"], compared["win_rate_high"], True)
            wins = f"{compared['wins']}/{compared['ties']}/{compared['losses']}, {_shown(compared['win_rate'], True)}"
            wins += f" ({rate})"
        lines.append(Line(title, value, interval, wins, compared.get("outcome", "")))
    return lines


def _interval(low: float | None, high: float | None, share: bool, sign: str = "") -> str:
    return ABSENT if low is None or high is None else f"{_shown(low, share, sign)} to {_shown(high, share, sign)}"


def _shown(value: float | None, share: bool, sign: str = "") -> str:
    if value is None:
        return ABSENT
    return f"{100 * value:{sign}.1f}%" if share else f"{value:{sign}.4g}"
