"""Contests as a table for people, as a bar chart, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mlx_cpo_plugin.bench.against import MODES, Contest, Timing
from mlx_cpo_plugin.bench.job import EPOCH
from mlx_cpo_plugin.bench.plots import COLOURS, pyplot, save
from mlx_cpo_plugin.bench.report import environment, figures_as_json, spread

_COLUMNS = ("", "seconds per pair", "times ours", "MLX's peak, MB", "process's peak, MB", "loss", "weights", "BLAS")
# What a bar stands for -> its heading.
_BARS = {"seconds": "seconds per pair", "memory": "peak of the process, GB"}


def table(contest: Contest) -> str:
    """Return one case: a line for each trainer in each mode, and notes below."""
    lines = [contest.case.name, f"processor: {environment()['processor']}"]
    for mode, timings in contest.timings.items():
        rows = [_COLUMNS, *(_cells(contest, mode, name, timing) for name, timing in timings.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(heading(contest, mode))
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
    lines.append(f"rounds, one trainer after the other: {contest.rounds}; median (range)")
    if contest.stopped:
        lines.append("stopped by Ctrl-C: what was measured in whole rounds up to there")
    lines.append("torch does not tell what it allocates; the process's peak holds Python, libraries and the files read")
    lines += [f"note: {note}" for note in contest.notes]
    return "\n".join(lines)


def heading(contest: Contest, mode: str) -> str:
    """Return what was measured in one mode."""
    if mode == EPOCH:
        return f"{MODES[mode]}: {len(contest.case.pairs)} rows, whatever is tried out at the start included"
    return f"{MODES[mode]}: {contest.iterations} after one to warm up"


def _cells(contest: Contest, mode: str, name: str, timing: Timing) -> tuple[str, ...]:
    return (
        name,
        spread(timing.seconds_per_pair),
        f"{contest.ratio(mode, name):.2f} x",
        "unknown" if timing.peak_memory is None else f"{timing.peak_memory / 1e6:.4g}",
        f"{timing.peak_resident / 1e6:.4g}",
        f"{timing.loss:.4g}",
        timing.dtype,
        timing.blas or "MLX's own",
    )


def as_json(contests: Sequence[Contest], failures: Mapping[str, str]) -> str:
    """Return everything that was measured, and what could not be, by case."""
    return figures_as_json([_figures(contest) for contest in contests], failures)


def _figures(contest: Contest) -> dict[str, Any]:
    return {
        "name": contest.case.name,
        "rows": len(contest.case.pairs),
        "settings": vars(contest.case.settings),
        "rounds": contest.rounds,
        "iterations": contest.iterations,
        "modes": {
            mode: {name: asdict(timing) | {"ratio": contest.ratio(mode, name)} for name, timing in timings.items()}
            for mode, timings in contest.timings.items()
        },
        "notes": list(contest.notes),
        "failures": contest.failures,
        "stopped": contest.stopped,
    }


def draw(contests: Sequence[Contest], file: Path) -> None:
    """Draw a bar for each trainer: a row of panels for each case and mode, time on the left, memory on the right."""
    panels = [(contest, mode) for contest in contests for mode in contest.timings]
    figure, axes = pyplot().subplots(
        len(panels), len(_BARS), figsize=(9, 1.9 * len(panels)), layout="constrained", squeeze=False
    )
    for row, (contest, mode) in zip(axes, panels, strict=True):
        timings = contest.timings[mode]
        names = [*timings][::-1]
        sizes = {
            "seconds": [median(timings[name].seconds_per_pair) for name in names],
            "memory": [timings[name].peak_resident / 1e9 for name in names],
        }
        for panel, (kind, label) in zip(row, _BARS.items(), strict=True):
            bars = panel.barh(names, sizes[kind], color=[COLOURS[name] for name in names])
            panel.bar_label(bars, fmt="%.3g", padding=3)
            panel.margins(x=0.15)
            panel.set_xlabel(label)
        row[0].set_title(f"{contest.case.name}\n{heading(contest, mode)}", fontsize=8, loc="left")
    save(figure, file)
