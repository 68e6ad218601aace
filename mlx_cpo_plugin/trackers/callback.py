"""The training callback that passes reports on to trackers, and keeps a failing tracker from ending the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tuner import callbacks
from tqdm import tqdm

from mlx_cpo_plugin.errors import StoppedError, first_line
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.run_settings import plain_values
from mlx_cpo_plugin.trackers.clients import CLIENTS, DEFAULT_PROJECT, RunDescription, Tracker

Told = Collection[tuple[str, int]]
"""Reports that were made before a run was resumed: kind (``train`` or ``valid``) and iteration."""

_PREFIXES = {"train_": "", "val_": "eval_", "test_": "test_"}
_TRL_NAMES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "accuracies": "rewards/accuracies",
    "margins": "rewards/margins",
    "policy_chosen_logps": "logps/chosen",
    "policy_rejected_logps": "logps/rejected",
    "chosen_logits_mean": "logits/chosen",
    "rejected_logits_mean": "logits/rejected",
    "gradient_norm": "grad_norm",
    "time": "runtime",
}


def trl_names(report: Mapping[str, float]) -> dict[str, float]:
    """Return a report of the trainer under the names of TRL's logs, without its iteration and non-finite values.

    ``train_`` falls away, ``val_`` becomes ``eval_``: ``train_margins`` is ``rewards/margins``, ``val_loss`` is
    ``eval_loss``. Metrics that TRL has no name for keep their own, e.g. ``tokens_per_second``.
    """
    return {_trl_name(name): value for name, value in report.items() if name != "iteration" and math.isfinite(value)}


def _trl_name(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return name
    metric = name.removeprefix(prefix)
    return _PREFIXES[prefix] + _TRL_NAMES.get(metric, metric)


class TrackerCallback(TrainingCallback):
    """Sends each report to every tracker under TRL's names.

    A tracker that raises is named in one warning; one that cannot even start is left out from then on.

    Args:
        trackers: by name.
        run: description of the run.
        wrapped: another callback, which gets the same reports first.

    Attributes:
        run_ids: id of the run by tracker, once started.
        last_step: iteration of the last report.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], run: RunDescription, wrapped: TrainingCallback | None = None
    ) -> None:
        self.trackers = dict(trackers)
        self.run = run
        self.wrapped = wrapped
        self.run_ids: dict[str, str] = {}
        self.last_step = 0
        self._started = False
        self._told: Told = ()
        self._warned: set[str] = set()

    def start(self) -> None:
        """Begin the run in every tracker, or continue the one that :meth:`resume` named; once only."""
        if self._started:
            return
        self._started = True
        self.run.folder.mkdir(parents=True, exist_ok=True)
        for name, tracker in list(self.trackers.items()):
            run_id = self._guarded(name, "started", tracker.start, self.run, self.run_ids.get(name))
            if run_id is None:
                del self.trackers[name]
            else:
                self.run_ids[name] = run_id

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Pass on a report of the training loss."""
        if self.wrapped is not None:
            self.wrapped.on_train_loss_report(train_info)
        self._send("train", train_info, train_info["iteration"])

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Pass on a report of a validation."""
        if self.wrapped is not None:
            self.wrapped.on_val_loss_report(val_info)
        self._send("valid", val_info, val_info["iteration"])

    def on_test_report(self, metrics: Mapping[str, float]) -> None:
        """Send the metrics of the final test, named as in ``test_loss``, at the iteration of the last report."""
        self._send("test", metrics, self.last_step)

    def finish(self, failed: bool) -> None:
        """End the run in every tracker."""
        for name, tracker in self.trackers.items() if self._started else ():
            self._guarded(name, "finished", tracker.finish, failed)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {"run_ids": dict(self.run_ids), "last_step": self.last_step}

    def resume(self, state: Mapping[str, Any], told: Told) -> None:
        """Continue the runs of :meth:`state`; reports in ``told``, made after it, are not sent a second time.

        Those that a client had not passed on when its process was killed do not get out later either.
        """
        self.run_ids, self.last_step = dict(state["run_ids"]), state["last_step"]
        self._told = told

    def _send(self, kind: str, report: Mapping[str, float], step: int) -> None:
        self.start()
        self.last_step = step
        if (kind, step) in self._told:
            return
        values = trl_names(report)
        for name, tracker in self.trackers.items():
            self._guarded(name, "updated", tracker.log, values, step)

    def _guarded(self, name: str, done: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``action``; where it raises, warn of the tracker once and return ``None``."""
        try:
            return action(*arguments)
        # Clients raise anything, and none of it is worth ending a run of hours.
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                tqdm.write(f"Warning: {name} could not be {done} ({first_line(error)}); training continues.")
            return None


class HostWandb(TrainingCallback):
    """mlx-lm's own W&B callback, which begins its run when it is made: here at the first report, and ends it."""

    def __init__(self, settings: RunSettings, wrapped: TrainingCallback | None) -> None:
        self._settings = settings
        self._wrapped = wrapped
        self._made: TrainingCallback | None = None

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Pass on a report of the training loss."""
        self._callback().on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Pass on a report of a validation."""
        self._callback().on_val_loss_report(val_info)

    def finish(self, failed: bool) -> None:
        """End the run; without this W&B takes any exit code but 0 for a crash."""
        run = None if self._made is None else getattr(callbacks.wandb, "run", None)
        if run is not None:
            run.finish(exit_code=int(failed))

    def _callback(self) -> TrainingCallback:
        if self._made is None:
            folder = self._settings.adapter_path
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._made = callbacks.WandBCallback(
                project_name=self._settings.wandb,
                log_dir=folder,
                config=_described(self._settings),
                wrapped_callback=self._wrapped,
            )
        return self._made


@contextmanager
def tracked_run(settings: RunSettings, callback: TrainingCallback | None) -> Iterator[TrainingCallback | None]:
    """Wrap a callback in those of W&B and the trackers that the settings name, and finish them however the run ends.

    A run that was stopped on purpose has not failed. Without any tracker the callback is given back as it is.
    """
    trackers: list[HostWandb | TrackerCallback] = []
    if settings.wandb is not None and "wandb" not in (settings.report_to or ()):
        trackers.append(HostWandb(settings, callback))
        callback = trackers[-1]
    if settings.report_to:
        folder = Path(settings.adapter_path)
        run = RunDescription(
            project=settings.project or settings.wandb or DEFAULT_PROJECT,
            name=settings.run_name or folder.resolve().name,
            folder=folder,
            settings=_described(settings),
        )
        trackers.append(TrackerCallback({name: CLIENTS[name][0]() for name in settings.report_to}, run, callback))
        callback = trackers[-1]
    failed = True
    try:
        yield callback
        failed = False
    except (StoppedError, KeyboardInterrupt):
        failed = False
        raise
    finally:
        for tracker in reversed(trackers):
            tracker.finish(failed)


def _described(settings: RunSettings) -> dict[str, Any]:
    """Return the settings for trackers: plain values, and which run it is."""
    values = {key: value for key, value in vars(settings).items() if key not in ("run_identity", "begun")}
    return {"run_id": settings.run_identity.id, **plain_values(values)}
