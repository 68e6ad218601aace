"""What a run says while it trains: progress bar, console lines, callback, metrics file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

import mlx.core as mx
from tqdm import tqdm

from mlx_cpo_plugin.checkpoints.folder import Checkpoint
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.trackers import TrackerCallback
from mlx_cpo_plugin.trackers.callback import Told
from mlx_cpo_plugin.training.metrics import MetricsFile, PairMeans, host_report
from mlx_cpo_plugin.training.objective import Objective

Item = TypeVar("Item")


class ProgressReporter:
    """Collects what happens between two reports; tells it on the first rank only.

    Lines and callback keys have the names and shapes that the host gives them, since tools read them.
    """

    def __init__(self, objective: Objective, callback: TrainingCallback | None, metrics_file: MetricsFile) -> None:
        self.objective = objective
        self.callback = callback
        self.stream = own_stream(callback)
        self.metrics_file = metrics_file
        self.speaks = mx.distributed.init().rank() == 0
        self.trained_tokens = 0
        self.elapsed = 0.0
        self.loop_began = 0.0
        self.bar: Any = None
        self._begin()

    def _begin(self) -> None:
        self.means = PairMeans(self.objective)
        self.gradient_norms: list[float] = []
        self.iterations = 0
        self.seconds = 0.0
        self.resumed = time.perf_counter()

    def _seconds(self) -> float:
        """Return the seconds of training since the last report, those before a run was resumed included."""
        return self.seconds + time.perf_counter() - self.resumed

    def iterations_of(self, plan: Iterable[Item], total: int, done: int = 0) -> Iterator[tuple[int, Item]]:
        """Number the plan's items from 1, without those that are done, while a progress bar goes along."""
        rest = islice(plan, done, None)
        self.bar = tqdm(rest, total=total, initial=done, desc="Training", disable=not self.speaks)
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
        """Take note of a micro-batch: preference losses and scores of its B pairs, and its scored tokens."""
        self.means.add(losses, scores, tokens)

    def add_step(self, gradient_norm: float) -> None:
        """Take note of an optimizer step."""
        self.gradient_norms.append(gradient_norm)

    def count_iteration(self) -> None:
        """Take note that an iteration is complete, whether or not this rank had pairs in it."""
        self.iterations += 1

    def report_training(self, iteration: int, learning_rate: float, epoch: int) -> None:
        """Tell the means since the last report, and begin anew."""
        seconds = self._seconds()
        means, tokens = self.means.over_ranks()
        self.trained_tokens += tokens
        norms = self.gradient_norms
        info = {
            "iteration": iteration,
            **host_report("train", means),
            **({"train_gradient_norm": sum(norms) / len(norms)} if norms else {}),
            "learning_rate": learning_rate,
            "iterations_per_second": self.iterations / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
            "epoch": epoch,
        }
        if self.speaks:
            self.bar.set_postfix(
                loss=f"{means['loss']:.3f}", acc=f"{means['accuracies']:.3f}", margin=f"{means['margins']:.3f}"
            )
            norm = f"{info['train_gradient_norm']:.3f}" if norms else "-"
            tqdm.write(
                f"\nIter {iteration}: loss {means['loss']:.3f}, chosen_r {means['chosen_reward']:.3f}, "
                f"rejected_r {means['rejected_reward']:.3f}, acc {means['accuracies']:.3f}, "
                f"margin {means['margins']:.3f}, lr {learning_rate:.3e}, it/s {info['iterations_per_second']:.3f}, "
                f"tok/s {info['tokens_per_second']:.3f}, peak_mem {info['peak_memory']:.3f}GB, grad_norm {norm}"
            )
            self.metrics_file.append("train", info)
        self._begin()
        if self.speaks and self.callback is not None:  # in the end, since it may raise
            self.callback.on_train_loss_report(info)

    def report_validation(self, iteration: int, means: Mapping[str, float], seconds: float) -> None:
        """Tell the means over the validation pairs."""
        if not self.speaks:
            return
        info = {"iteration": iteration, **host_report("val", means), "val_time": seconds}
        tqdm.write(
            f"Iter {iteration}: Val loss {means['loss']:.3f}, Val chosen reward {means['chosen_reward']:.3f}, "
            f"Val rejected reward {means['rejected_reward']:.3f}, Val accuracy {means['accuracies']:.3f}, "
            f"Val margin {means['margins']:.3f}, Val took {seconds:.3f}s"
        )
        self.metrics_file.append("valid", info)
        if self.callback is not None:
            self.callback.on_val_loss_report(info)

    def start_trackers(self) -> None:
        """Let the trackers begin their run, or go on with it after :meth:`restore`."""
        if isinstance(self.callback, TrackerCallback):
            self.callback.start()

    def state(self) -> dict[str, Any]:
        """Return what was collected since the last report, what the run has taken so far, and what it has reported."""
        return {
            "means": self.means.state(),
            "gradient_norms": list(self.gradient_norms),
            "iterations": self.iterations,
            "trained_tokens": self.trained_tokens,
            "seconds": self._seconds(),
            "elapsed": self.elapsed + (time.perf_counter() - self.loop_began if self.bar is not None else 0.0),
            "metrics_rows": self.metrics_file.rows,
            "trackers": self.callback.state() if isinstance(self.callback, TrackerCallback) else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.means.restore(state["means"])
        self.gradient_norms, self.iterations = list(state["gradient_norms"]), state["iterations"]
        self.trained_tokens = state["trained_tokens"]
        self.seconds, self.elapsed = state["seconds"], state["elapsed"]
        self.resumed = time.perf_counter()

    def go_on(self, lines: Sequence[bytes], checkpoint: Checkpoint) -> None:
        """Go on after the reports that had been made by a checkpoint.

        They stay in the metrics file, and trackers go on with their run if it is of the same run.

        Args:
            lines: of the metrics file of the run that wrote the checkpoint.
        """
        state, run_id = checkpoint.values["reporter"], checkpoint.run.id
        told, missing = self.metrics_file.go_on(lines, run_id, state["metrics_rows"], checkpoint.iteration)
        if missing is not None:
            self.say(missing)
        if run_id == self.metrics_file.run_id:
            self.go_on_in_trackers(checkpoint, told)

    def go_on_in_trackers(self, checkpoint: Checkpoint, told: Told = ()) -> None:
        """Let the trackers go on with the runs that they had when a checkpoint of the same run was written."""
        state = checkpoint.values["reporter"].get("trackers")
        if isinstance(self.callback, TrackerCallback) and state is not None:
            self.callback.resume(state, told)

    def warn(self, line: str | None) -> None:
        """Print a warning, if there is one, and note it among the metrics."""
        if line is not None and self.speaks:
            self.say(f"Warning: {line}")
            self.metrics_file.append_warning(line)

    def say(self, line: str) -> None:
        """Print a line without tearing the progress bar, and where the callback prints if that is elsewhere."""
        if not self.speaks:
            return
        tqdm.write(line)
        if self.stream is not None and not _ends_in(sys.stdout, self.stream):
            with suppress(OSError, ValueError):  # as the callback's own lines, it is lost where nobody reads
                print(line, file=self.stream, flush=True)


def own_stream(callback: Any) -> Any:
    """Return the stream that a callback, or one that it wraps, prints on; ``None`` where there is none.

    MLX LoRA Studio discards all that a trainer prints, and shows its user what its callback's stream gets.
    """
    while callback is not None:
        stream = getattr(callback, "stream", None)
        if callable(getattr(stream, "write", None)):
            return stream
        callback = getattr(callback, "wrapped_callback", None)
    return None


def _ends_in(stream: Any, other: Any) -> bool:
    """Whether ``stream`` is ``other``, or passes everything on to it."""
    while stream is not None and stream is not other:
        stream = getattr(stream, "stream", None)
    return stream is other
