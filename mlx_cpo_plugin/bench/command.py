"""The arguments of ``mlx-cpo bench``, and what they start."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mlx_cpo_plugin.errors import ConfigError

if TYPE_CHECKING:
    from mlx_cpo_plugin.bench.cases import Case

DEFAULT_ITERATIONS = 3
DEFAULT_REPEATS = 3
STANDARD_OUTPUT = "-"
SECONDS_BETWEEN_LINES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--config", type=Path, metavar="FILE", help="a training configuration file, with its data")
    work.add_argument(
        "--shape",
        metavar="P256,C128,R96,B2",
        help="random pairs and weights: tokens of prompt (P), chosen (C) and rejected (R) answer, pairs of a batch "
        "(B), and, if wanted, vocabulary (V), hidden size (H), layers (L), long for efficient_long_context, llama or "
        "qwen3",
    )
    work.add_argument(
        "--suite", action="store_true", help="the standard cases; those with real rows need --model and --data"
    )
    work.add_argument(
        "--growth",
        type=Path,
        metavar="FILE.svg",
        help="double rows, prompt, answers and batch in turn and plot the cost; the figures go next to it as JSON",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="with --suite: the model for real rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="with --suite: the folder of real rows")
    parser.add_argument("--rows", type=_count, metavar="N", help="use the first N pairs (a shape: draw N)")
    parser.add_argument(
        "--iters",
        type=_count,
        default=DEFAULT_ITERATIONS,
        metavar="N",
        help="timed iterations per process, after one warm-up iteration (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=_count,
        default=DEFAULT_REPEATS,
        metavar="N",
        help="processes of each trainer, alternating (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help=f"write all figures there; {STANDARD_OUTPUT} prints them instead"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_bench(chosen: argparse.Namespace) -> int:
    """Measure what the arguments ask for, and print tables or JSON; returns 1 where a case could not be measured.

    Raises:
        UserError: the arguments, the configuration or its data are at fault.
    """
    from mlx_cpo_plugin.bench.growth import SMALL_SHAPE, run_growth

    if not chosen.suite and (chosen.model or chosen.data):
        raise ConfigError("--model and --data belong to --suite; a configuration file names its own.")
    if chosen.json not in (None, STANDARD_OUTPUT) and not Path(chosen.json).parent.is_dir():
        raise ConfigError(f"--json {chosen.json}: there is no folder {Path(chosen.json).parent}; make it first.")
    signal.signal(signal.SIGTERM, _end)
    progress = Progress()
    if chosen.growth is not None:
        run_growth(chosen.growth, SMALL_SHAPE, chosen.repeats, progress.say)
        progress.clear()
        print(f"Wrote {chosen.growth} and {chosen.growth.with_suffix('.json')}.")
        return 0
    return _compare_all(chosen, progress)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by an exception, which ends the process that is being measured, too."""
    raise SystemExit(128 + number)


def _compare_all(chosen: argparse.Namespace, progress: Progress) -> int:
    from mlx_cpo_plugin.bench import report
    from mlx_cpo_plugin.bench.compare import Comparison, MeasurementError, compare

    comparisons: list[Comparison] = []
    failures: dict[str, str] = {}
    for case in _cases(chosen):
        try:
            comparisons.append(compare(case, iterations=chosen.iters, repeats=chosen.repeats, say=progress.say))
        except MeasurementError as error:
            failures[case.name] = str(error)
            progress.clear()
            print(f"error: {case.name}: {error}", file=sys.stderr)
            continue
        progress.clear()
        if chosen.json != STANDARD_OUTPUT:
            print(report.table(comparisons[-1]) + "\n", flush=True)
    if len(comparisons) > 1 and chosen.json != STANDARD_OUTPUT:
        print(report.summary(comparisons))
    if chosen.json == STANDARD_OUTPUT:
        print(report.as_json(comparisons, failures))
    elif chosen.json:
        Path(chosen.json).write_text(report.as_json(comparisons, failures) + "\n", encoding="utf-8")
    return 1 if failures else 0


def _cases(chosen: argparse.Namespace) -> Sequence[Case]:
    from mlx_cpo_plugin.bench import cases, shapes

    if chosen.suite:
        return cases.suite(chosen.model, chosen.data, chosen.rows)
    if chosen.config:
        return [cases.case_of_config(chosen.config, chosen.rows)]
    return [cases.case_of_shape(shapes.parse_shape(chosen.shape), chosen.rows)]


class Progress:
    """Says on standard error what is being measured: one line written over and over, or a line now and then."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.is_terminal = sys.stderr.isatty()
        self.next_line = 0.0

    def say(self, text: str) -> None:
        """Tell what is going on now."""
        seconds = time.perf_counter() - self.started
        line = f"[{seconds:4.0f} s] {text}"
        if self.is_terminal:
            # A line that wraps could not be written over.
            shown = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[2K{shown}", end="", file=sys.stderr, flush=True)
        elif seconds >= self.next_line:
            print(line, file=sys.stderr, flush=True)
            self.next_line = seconds + SECONDS_BETWEEN_LINES

    def clear(self) -> None:
        """Make room for other output."""
        if self.is_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
