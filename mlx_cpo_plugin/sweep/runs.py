"""Carry out the runs of a sweep one after the other, each a process like any other run; a killed sweep goes on."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints.run_folder import only_run_in, refuse_if_in_use
from mlx_cpo_plugin.console import last_lines
from mlx_cpo_plugin.errors import ConfigError, first_line, named
from mlx_cpo_plugin.report.record import Row, number
from mlx_cpo_plugin.settings.yaml_settings import dump_settings
from mlx_cpo_plugin.sweep.plan import PlannedRun, Sweep, described
from mlx_cpo_plugin.sweep.results import (
    FAILED,
    FINISHED,
    RESULT,
    Outcome,
    lost_validation,
    read_result,
    record_of,
    score_of,
    validations_of,
    write_result,
)
from mlx_cpo_plugin.termination import stopped_by_termination

RUNS, CONFIG, CONSOLE = "runs", "config.yaml", "console.log"
BEST, TABLE, PLOTS = "best.yaml", "table.md", "plots.svg"
# Seconds between two looks at what a run has validated, or at whether its folder is free.
LOOK_EVERY = 0.5
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)

Launch = Callable[[Path, Callable[[], bool]], tuple[int, str]]
"""``(folder of the run, whether it has gone far enough) -> (exit code, last line on its console)``."""


def folder_of(sweep: Sweep, run: PlannedRun) -> Path:
    """Return the folder of a run: one with its digest, if there is one, whatever it was called."""
    runs = sweep.output / RUNS
    return next(iter(sorted(runs.glob(f"*-{run.digest}"))), runs / run.name)


def carry_out(sweep: Sweep, launch: Launch, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Do the runs that are not finished yet, and return how each stands, by its digest.

    Runs that failed are tried again. With ``halve_at`` all runs go to the first of these points, and only those of the
    better half of the settings from there to the next one.

    Raises:
        ConfigError: another sweep is writing to the folder, or it cannot be written to.
    """
    failed: set[str] = set()
    _refuse_what_is_in_the_way(sweep)
    with _only_sweep_in(sweep.output):
        for number, part in enumerate((*sweep.halve_at, 1.0)):
            given_up = runs_given_up(sweep, sweep.halve_at[:number])
            if number:
                at = sweep.halve_at[number - 1]
                say(f"After {at:.0%} of a run {len(given_up)} of {len(sweep.runs)} are given up.")
            going_on = [run for run in sweep.runs if run.digest not in {*given_up, *failed}]
            for place, run in enumerate(going_on, 1):
                try:
                    went_well = _advance(sweep, run, part, launch, say, f"{place} of {len(going_on)}")
                except OSError as error:
                    raise _unwritable(error, folder_of(sweep, run)) from error
                if not went_well:
                    failed.add(run.digest)
    return outcomes_of(sweep)


def _refuse_what_is_in_the_way(sweep: Sweep) -> None:
    folders = [sweep.output / RUNS, *(folder_of(sweep, run) for run in sweep.runs)]
    files = [folder / name for folder in folders[1:] for name in (CONFIG, CONSOLE, RESULT)]
    files += [sweep.output / name for name in (TABLE, BEST, PLOTS)]
    wrong = [(path, "folder") for path in folders if os.path.lexists(path) and not path.is_dir()]
    wrong += [(path, "file") for path in files if path.is_dir() and not path.is_symlink()]  # links are replaced
    if wrong:
        path, kind = wrong[0]
        raise ConfigError(
            f"{named(str(path))} is there, and no {kind}: move it, or give another --output.",
            key="output",
            place=str(path),
        )


@contextmanager
def _only_sweep_in(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(only_run_in(folder))
        except ConfigError as error:
            cause = error.__cause__
            if isinstance(cause, OSError):
                raise _unwritable(cause, folder) from error
            raise ConfigError(
                f"Another sweep is writing to {named(str(folder))}; wait until it ends, or give another --output.",
                key="output",
                place=str(folder),
            ) from error
        yield


def _unwritable(error: OSError, folder: Path) -> ConfigError:
    """Return what to do about a file of a run that cannot be written."""
    path = str(error.filename or folder)
    return ConfigError(
        f"{named(path)} cannot be written ({error.strerror or first_line(error)}); free space, or give another "
        "--output. What has finished is kept.",
        key="output",
        place=path,
    )


def outcomes_of(sweep: Sweep) -> dict[str, Outcome]:
    """Return how each run stands, by its digest."""
    reasons = runs_given_up(sweep, sweep.halve_at)
    return {run.digest: Outcome.of(run, folder_of(sweep, run), reasons.get(run.digest, "")) for run in sweep.runs}


def runs_given_up(sweep: Sweep, parts: Sequence[float]) -> dict[str, str]:
    """Return the runs that are not continued after these parts of a run, as far as all have got there, and why."""
    given_up: dict[str, str] = {}
    for part in parts:
        settings: dict[str, list[Outcome]] = {}
        for run in sweep.runs:
            folder = folder_of(sweep, run)
            if run.digest in given_up:
                continue
            result, row = read_result(folder), validation_at(folder, part)
            if result.get("status") == FAILED and result.get("before_part", 0.0) <= part:
                continue  # one that failed later was among those compared here
            if row is None:
                return given_up
            settings.setdefault(run.setting, []).append(Outcome(run, folder, after=row))
        ordered = sorted(settings.values(), key=lambda outcomes: score_of(outcomes, sweep.metric), reverse=True)
        for outcome in (outcome for outcomes in ordered[math.ceil(len(ordered) / 2) :] for outcome in outcomes):
            given_up[outcome.run.digest] = f"worse than half of the settings after {part:.0%} of the run"
    return given_up


def _advance(
    sweep: Sweep, run: PlannedRun, part: float, launch: Launch, say: Callable[[str], None], place: str
) -> bool:
    """Train a run as far as ``part`` of it, unless it is there already; return whether that went well."""
    folder = folder_of(sweep, run)
    if read_result(folder).get("status") == FINISHED or (part < 1 and validation_at(folder, part)):
        return True
    say(f"Run {place}: {described({**run.options, 'seed': run.seed})} ...")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)  # that it failed once
    values = {**run.values, "adapter_path": str(folder)}
    replace_whole(folder / CONFIG, lambda partial: partial.write_text(dump_settings(values), encoding="utf-8"))
    started = time.monotonic()
    code, last_line = launch(folder, lambda: part < 1 and validation_at(folder, part) is not None)
    paused = code in _STOPPED and part < 1 and validation_at(folder, part)
    lost = "" if code else lost_validation(folder)
    if lost or (code and not paused):
        reason = lost or last_line or f"exit code {code}"
        write_result(folder, run, FAILED, reason, before=part)
        say(f"  failed: {reason} (see {folder / CONSOLE})")
        return False
    if code == 0:
        write_result(folder, run, FINISHED)
    outcome = Outcome.of(run, folder)
    figure = f"{outcome.word}, accuracy {outcome.figure('accuracy'):.1%}, " if outcome.after else ""
    say(f"  {FINISHED if code == 0 else 'paused'}: {figure}{time.monotonic() - started:.0f} s")
    return True


def validation_at(folder: Path, part: float) -> Row | None:
    """Return the first validation of a run after ``part`` of its iterations; None where it has none yet.

    Of a run that its own validations have stopped before, it is the one that it is judged by in the end.
    """
    record, row = record_of(folder), None
    if record is not None and record.iters:
        least = max(math.ceil(part * record.iters), 2)
        row = next((row for row in record.valid if number(row, "iteration") >= least), None)
    if row is None and read_result(folder).get("status") == FINISHED:
        return validations_of(folder)[1]
    return row


def in_a_process(folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
    """Run the host's own command on the configuration in a folder; see :data:`Launch`.

    What ends this process lets the run save and stop. A run that an earlier sweep has left behind is waited for.
    """
    with (folder / CONSOLE).open("ab") as console, (folder / CONSOLE).open("ab") as lock, stopped_by_termination():
        _wait_until_free(folder, lock)
        began = console.seek(0, os.SEEK_END)
        command = [sys.executable, "-m", "mlx_cpo_plugin", "train", "--config", str(folder / CONFIG)]
        # In a session of its own Ctrl-C does not reach it twice, which would end it before it has saved.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        try:
            while child.poll() is None:
                if is_far_enough():
                    child.terminate()
                    child.wait()
                    break
                try:
                    child.wait(LOOK_EVERY)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    said = last_lines(folder / CONSOLE, began)
    return child.returncode, said[-1].strip().removeprefix("error: ") if said else ""


def _wait_until_free(folder: Path, lock: IO[bytes]) -> None:
    """Wait for a run that an earlier sweep has left behind, and lock a file for the one of this sweep.

    The run inherits that lock, but for what it starts itself, and has it until it ends, whatever becomes of this
    process; the folder's own lock it takes once its model is loaded.
    """
    told = False
    while True:
        try:
            if _locks(lock):
                return refuse_if_in_use(folder)
        except ConfigError as error:
            if error.place or not os.access(folder, os.W_OK):  # it is no other run that is in the way
                raise
        if not told:
            print(
                f"  A run that an earlier sweep has started is still writing to {folder}; waiting for it.", flush=True
            )
        told = True
        time.sleep(LOOK_EVERY)


def _locks(file: IO[bytes]) -> bool:
    """Whether a file could be locked, or locks are none that this file system has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True
