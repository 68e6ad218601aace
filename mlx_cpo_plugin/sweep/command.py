"""The arguments of ``mlx-cpo sweep``, and what it writes: the table, the plots and the best configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mlx_cpo_plugin.console import lasting_output
from mlx_cpo_plugin.errors import ConfigError, first_line, named

if TYPE_CHECKING:
    from mlx_cpo_plugin.sweep.plan import Sweep
    from mlx_cpo_plugin.sweep.results import SettingResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("file", type=Path, metavar="SWEEP.YAML", help="base, grid, random, seeds, metric and halve_at")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where runs and results go; by default named after the file"
    )
    parser.add_argument(
        "--no-more-runs", action="store_true", help="only list the runs and show the results of those that are finished"
    )


def run_sweep(chosen: argparse.Namespace) -> int:
    """Do the runs that are not finished yet, and write down what came of all.

    Raises:
        UserError: the file, a setting of a run or its data is at fault, or no run has finished.
    """
    from mlx_cpo_plugin.sweep.plan import read_sweep
    from mlx_cpo_plugin.sweep.results import FINISHED, results_of
    from mlx_cpo_plugin.sweep.runs import carry_out, in_a_process, outcomes_of
    from mlx_cpo_plugin.training.summary import counted

    sweep = read_sweep(chosen.file, chosen.output)
    with lasting_output():  # hours of runs do not end because nobody reads any more
        for note in sweep.notes:
            print(f"note: {note}")
        outcomes = outcomes_of(sweep)
        done = sum(outcome.status == FINISHED for outcome in outcomes.values())
        asked = f"{counted(len(sweep.settings), 'setting')}, {counted(len(sweep.runs), 'run')}"
        print(f"{asked}, {done} finished, in {sweep.output}.")
        for line in _no_longer_asked_for(sweep):
            print(line)
        if not chosen.no_more_runs:
            outcomes = carry_out(sweep, in_a_process, lambda line: print(line, flush=True))
        results = results_of(sweep, outcomes)
        if any(result.finished for result in results):
            _write_results(sweep, results, is_needed=not chosen.no_more_runs)
            return 0
        if chosen.no_more_runs:
            for run in sweep.runs:
                print(f"  {run.name}")
            return 0
    reasons = list(dict.fromkeys(outcome.reason for outcome in outcomes.values() if outcome.reason))
    raise ConfigError(f"No run of {named(str(chosen.file))} has finished; the first failed because: {reasons[0]}")


def _write_results(sweep: Sweep, results: Sequence[SettingResult], is_needed: bool) -> None:
    """Do as :func:`write_results`; where they are not needed, what cannot be written is noted."""
    try:
        write_results(sweep, results)
    except OSError as error:
        path = str(error.filename or sweep.output)
        fault = f"{named(path)} cannot be written ({error.strerror or first_line(error)})"
        if not is_needed:
            print(f"note: {fault}.")
            return
        raise ConfigError(
            f"{fault}; the runs are done: put that right and call it again.", key="output", place=path
        ) from error


def write_results(sweep: Sweep, results: Sequence[SettingResult]) -> None:
    """Print the table, and write it, the plots and the best configuration; beside those that somebody has edited."""
    from mlx_cpo_plugin.atomic_files import replace_whole
    from mlx_cpo_plugin.checkpoints import ADAPTER_FILE
    from mlx_cpo_plugin.marked_text import beside_edited, write_marked
    from mlx_cpo_plugin.report.record import ReportError
    from mlx_cpo_plugin.sweep.plan import varied
    from mlx_cpo_plugin.sweep.plots import draw
    from mlx_cpo_plugin.sweep.results import conclusion, table
    from mlx_cpo_plugin.sweep.runs import BEST, PLOTS, TABLE

    text, sentence = table(sweep, results), conclusion(results, sweep.metric)
    best, best_file = results[0], beside_edited(sweep.output / BEST)
    print(f"\n{text}\n\n{sentence}")
    print(f"Train:   mlx_lm_lora.train --config {quote(str(best_file))}")
    adapter = best.finished[0].folder
    if (adapter / ADAPTER_FILE).exists():  # and not removed since
        print(f"Adapter: {adapter}")
    write_marked(beside_edited(sweep.output / TABLE), f"{text}\n\n{sentence}\n")
    write_marked(best_file, best_config(sweep, best, sentence))
    if not varied(sweep.runs):
        return
    try:
        replace_whole(sweep.output / PLOTS, lambda partial: draw(sweep, results, partial))
        print(f"Plots:   {sweep.output / PLOTS}")
    except ReportError as error:
        print(f"note: {error}")


def best_config(sweep: Sweep, best: SettingResult, sentence: str) -> str:
    """Return the text of the base with the options of the best setting."""
    from mlx_cpo_plugin.settings.yaml_settings import dump_settings
    from mlx_cpo_plugin.sweep.plan import with_options

    values = with_options(sweep.base, best.outcomes[0].run.options)
    return f"# {sentence}\n# Of {len(sweep.settings)} settings in {named(str(sweep.file))}.\n{dump_settings(values)}"


def _no_longer_asked_for(sweep: Sweep) -> list[str]:
    """Return a line on runs in the folder that the sweep file, or its rows, has changed away from."""
    from mlx_cpo_plugin.sweep.runs import RUNS
    from mlx_cpo_plugin.training.summary import counted

    digests = {run.digest for run in sweep.runs}
    others = [path for path in sweep.output.glob(f"{RUNS}/*") if path.name.rpartition("-")[2] not in digests]
    if not others:
        return []
    return [f"note: left out: {counted(len(others), 'run')} of an earlier state of the file or its rows."]
