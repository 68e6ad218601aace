"""Plots in files, drawn by matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_cpo_plugin.bench.job import HOST, PLUGIN, TRL, UNSLOTH
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.json_output import check_writable

FORMATS = (".svg", ".png")
COLOURS = {PLUGIN: "tab:blue", HOST: "tab:gray", TRL: "tab:orange", UNSLOTH: "tab:green"}
MARKERS = {PLUGIN: "o", HOST: "s", TRL: "^", UNSLOTH: "D"}


def check_plot_file(option: str, file: Path) -> None:
    """Find out before the measurements whether a plot can be drawn into ``file``.

    Raises:
        ConfigError: matplotlib is missing, nothing can be written there, or the name has another ending.
    """
    if file.suffix not in FORMATS:
        raise ConfigError(f"{option} {file}: the plot is written as {' or '.join(FORMATS)}; give a name that ends so.")
    check_writable(option, file)
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{option} needs matplotlib to draw its plot; run pip install 'mlx-cpo-plugin[bench]'.")


def pyplot() -> ModuleType:
    """Return matplotlib's interface, set so that the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "mlx-cpo bench", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path) -> None:
    """Write a figure and release it."""
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot().close(figure)
