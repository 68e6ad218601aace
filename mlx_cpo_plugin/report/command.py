"""The arguments of ``mlx-cpo report``, and the file that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_cpo_plugin.errors import named

FORMATS = (".html", ".png", ".svg")
DEFAULT_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "adapter_paths",
        type=Path,
        nargs="+",
        metavar="ADAPTER_PATH",
        help="folder of a run; several runs give overlaid curves and the settings that differ",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"a page (.html) or its plots (.png, .svg); {DEFAULT_NAME} in the first folder by default",
    )
    parser.add_argument(
        "--comparison",
        type=Path,
        metavar="FILE",
        help="what mlx-cpo compare --json wrote: its measures, and who is better by them, go into the page",
    )


def run_report(chosen: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        ReportError: a folder holds no run, the output cannot be written, or what draws it is missing.
    """
    output = chosen.output or chosen.adapter_paths[0] / DEFAULT_NAME
    write_report(chosen.adapter_paths, output, chosen.comparison)
    print(f"Wrote {output}.")
    return 0


def write_report(folders: Sequence[Path], output: Path, comparison: Path | None = None) -> None:
    """Read the runs in ``folders`` and write a page or plots of them, whole or not at all.

    Raises:
        ReportError: see :func:`run_report`.
    """
    from mlx_cpo_plugin.atomic_files import replace_whole
    from mlx_cpo_plugin.report.page import as_html
    from mlx_cpo_plugin.report.plots import as_png, as_svg
    from mlx_cpo_plugin.report.record import ReportError, RunRecord
    from mlx_cpo_plugin.report.standings import read_measures

    kind = output.suffix.lower()
    if kind not in FORMATS:
        raise ReportError(
            f"--output {named(str(output))}: a report is {', '.join(FORMATS)}; give a name that ends so.",
            key="output",
            allowed=", ".join(FORMATS),
        )
    if comparison is not None and kind != ".html":
        raise ReportError("--comparison goes into a page; give an --output that ends with .html.", key="comparison")
    measures = () if comparison is None else read_measures(comparison)
    records = [RunRecord.read(folder) for folder in folders]
    if kind == ".png":
        content = as_png(records)
    else:
        content = (as_html(records, measures) if kind == ".html" else as_svg(records)).encode("utf-8")
    try:
        replace_whole(output, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise ReportError(
            f"The report {named(str(output))} cannot be written ({error.strerror}); give another --output.",
            key="output",
            place=str(output),
        ) from error
