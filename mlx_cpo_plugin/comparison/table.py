"""A comparison for a terminal of 80 columns: which model is better by what, then their answers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from mlx_cpo_plugin.errors import named
from mlx_cpo_plugin.report.standings import SHARES
from mlx_cpo_plugin.training.summary import counted

IN_PERCENT = (*SHARES, "win rate")
# Measures of which the rate of wins is of interest.
BY_WINS = ("reward", "judge")
DIGITS = {"length": 1, "chrf": 1, "chrf++": 1}
MOST_DIGITS = 3
# Widths of columns.
LABEL, MEAN, ENDS = 28, 9, 17
MOST_ANSWERS = 8
ABSENT = "-"
# What would steer the terminal.
_CONTROLS = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


def as_text(figures: dict[str, Any]) -> str:
    """Return the tables of measures and below them the first answers."""
    lines: list[str] = []
    for measure in figures["measures"]:
        lines += [*_measure(measure), ""]
    if len(figures["preference"]) > 1:
        lines += [*_by_length(figures), ""]
    names = [model["name"] for model in figures["models"]]
    for answer in figures["answers"][:MOST_ANSWERS]:
        lines.append(f"{answer['source']}: {answer['prompt'].strip()}")
        for name, given in zip(names, answer["models"], strict=True):
            text = given["text"] + ("" if given["finished"] else " […]")
            lines += [f"  {name}:", textwrap.indent(text, "    ")]
        lines.append("")
    if len(figures["answers"]) > MOST_ANSWERS:
        lines.append(f"{len(figures['answers']) - MOST_ANSWERS} more prompts are answered; --json FILE has them all.")
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], "\n".join(lines).rstrip("\n") + "\n")


def _measure(measure: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each model, then one for each comparison of two."""
    name = measure["name"]
    is_signed = any("wins" in compared for compared in measure["comparisons"])
    title = named(f"{name}, {counted(measure['count'], measure['of'].removesuffix('s'))}", LABEL + 2)
    mean = "mean" if measure["models"] else "win rate"
    counts = "win/tie/loss" if is_signed else ""
    yield f"{title:<{LABEL + 2}}{mean:>{MEAN}}{'95% interval':>{ENDS}}{counts:>13}".rstrip()
    for model in measure["models"]:
        yield _line(name, model["name"], model["mean"], model)
    for compared in measure["comparisons"]:
        label = f"{named(compared['model'], 12)} vs {named(compared['against'], 12)}"
        ends = [compared.get(end) for end in ("wins", "ties", "losses")]
        counts = f"{'/'.join(map(str, ends)):>13}{compared['outcome']:>11}" if is_signed else ""
        if "difference" in compared:
            yield _line(name, label, compared["difference"], compared, sign="+") + counts
            label, counts = "  win rate", ""
        if name.startswith(BY_WINS):
            wins = {end: compared[f"win_rate_{end}"] for end in ("low", "high")}
            yield _line("win rate", label, compared["win_rate"], wins) + counts


def _by_length(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the accuracy on short, medium and long pairs, a line for each model."""
    groups = figures["preference"][1:]
    titles = [f"{group['name']} {group['shortest']}-{group['longest']}" for group in groups]
    yield f"{'accuracy by tokens of a pair':<{LABEL + 2}}" + "".join(f"{title:>16}" for title in titles)
    for place, model in enumerate(figures["models"]):
        means = [_shown("accuracy", group["models"][place]["accuracy"]) for group in groups]
        yield f"  {named(model['name'], LABEL):<{LABEL}}" + "".join(f"{mean:>16}" for mean in means)


def _line(measure: str, label: str, value: float | None, interval: dict[str, Any], sign: str = "") -> str:
    for digits in range(DIGITS.get(measure, MOST_DIGITS), -1, -1):
        low, high = (_shown(measure, interval[end], sign, unit="", digits=digits) for end in ("low", "high"))
        ends = f"{low} to {high}" if interval["low"] is not None else ABSENT
        mean = _shown(measure, value, sign, digits=digits)
        if len(mean) < MEAN and len(ends) < ENDS:
            break
    return f"  {named(label, LABEL):<{LABEL}} {mean:>{MEAN - 1}} {ends:>{ENDS - 1}}"


def _shown(measure: str, value: float | None, sign: str = "", unit: str = "%", digits: int = MOST_DIGITS) -> str:
    if value is None:
        return ABSENT
    if measure in IN_PERCENT:
        return f"{100 * value:{sign}.{min(digits, 1)}f}{unit}"
    return f"{value:{sign}.{digits}f}"
