"""Starts the measured processes of a case, one after the other, each trainer in its own fresh ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx_cpo_plugin
from mlx_cpo_plugin import blas
from mlx_cpo_plugin.activation.hook_state import DISABLE_VARIABLE
from mlx_cpo_plugin.bench.cases import Case, save_pairs
from mlx_cpo_plugin.bench.job import EPOCH, HOST, PLUGIN, REFERENCE, TIME, TRL, UNSLOTH, Job, Measurement
from mlx_cpo_plugin.bench.recording import PROGRESS_MARK
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.kernels import library

# Trainers that have an environment of their own -> the module that runs there.
PEER_WORKERS = {TRL: "trl_worker", UNSLOTH: "unsloth_worker"}
_LINES_KEPT = 30

Say = Callable[[str], None]
Batches = Sequence[Sequence[int]]


class MeasurementError(UserError):
    """A measured process did not finish."""


class Runs:
    """The processes of one case and the folder that they share.

    Attributes:
        host_changes: settings that mlx-lm-lora gets otherwise than the case says.
        stopped: whether Ctrl-C ended a comparison whose figures up to there are of use.
    """

    def __init__(self, case: Case, folder: Path, say: Say, pythons: Mapping[str, str] | None = None) -> None:
        """Take the ``pythons`` of trainers that have an environment of their own, by trainer."""
        self.case = case
        self.folder = folder
        self.say = say
        self.pythons = pythons or {}
        self.host_changes: dict[str, object] = {}
        self.stopped = False
        save_pairs(folder / "pairs.npz", case.pairs)

    def folder_of(self, task: str, trainer: str) -> Path:
        """Return where a process finds its job and leaves its results."""
        return self.folder / f"{trainer}, {task}"

    def run(self, task: str, trainer: str, batches: Batches, **changes: object) -> Measurement:
        """Measure one process, with ``changes`` in its settings; a ``task`` begins with one of those of a job.

        Raises:
            MeasurementError: the process failed; says which and why.
        """
        self.work(task, trainer, batches, **((self.host_changes if trainer == HOST else {}) | changes))
        return Measurement.load(self.folder_of(task, trainer))

    def work(self, task: str, trainer: str, batches: Batches, **changes: object) -> None:
        """Run one process to its end, telling how far it is; what it found lies in its folder."""
        folder = self.folder_of(task, trainer)
        never = len(batches) + 1
        settings = vars(self.case.settings) | {"iters": len(batches), "steps_per_eval": never, "save_every": never}
        kind = task.split()[0]
        Job(
            trainer=trainer,
            task=kind,
            settings=settings | changes,
            model_config=self.case.model_config,
            batches=batches,
            pairs_file=str(self.folder / "pairs.npz"),
            rows=self._rows(kind, batches) if trainer in PEER_WORKERS else (),
        ).save(folder)
        title = f"{self.case.name}: {folder.name}"
        steps, step = (len(batches[0]), "pair") if trainer == REFERENCE else (len(batches), "iteration")
        self.say(title)
        run_worker(
            [*self._command(trainer), str(folder)],
            self._environment(trainer),
            lambda finished: self.say(f"{title}, {step} {finished} of {steps}"),
        )

    def time_in_turn(
        self,
        trainers: Sequence[str],
        batches: Batches,
        repeats: int,
        task: str = TIME,
        failures: dict[str, str] | None = None,
    ) -> dict[str, list[Measurement]]:
        """Measure each trainer ``repeats`` times, in turn.

        With ``failures``, others that fail go in there, and after Ctrl-C what was measured in whole rounds is returned:
        of the first one, all trainers up to there.

        Raises:
            MeasurementError: a process of this project's trainer failed, or one at all without ``failures``; says why.
        """
        timings: dict[str, list[Measurement]] = {trainer: [] for trainer in trainers}
        try:
            for repeat in range(1, repeats + 1):
                for trainer in [*timings]:
                    try:
                        timings[trainer].append(self.run(f"{task} {repeat} of {repeats}", trainer, batches))
                    except MeasurementError as error:
                        if failures is None or trainer == PLUGIN:
                            raise
                        failures[trainer] = str(error)
                        del timings[trainer]
        except KeyboardInterrupt:
            if failures is None:
                raise
            self.stopped = True
        measured = {trainer: rounds for trainer, rounds in timings.items() if rounds}
        whole = min(map(len, measured.values()), default=0)
        return {trainer: rounds[:whole] for trainer, rounds in measured.items()}

    def _rows(self, kind: str, batches: Batches) -> Sequence[Mapping[str, object]]:
        """The rows of the batches in their order, or all of them for a trainer that draws its own batches."""
        if kind == EPOCH:
            return self.case.rows
        return [self.case.rows[index] for batch in batches for index in batch]

    def _command(self, trainer: str) -> list[str]:
        module = PEER_WORKERS.get(trainer, "worker")
        return [self.pythons.get(trainer, sys.executable), "-m", f"mlx_cpo_plugin.bench.{module}"]

    def _environment(self, trainer: str) -> dict[str, str]:
        environment = dict(os.environ)
        # A few iterations stand for a long run: with compiled kernels, and for every trainer with all cores.
        environment.setdefault(library.VARIABLE, library.ALWAYS)
        if not any(map(environment.get, blas.THREAD_VARIABLES)):
            environment["OPENBLAS_NUM_THREADS"] = str(blas.usable_cores())
        if trainer == HOST:
            environment[DISABLE_VARIABLE] = "1"
        if trainer in PEER_WORKERS:
            # Shows this package alone, and nothing that is installed beside it.
            shown = self.folder / "shown"
            shown.mkdir(exist_ok=True)
            if not (shown / mlx_cpo_plugin.__name__).exists():
                (shown / mlx_cpo_plugin.__name__).symlink_to(Path(mlx_cpo_plugin.__file__).parent)
            environment["PYTHONPATH"] = str(shown)
            blas.use_fast_blas()
            if used := blas.in_use():
                environment[blas.VARIABLE] = blas.NONE if used.is_reference else used.file
        return environment


def run_worker(command: Sequence[str], environment: dict[str, str], progress: Callable[[str], None]) -> None:
    """Run a command whose last word is the folder of its job, passing on each number of finished steps.

    Raises:
        MeasurementError: the process failed or was killed.
    """
    name = Path(command[-1]).name
    kept: deque[str] = deque(maxlen=_LINES_KEPT)
    with ExitStack() as stack:
        with _sigterm_held():
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
            stack.push(lambda kind, *_: process.kill() if kind else None)
        for line in process.stdout or ():
            if line.startswith(PROGRESS_MARK):
                progress(line.removeprefix(PROGRESS_MARK).strip())
            elif line.strip():
                kept.append(line.strip())
    if process.returncode:
        raise MeasurementError(f"{name} {_reason(process.returncode, kept)}.")


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Hold SIGTERM back until the context ends: while a process is started, it would leave one that nobody knows of."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(came[0])


def _reason(returncode: int, lines: Sequence[str]) -> str:
    if returncode < 0:
        return f"was ended by signal {-returncode}, most likely out of memory; use shorter rows or a smaller batch"
    return f"failed with exit code {returncode}: {lines[-1].rstrip('.') if lines else 'it printed nothing'}"
