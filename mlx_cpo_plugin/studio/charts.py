"""Line charts as SVG: raw values faint, their moving average over them, each line's name and last value beside its end.

Colours are those of the page's style, so that a chart is drawn once for light and dark.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import accumulate

MOST_POINTS = 500
"""Drawn in a chart, however many values there are."""
AVERAGED_FROM = 20
"""With fewer values a line goes through all of them."""
AVERAGED_SHARE = 0.05
MOST_MARKERS = 40
_WIDTH, _HEIGHT = 480, 240
_LEFT, _TOP, _BOTTOM = 70, 12, 44
_CHARACTER, _LABEL_HEIGHT = 8.8, 15
_LONGEST_LABEL_LINE = 16
_TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over iterations.

    Attributes:
        name: what stands beside its end, with the last value; empty for nothing.
        points: iteration and value, in order.
        colour: a colour of the style, as in ``--chart-train``.
        dashed: drawn without a moving average, as each value is one of many pairs.
    """

    name: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False

    @property
    def averaged_over(self) -> int:
        """How many values are averaged into one; 1 is none."""
        if self.dashed or len(self.points) < AVERAGED_FROM:
            return 1
        return 2 * max(2, round(len(self.points) * AVERAGED_SHARE / 2)) + 1

    @cached_property
    def course(self) -> list[Point]:
        """Return the line as it is drawn: the moving average, or the values themselves."""
        return moving_average(self.points, self.averaged_over)


def chart_html(name: str, title: str, unit: str, lines: Sequence[Line], limits: Point | None = None) -> str:
    """Return a chart with its title as a piece of the page; nothing where no line has a point.

    Args:
        name: the element's id.
        unit: what stands beside the y axis.
        limits: least and greatest y; by default those of the values.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    drawing = _Drawing(lines, limits)
    described = "; ".join(f"{line.name} {number(line.points[-1][1])}" for line in lines if line.name)
    averaged = max(line.averaged_over for line in lines)
    note = f" <small>moving average of {averaged} reports</small>" if averaged > 1 else ""
    return (
        f'<figure class="chart" id="{escape(name)}"><figcaption>{escape(title)}{note}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {drawing.height}" role="img" aria-label="{escape(f"{title}: {described}")}">'
        f"{drawing.svg(unit)}</svg></figure>"
    )


def number(value: float) -> str:
    """Return a value in few characters."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def moving_average(points: Sequence[Point], size: int) -> list[Point]:
    """Return the mean of the ``size`` values around each, or of as many as there are."""
    sums = [0.0, *accumulate(value for _, value in points)]
    half, count = size // 2, len(points)
    spans = ((max(0, place - half), min(count, place + half + 1)) for place in range(count))
    return [(x, (sums[end] - sums[start]) / (end - start)) for (x, _), (start, end) in zip(points, spans, strict=True)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most ``most`` points, at least 4: the first and last, and the least and greatest of each stretch."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = {0, len(points) - 1}
    for place in range(stretches):
        start, end = (len(inner) * edge // stretches for edge in (place, place + 1))
        stretch = range(start, end)
        kept |= {1 + pick(stretch, key=lambda index: inner[index][1]) for pick in (min, max) if stretch}
    return [points[place] for place in sorted(kept)]


def evenly(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most ``most`` points, as many of each stretch, so that they lie as dense as all of them do."""
    count = min(most, len(points))
    return [points[place * len(points) // count] for place in range(count)]


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers within the limits, about five."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


class _Drawing:
    """Lines in the coordinates of a chart."""

    def __init__(self, lines: Sequence[Line], limits: Point | None) -> None:
        self.lines = lines
        self.labels = [[*_broken(line.name), number(line.points[-1][1])] * bool(line.name) for line in lines]
        self.height = max(_HEIGHT, sum(map(len, self.labels)) * _LABEL_HEIGHT + _BOTTOM)
        self.right = _WIDTH - _CHARACTER * max((len(text) for label in self.labels for text in label), default=0) - 14
        xs = [x for line in lines for x in (line.points[0][0], line.points[-1][0])]
        self.x_limits = _apart(min(xs), max(xs))
        values = [value for line in lines for _, value in line.points]
        self.y_limits = limits or _apart(min(values), max(values), 0.05)
        # Half for the values, half for their averages.
        self.budget = max(4, MOST_POINTS // sum(1 if line.dashed else 2 for line in lines))

    def svg(self, unit: str) -> str:
        return "".join((*self._axes(unit), *map(self._line, self.lines), *self._labels()))

    def x(self, value: float) -> float:
        low, high = self.x_limits
        return round(_LEFT + (value - low) / (high - low) * (self.right - _LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_limits
        return round(self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _BOTTOM - _TOP), 1)

    def _axes(self, unit: str) -> Iterable[str]:
        for value in ticks(*self.y_limits):
            y = self.y(value)
            yield f'<path class="grid" d="M{_LEFT} {y}H{self.right:.0f}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{number(value)}</text>'
        for value in ticks(*self.x_limits):
            if value == int(value):
                place = f'x="{self.x(value)}" y="{self.height - _BOTTOM + 16}"'
                yield f'<text {place} text-anchor="middle">{value:,.0f}</text>'
        middle = (_LEFT + self.right) / 2
        yield f'<text x="{middle:.0f}" y="{self.height - 6}" text-anchor="middle">Iteration</text>'
        centre = (self.height - _BOTTOM + _TOP) / 2
        turned = f'transform="rotate(-90 12 {centre:.0f})"'
        yield f'<text x="12" y="{centre:.0f}" text-anchor="middle" {turned}>{escape(unit)}</text>'

    def _line(self, line: Line) -> str:
        averaged = line.averaged_over > 1
        course = thinned(line.course, self.budget)
        raw = self._dots(evenly(line.points, self.budget), "raw") if averaged else ""
        dots = self._dots(course, "dots") if not averaged and len(course) <= MOST_MARKERS else ""
        path = f'<path class="course{" dashed" if line.dashed else ""}" d="{self._path(course)}"/>'
        return f'<g style="--line: var(--chart-{line.colour})">{raw}{path}{dots}</g>'

    def _path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(value)}" for x, value in points)

    def _dots(self, points: Sequence[Point], kind: str) -> str:
        """Lines of no length with round ends."""
        return f'<path class="{kind}" d="{"".join(f"M{self.x(x)} {self.y(value)}h0" for x, value in points)}"/>'

    def _labels(self) -> Iterable[str]:
        """Names beside the ends, pushed apart where ends are close."""
        ends = [self.y(line.course[-1][1]) for line in self.lines]
        order = sorted(range(len(ends)), key=lambda place: ends[place])
        room = sum(len(label) for label in self.labels) * _LABEL_HEIGHT
        free = 0.0
        for place in filter(lambda place: self.labels[place], order):
            height = len(self.labels[place]) * _LABEL_HEIGHT
            room -= height
            top = max(free, min(ends[place] - height / 2, self.height - _BOTTOM + _LABEL_HEIGHT - room - height))
            free = top + height
            rows = "".join(
                f'<tspan x="{self.right + 8:.0f}" y="{top + _LABEL_HEIGHT * (row + 0.8):.1f}">{escape(text)}</tspan>'
                for row, text in enumerate(self.labels[place])
            )
            yield f'<text class="name" style="fill: var(--chart-{self.lines[place].colour})">{rows}</text>'


def _apart(low: float, high: float, margin: float = 0.0) -> Point:
    """Return limits that differ, a share of their difference further apart."""
    if low == high:
        margin, high = 0.0, high + (abs(high) or 1.0) / 2
        low -= (abs(low) or 1.0) / 2
    space = (high - low) * margin
    return low - space, high + space


def _broken(name: str) -> list[str]:
    """Return a long name in several lines, whole."""
    return textwrap.wrap(name, _LONGEST_LABEL_LINE)
