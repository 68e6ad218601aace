"""What a run reports while it trains: progress bar, console lines, callback, metrics file, and warnings."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar, runtime_checkable

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_cpo_plugin.checkpoints.folder import Checkpoint
from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.training.judge import advice
from mlx_cpo_plugin.training.metrics import MetricsFile, PairMeans
from mlx_cpo_plugin.training.objective import Objective
from mlx_cpo_plugin.training.samples import Sample
from mlx_cpo_plugin.training.state import Resumable
from mlx_cpo_plugin.types import Values
from mlx_cpo_plugin.verdict import Verdict

Item = TypeVar("Item")

# Means by their names in console lines. MLX LoRA Studio looks for the loss and the rewards by the host's names.
_LABELS = {"loss": "loss", "accuracies": "acc", "margins": "margin"}
_TRAIN_LABELS = _LABELS | {"chosen_reward": "chosen_r", "rejected_reward": "rejected_r"}
# As the host's own lines name them, which other programs read.
_VALID_LABELS = {
    "loss": "Val loss",
    "accuracies": "Val accuracy",
    "margins": "Val margin",
    "chosen_reward": "Val chosen reward",
    "rejected_reward": "Val rejected reward",
}
# Micro-batches in each half of the displacement alarm's window, and standard errors that the halves must differ by.
WINDOW = 20
CERTAIN = 3.0
# Characters of an answer on the console.
SHOWN = 60


@runtime_checkable
class ResumableCallback(Protocol):
    """A training callback that continues its own runs, such as those of trackers, when training is resumed.

    ``start`` begins; after ``resume`` it continues from what ``state`` returned, plain values, with ``told``, the kinds
    and iterations of the reports that were made after it.
    """

    def start(self) -> None: ...

    def state(self) -> Values: ...

    def resume(self, state: Values, told: Collection[tuple[str, int]]) -> None: ...


class ProgressReporter(Resumable):
    """Collects what happens between two reports, and reports it on the first rank.

    Callback keys, and names in lines, are those that the host gives them, since tools read them: ``it/s 20.51``.
    """

    remembered = ("means", "gradient_norms", "iterations", "trained_tokens", "optimizer_steps")

    def __init__(self, objective: Objective, callback: TrainingCallback | None, metrics_file: MetricsFile) -> None:
        self.objective = objective
        self.callback = callback
        self.trackers = callback if isinstance(callback, ResumableCallback) else None
        self.stream = own_stream(callback)
        self.metrics_file = metrics_file
        self.is_main = is_first_rank()
        self.trained_tokens, self.optimizer_steps, self.elapsed, self.loop_began = 0, 0, 0.0, 0.0
        self.bar: Any = None
        self._reset()

    def _reset(self) -> None:
        self.means = PairMeans(self.objective)
        self.gradient_norms: list[float] = []
        self.iterations = 0
        self.seconds = 0.0
        self.resumed = time.perf_counter()

    def _seconds(self) -> float:
        """Return the seconds of training since the last report, those before a resume included."""
        return self.seconds + time.perf_counter() - self.resumed

    def iterations_of(self, plan: Iterable[Item], total: int, done: int = 0) -> Iterator[tuple[int, Item]]:
        """Number the plan's items from 1, skip those that are done, and advance a progress bar."""
        rest = islice(plan, done, None)
        live = getattr(sys.stderr, "is_live", True)  # a file or another program gets lines instead
        self.bar = tqdm(rest, total=total, initial=done, desc="Training", disable=not (self.is_main and live))
        if self.elapsed and not self.bar.disable:  # as if it had never been interrupted
            self.bar.initial, self.bar.start_t = 0, self.bar.start_t - self.elapsed
        self.loop_began = self.resumed = time.perf_counter()  # set-up and checks are no training
        yield from enumerate(self.bar, done + 1)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent inside out of the iterations per second."""
        paused = time.perf_counter()
        yield
        self.resumed += time.perf_counter() - paused

    def add(self, losses: mx.array, scores: AnswerScores, tokens: int) -> None:
        """Record a micro-batch: preference losses and scores of its B pairs, and its scored tokens."""
        self.means.add(losses, scores, tokens)

    def count_iteration(self, gradient_norm: float | None) -> None:
        """Record a complete iteration, and the gradient norm of the optimizer step that ended with it, if one did."""
        self.iterations += 1
        self.gradient_norms += [] if gradient_norm is None else [gradient_norm]

    def report_training(self, iteration: int, learning_rate: float, epoch: float) -> None:
        """Report the running means and reset them."""
        seconds = self._seconds()
        means, tokens = self.means.over_ranks()
        self.trained_tokens += tokens
        norms = self.gradient_norms
        self.optimizer_steps += len(norms)
        info = {
            "iteration": iteration,
            **{f"train_{name}": value for name, value in means.items()},
            **({"train_gradient_norm": sum(norms) / len(norms)} if norms else {}),
            "learning_rate": learning_rate,
            "iterations_per_second": self.iterations / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
            "epoch": epoch,
            "optimizer_steps": self.optimizer_steps,
        }
        if self.is_main:
            self.bar.set_postfix({_LABELS[key]: figure(means[key]) for key in ("accuracies", "loss", "margins")})
            norm = f", grad_norm {figure(info['train_gradient_norm'])}" if norms else ""
            tqdm.write(
                f"Iter {iteration}: {_labelled(means, _TRAIN_LABELS)}, lr {learning_rate:.2e}{norm}, "
                f"it/s {figure(info['iterations_per_second'])}, tok/s {info['tokens_per_second']:.0f}, "
                f"peak_mem {figure(info['peak_memory'])} GB"
            )
            self.metrics_file.append("train", info)
        self._reset()
        if self.is_main and self.callback is not None:  # at the end, since it may raise
            self.callback.on_train_loss_report(info)

    def report_validation(
        self,
        iteration: int,
        means: Mapping[str, float],
        seconds: float,
        verdict: Verdict | None = None,
        warning: str | None = None,
        line: str | None = None,
    ) -> None:
        """Report the means over the validation pairs, the verdict on them, and a warning and a line that follow."""
        if not self.is_main:
            return
        info = {**_validation(iteration, means, verdict), "val_time": seconds}
        tqdm.write(f"Iter {iteration}: {_labelled(means, _VALID_LABELS)}, Val took {seconds:.1f} s")
        self.metrics_file.append("valid", info)
        self.warn(warning)
        self.say(line)
        if self.callback is not None:  # at the end, since it may raise
            self.callback.on_val_loss_report(info)

    def report_best(self, iteration: int, means: Mapping[str, float], verdict: Verdict | None) -> None:
        """Repeat in the metrics file the validation whose weights the run ends with."""
        self.metrics_file.append("best", _validation(iteration, means, verdict))

    def report_samples(self, iteration: int, samples: Sequence[Sample], introduce: bool = False) -> None:
        """Report answers to prompts, and the prompts, too, if they are new."""
        if not samples:
            return
        for number, sample in enumerate(samples, 1):
            if introduce:
                self.say(f"Sample {number} ({sample.prompt.source}): {_end_of(sample.prompt.text)}")
            self.say(f"Iter {iteration}: sample {number}: {_one_line(sample.answer)}")
            texts = {"prompt": sample.prompt.text, "answer": sample.answer, "source": sample.prompt.source}
            self.metrics_file.append("sample", {"iteration": iteration, **texts, "ended": sample.ended})
        report = getattr(self.callback, "on_sample_report", None)
        if report is not None:  # at the end, since it may raise
            answers = [{"prompt": sample.prompt.text, "answer": sample.answer} for sample in samples]
            report({"iteration": iteration, "samples": answers})

    def start_trackers(self) -> None:
        """Let the trackers begin their run, or continue it after :meth:`resume_trackers`."""
        if self.trackers is not None:
            self.trackers.start()

    def state(self) -> Values:
        """Return what was collected since the last report, what the run has taken so far, and what it has reported."""
        return {
            **super().state(),
            "seconds": self._seconds(),
            "elapsed": self.elapsed + (time.perf_counter() - self.loop_began if self.bar is not None else 0.0),
            "metrics_rows": self.metrics_file.rows,
            "trackers": None if self.trackers is None else self.trackers.state(),
        }

    def restore(self, state: Values) -> None:
        super().restore(state)
        self.seconds, self.elapsed = state["seconds"], state["elapsed"]
        self.resumed = time.perf_counter()

    def resume(self, metrics: Path, checkpoint: Checkpoint) -> None:
        """Continue after the reports in ``metrics``, a file of the checkpoint's run, that preceded the checkpoint.

        Trackers continue their run if the checkpoint is of this run.
        """
        rows, run_id = checkpoint.values["reporter"]["metrics_rows"], checkpoint.run.id
        told, missing = self.metrics_file.resume(metrics, run_id, rows, checkpoint.iteration)
        self.say(missing)
        if run_id == self.metrics_file.run_id:
            self.resume_trackers(checkpoint, told)

    def resume_trackers(self, checkpoint: Checkpoint, told: Collection[tuple[str, int]] = ()) -> None:
        """Let the trackers continue the runs that they had when a checkpoint of the same run was written."""
        state = checkpoint.values["reporter"]["trackers"]
        if self.trackers is not None and state is not None:
            self.trackers.resume(state, told)

    def warn(self, line: str | None) -> None:
        """Print a warning, if there is one, and write it to the metrics file."""
        if line is not None and self.is_main:
            self.say(f"Warning: {line}")
            self.metrics_file.append("warning", {"text": line})

    def say(self, line: str | None) -> None:
        """Print a line, if there is one, around the progress bar, and to the callback's stream if that is elsewhere."""
        if line is None or not self.is_main:
            return
        tqdm.write(line)
        if self.stream is not None and not _ends_in(sys.stdout, self.stream):
            with suppress(OSError, ValueError):  # like the callback's own lines, it is lost where nobody reads
                print(line, file=self.stream, flush=True)


class DisplacementAlarm(Resumable):
    """Says once, of a run without validation, when margins rise only because both answers become unlikely."""

    remembered = ("means", "told")

    def __init__(self, cpo_alpha: float) -> None:
        self.cpo_alpha = cpo_alpha
        self.means: list[tuple[float, float]] = []
        self.told = False

    def warning(self, iteration: int, scores: AnswerScores) -> str | None:
        """Record a micro-batch; return the warning, if it is due."""
        chosen, rejected = np.array([scores.chosen_logps, scores.rejected_logps], np.float64)
        self.means = [*self.means, (float(chosen.mean()), float((chosen - rejected).mean()))][-2 * WINDOW :]
        if self.told or len(self.means) < 2 * WINDOW:
            return None
        earlier, later = np.array(self.means)[:WINDOW], np.array(self.means)[WINDOW:]
        moved = later.mean(0) - earlier.mean(0)
        error = np.sqrt((earlier.var(0, ddof=1) + later.var(0, ddof=1)) / WINDOW)
        if not (moved[1] > CERTAIN * error[1] and moved[0] < -CERTAIN * error[0]):
            return None
        self.told = True
        return (
            f"Iter {iteration}: the margin rose by {moved[1]:.1f} while the chosen answers' log-prob fell by "
            f"{-moved[0]:.1f} (likelihood displacement); {advice(self.cpo_alpha)}."
        )


def _validation(iteration: int, means: Mapping[str, float], verdict: Verdict | None) -> dict[str, float]:
    report = {} if verdict is None else verdict.report()
    return {"iteration": iteration, **{f"val_{name}": mean for name, mean in means.items()}, **report}


def _one_line(text: str) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def _end_of(prompt: str) -> str:
    """Return the end of a prompt, on one line: what stands first is often the same in all of them."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else f"…{line[1 - SHOWN :]}"


def own_stream(callback: object) -> TextIO | None:
    """Return the stream that a callback, or one that it wraps, prints to; ``None`` where there is none.

    MLX LoRA Studio discards all that a trainer prints, and shows its user what its callback's stream gets.
    """
    while callback is not None:
        stream = getattr(callback, "stream", None)
        if callable(getattr(stream, "write", None)):
            return stream
        callback = getattr(callback, "wrapped_callback", None)
    return None


def _ends_in(stream: object, other: object) -> bool:
    """Whether ``stream`` is ``other``, or passes everything on to it."""
    while stream is not None and stream is not other:
        stream = getattr(stream, "stream", None)
    return stream is other


def _labelled(means: Mapping[str, float], labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label} {figure(means[name])}" for name, label in labels.items())


def figure(value: float) -> str:
    """Return a number with as many decimals, three at most, as four digits leave."""
    size = abs(value)
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}" if size < 1e4 else f"{value:.3g}"
