"""The arguments of ``mlx-cpo bench``, and what they start."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cpo_plugin.bench.job import HOST, TRL, UNSLOTH
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.json_output import STANDARD_OUTPUT, check_json, write_json
from mlx_cpo_plugin.termination import stopped_by_termination

if TYPE_CHECKING:
    from mlx_cpo_plugin.bench.cases import Case

DEFAULT_ITERATIONS = 3
DEFAULT_REPEATS = 3
# Pairs of the epoch over which trainers are compared.
ROWS_OF_EPOCH = 48
TRAINERS = {"host": HOST, "trl": TRL, "unsloth": UNSLOTH}
# Trainers with an environment of their own -> what makes it.
PEERS = {
    "trl": 'pip install torch "trl==1.16.*" peft',
    "unsloth": "pip install mlx-lm and pip install --no-deps unsloth_zoo",
}
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
        "qwen3, bf16, 4bit",
    )
    work.add_argument(
        "--suite", action="store_true", help="the standard cases; those with real rows need --model and --data"
    )
    work.add_argument(
        "--growth",
        type=Path,
        metavar="FILE.svg",
        help="double rows, prompt, answers, batch and layers in turn, and plot the cost; figures go beside it as JSON",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="with --suite: the model for real rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="with --suite: the folder of real rows")
    parser.add_argument(
        "--against",
        type=_trainers,
        metavar=",".join(TRAINERS),
        help="compare with these: on the same micro-batches, and over an epoch that each batches as it does by default",
    )
    for name in PEERS:
        parser.add_argument(
            f"--{name}-python",
            type=Path,
            metavar="PATH",
            help=f"with --against {name}: the Python of an environment made by {PEERS[name]}",
        )
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="with --against: draw the figures as bars")
    parser.add_argument(
        "--rows",
        type=_count,
        metavar="N",
        help=f"use the first N pairs (a shape: draw N); with --against {ROWS_OF_EPOCH} unless given",
    )
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


def _trainers(text: str) -> list[str]:
    names = text.replace(" ", "").split(",")
    if unknown := [name for name in names if name not in TRAINERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(TRAINERS)}")
    return [name for name in TRAINERS if name in names]


@stopped_by_termination()  # which ends the process that is being measured, too
def run_bench(chosen: argparse.Namespace) -> int:
    """Measure what the arguments ask for, and print tables or JSON; returns 1 where a case could not be measured.

    Raises:
        UserError: the arguments, the configuration or its data are at fault.
    """
    from mlx_cpo_plugin.bench.growth import SMALL_SHAPE, run_growth
    from mlx_cpo_plugin.bench.plots import check_plot_file

    if not chosen.suite and (chosen.model or chosen.data):
        raise ConfigError("--model and --data belong to --suite; a configuration file names its own.")
    check_json(chosen.json)
    if chosen.chart is not None:
        if chosen.against is None or chosen.growth is not None:
            raise ConfigError("--chart draws what --against compares on a case; give --against, and not --growth.")
        check_plot_file("--chart", chosen.chart)
    pythons = _pythons(chosen)
    progress = Progress()
    if chosen.growth is not None:
        unread = {"--json": chosen.json, "--rows": chosen.rows, "--iters": chosen.iters != DEFAULT_ITERATIONS}
        if option := next((option for option, given in unread.items() if given), ""):
            raise ConfigError(f"--growth takes no {option}: its sizes are its own, and its figures go beside the plot.")
        trainers = [TRAINERS[name] for name in chosen.against or ["host"]]
        run_growth(chosen.growth, SMALL_SHAPE, trainers, pythons, repeats=chosen.repeats, say=progress.say)
        progress.clear()
        print(f"Wrote {chosen.growth} and {chosen.growth.with_suffix('.json')}.")
        return 0
    if chosen.against is not None:
        return _hold_contests(chosen, pythons, progress)
    return _compare_all(chosen, progress)


def _pythons(chosen: argparse.Namespace) -> dict[str, str]:
    """Return the Python of each trainer that has an environment of its own, and is compared with."""
    pythons = {}
    for name, installation in PEERS.items():
        python, wanted = getattr(chosen, f"{name}_python"), name in (chosen.against or ())
        if wanted and python is None:
            raise ConfigError(
                f"--against {name} needs --{name}-python PATH: the Python of an environment made by {installation}."
            )
        if python is not None and not wanted:
            raise ConfigError(f"--{name}-python belongs to --against {name}; give both.")
        if python is not None and shutil.which(python) is None:
            raise ConfigError(f"--{name}-python {python} is no program; give the path of a Python.")
        if python is not None:
            pythons[TRAINERS[name]] = str(python)
    return pythons


def _hold_contests(chosen: argparse.Namespace, pythons: dict[str, str], progress: Progress) -> int:
    from mlx_cpo_plugin.bench import against_report
    from mlx_cpo_plugin.bench.against import Contest, hold_contest
    from mlx_cpo_plugin.bench.runs import MeasurementError

    contests: list[Contest] = []
    failures: dict[str, str] = {}
    trainers = [TRAINERS[name] for name in chosen.against]
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-bench-") as folder:
        for case in _shared_cases(chosen, bool(pythons), Path(folder)):
            try:
                contest = hold_contest(
                    case, trainers, pythons, iterations=chosen.iters, rounds=chosen.repeats, say=progress.say
                )
            except MeasurementError as error:
                failures[case.name] = str(error)
                progress.clear()
                print(f"error: {case.name}: {error}", file=sys.stderr)
                continue
            contests.append(contest)
            progress.clear()
            if chosen.json != STANDARD_OUTPUT:
                print(against_report.table(contest) + "\n", flush=True)
            for failure in contest.failures.values():
                print(f"error: {case.name}: {failure}", file=sys.stderr)
            if contest.stopped:
                break
        if chosen.json is not None:
            write_json(chosen.json, against_report.as_json(contests, failures))
        if chosen.chart is not None and contests:
            against_report.draw(contests, chosen.chart)
            print(f"Wrote {chosen.chart}.", file=sys.stderr)
    if contests and contests[-1].stopped:
        raise KeyboardInterrupt  # now that its figures are out
    return 1 if failures or any(contest.failures for contest in contests) else 0


def _shared_cases(chosen: argparse.Namespace, in_folder: bool, folder: Path) -> Sequence[Case]:
    """Return what trainers of several projects are measured on."""
    from mlx_cpo_plugin.bench import cases, shapes
    from mlx_cpo_plugin.bench.random_model import case_in_folder

    rows = chosen.rows or ROWS_OF_EPOCH
    if chosen.suite:
        return cases.suite(chosen.model, chosen.data, rows, shared=True)
    if chosen.config:
        return [cases.case_of_config(chosen.config, rows, shared=True)]
    shape = shapes.parse_shape(chosen.shape)
    return [case_in_folder(shape, rows, folder) if in_folder else cases.case_of_shape(shape, rows)]


def _compare_all(chosen: argparse.Namespace, progress: Progress) -> int:
    from mlx_cpo_plugin.bench import report
    from mlx_cpo_plugin.bench.compare import Comparison, compare
    from mlx_cpo_plugin.bench.runs import MeasurementError

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
    if chosen.json is not None:
        write_json(chosen.json, report.as_json(comparisons, failures))
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
