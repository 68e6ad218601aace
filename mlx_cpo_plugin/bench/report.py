"""Comparisons as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.bench.compare import Comparison, GradientDifferences, TrainerResult
from mlx_cpo_plugin.bench.job import HOST, PLUGIN

_LABEL, _COLUMN = 32, 28


def table(comparison: Comparison) -> str:
    """Return one case: a line for each figure of both trainers with their ratio, and notes below."""
    host, plugin = comparison.host, comparison.plugin
    lines = [
        comparison.case.name,
        _line("", (HOST, PLUGIN), "ratio"),
        _seconds("seconds per pair", host.seconds_per_pair, plugin.seconds_per_pair, comparison.speed_ratio),
        _seconds(
            "processor seconds per pair",
            host.processor_seconds_per_pair,
            plugin.processor_seconds_per_pair,
            comparison.processor_ratio,
        ),
        _line("peak memory, MB", _in_megabytes(host.peak_memory, plugin.peak_memory), f"{comparison.memory_ratio:.2f}"),
        _line(
            "peak of the process, MB",
            _in_megabytes(host.peak_resident, plugin.peak_resident),
            f"{plugin.peak_resident / host.peak_resident:.2f}",
        ),
        _counts("tokens through layers, a pair", host, plugin, "backbone_tokens"),
        _counts("positions through head, a pair", host, plugin, "head_positions"),
    ]
    if comparison.least_work is not None:
        rates = [_useful_gigaflops(comparison.least_work, result) for result in (host, plugin)]
        lines.append(_line("needed GFLOP/s", [f"{rate:.1f}" for rate in rates], f"{rates[1] / rates[0]:.2f}"))
        lines.append(
            f"  a pair needs {comparison.least_work / 1e9:.3g} GFLOP, its products inside attention not counted"
        )
    lines.append(_gradients(comparison.gradients))
    lines.append(
        f"  alternating repeats: {comparison.repeats}, iterations of each: {comparison.iterations}; median (range)"
    )
    lines.append(f"  processor: {processor_name()}")
    lines += [f"  note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return one line for each case: the ratios and how far the plugin's gradient is from the reference."""
    width = max(len(comparison.case.name) for comparison in comparisons)
    lines = [f"{'':{width}}  {'speed':>8}{'memory':>8}{'tokens':>8}{'head':>8}{'gradient':>10}"]
    for comparison in comparisons:
        host, plugin = comparison.host, comparison.plugin
        tokens = _share(plugin.backbone_tokens, host.backbone_tokens)
        positions = _share(plugin.head_positions, host.head_positions)
        lines.append(
            f"{comparison.case.name:{width}}  {comparison.speed_ratio:>7.2f}x{comparison.memory_ratio:>8.2f}"
            f"{tokens:>8}{positions:>8}{_or_unknown(comparison.gradients.plugin):>10}"
        )
    return "\n".join(lines)


def as_json(comparisons: Sequence[Comparison], failures: Mapping[str, str]) -> str:
    """Return everything that was measured, and what could not be, by case."""
    return figures_as_json([_figures(comparison) for comparison in comparisons], failures)


def figures_as_json(cases: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> str:
    """Return the figures of cases, where they were measured, and what failed."""
    return json.dumps({"environment": environment(), "cases": cases, "failures": dict(failures)}, indent=2)


def environment() -> dict[str, str]:
    """Return versions, processor and device."""
    import mlx.core as mx

    from mlx_cpo_plugin.commands.doctor import check_backend

    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-lm-lora")}
    backend = {finding.name: finding.detail for finding in check_backend()}
    return {
        **versions,
        "mlx-cpo-plugin": __version__,
        "processor": processor_name(),
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        **backend,
    }


@cache
def processor_name() -> str:
    """Return what the processor is called, with its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or name
    elif cpuinfo.exists():
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {
        "name": comparison.case.name,
        "rows": len(comparison.case.pairs),
        "settings": vars(comparison.case.settings),
        "model": comparison.case.model_config,
        "repeats": comparison.repeats,
        "iterations": comparison.iterations,
        "mean_lengths": comparison.lengths,
        "least_work_per_pair": comparison.least_work,
        "host": _trainer_figures(comparison.host, comparison.least_work),
        "plugin": _trainer_figures(comparison.plugin, comparison.least_work),
        "speed_ratio": comparison.speed_ratio,
        "processor_ratio": comparison.processor_ratio,
        "memory_ratio": comparison.memory_ratio,
        "gradient_difference": asdict(comparison.gradients),
        "notes": list(comparison.notes),
    }


def _trainer_figures(result: TrainerResult, least_work: float | None) -> dict[str, Any]:
    per_pair = result.seconds_per_pair
    return {
        "seconds_per_pair": {"median": median(per_pair), "least": min(per_pair), "most": max(per_pair)},
        "seconds": result.seconds,
        "processor_seconds": result.processor_seconds,
        "pairs": result.pair_counts,
        "peak_memory": result.peak_memory,
        "peak_resident": result.peak_resident,
        "counted_pairs": result.counted_pairs,
        "backbone_tokens": result.backbone_tokens,
        "head_positions": result.head_positions,
        "needed_gigaflops_per_second": None if least_work is None else _useful_gigaflops(least_work, result),
    }


def _useful_gigaflops(least_work: float, result: TrainerResult) -> float:
    seconds = sum(map(sum, result.seconds))
    return least_work * sum(result.pair_counts) * len(result.seconds) / seconds / 1e9


def _line(label: str, of_trainers: Sequence[str], ratio: str) -> str:
    columns = "".join(f"{text:>{_COLUMN}}" for text in of_trainers)
    return f"  {label:{_LABEL}}{columns}  {ratio}"


def _seconds(label: str, host: Sequence[float], plugin: Sequence[float], ratio: float) -> str:
    return _line(label, [spread(host), spread(plugin)], f"{ratio:.2f} x as fast")


def spread(values: Sequence[float]) -> str:
    """Return the median, and the range in brackets."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _in_megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:.4g}" for size in sizes]


def _counts(label: str, host: TrainerResult, plugin: TrainerResult, name: str) -> str:
    counts = [getattr(result, name) / result.counted_pairs for result in (host, plugin)]
    return _line(label, [f"{count:.4g}" for count in counts], _share(counts[1], counts[0]))


def _share(count: float, of: float) -> str:
    """A model whose head is none that is watched has no positions counted."""
    return f"{count / of:.2f}" if of else "unknown"


def _gradients(gradients: GradientDifferences) -> str:
    host = "reference" if gradients.host_is_reference else _or_unknown(gradients.host)
    reference = "" if gradients.reference is None else f"relative to {gradients.reference}"
    return _line("gradient differs by", [host, _or_unknown(gradients.plugin)], reference).rstrip()


def _or_unknown(difference: float | None) -> str:
    return "unknown" if difference is None else f"{difference:.1e}"
