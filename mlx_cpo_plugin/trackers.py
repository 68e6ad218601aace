"""Experiment trackers that a run reports to: W&B, TensorBoard, Trackio and SwanLab, each through its own client.

A client is imported when a run reports to it and not before, and one that fails does not end the run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from mlx_cpo_plugin.errors import ConfigError, StoppedError, first_line
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.run_settings import plain_values
from mlx_cpo_plugin.types import Values

# What transformers puts in front of the metrics of training, validation and test, and what TRL calls them.
_PREFIXES = {"train_": "train/", "val_": "eval/", "test_": "test/"}
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
    "optimizer_steps": "global_step",
    "time": "runtime",
}
# Client -> its type of text.
_TEXTS = {"wandb": "Html", "swanlab": "Text", "trackio": "Markdown"}


Result = TypeVar("Result")


class RunDescription(NamedTuple):
    """What trackers are told of a run: the folder is that of its adapter, the settings are plain values by key."""

    project: str
    name: str
    folder: Path
    settings: Values


class Tracker:
    """W&B, Trackio or SwanLab, whose modules have an ``init``, and its run a ``log`` and a ``finish``.

    ``WANDB_MODE=offline`` and ``SWANLAB_MODE=offline`` keep a run on this machine, where Trackio has it anyway. Any
    method may raise what the client raises.
    """

    run: Any

    def __init__(self, client: str) -> None:
        self.client = client

    def start(self, run: RunDescription, run_id: str | None) -> str:
        """Begin a run, or continue the one that ``run_id`` names; return the run's id."""
        arguments: Values = {"id": run_id, "resume": "allow" if run_id else None}
        if self.client == "trackio":
            arguments = {"name": run_id or run.name, "resume": "allow" if run_id else "never", "embed": False}
        elif self.client == "wandb":
            arguments["dir"] = str(run.folder)
        else:
            arguments["log_dir"] = str(run.folder / "swanlog")
        init = import_module(self.client).init
        self.run = init(**{"project": run.project, "name": run.name, "config": dict(run.settings), **arguments})
        return str(self.run.name if self.client == "trackio" else self.run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send metrics by name."""
        self.run.log(dict(values), step=step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Send texts by name, if the client has a type for them."""
        kind = getattr(import_module(self.client), _TEXTS[self.client], None)
        if kind is not None:
            shown = {
                name: f"<pre>{escape(text)}</pre>" if self.client == "wandb" else text for name, text in texts.items()
            }
            self.run.log({name: kind(text) for name, text in shown.items()}, step=step)

    def finish(self, failed: bool) -> None:
        """End the run, and wait until everything has arrived."""
        outcomes: dict[str, Values] = {
            "wandb": {"exit_code": int(failed)},
            "swanlab": {"state": "crashed" if failed else "success"},
        }
        self.run.finish(**outcomes.get(self.client, {}))


class TensorboardTracker(Tracker):
    """Event files in ``runs`` inside the adapter folder, one folder a run, its name being the id."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        folder = run.folder / "runs"
        names = (run.name if number == 1 else f"{run.name}-{number}" for number in count(1))
        run_id = run_id or next(name for name in names if not (folder / name).exists())
        # The suffix distinguishes the files of two processes that start within one second.
        self.writer = import_module("tensorboardX").SummaryWriter(
            logdir=str(folder / run_id), flush_secs=1, filename_suffix=f".{time.time_ns()}"
        )
        self.writer.add_text("settings", f"```json\n{json.dumps(run.settings, indent=2)}\n```")
        return run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def finish(self, failed: bool) -> None:
        self.writer.close()


def client_of(tracker: str) -> str:
    """Return the module of the client of a value of ``report_to``."""
    return "tensorboardX" if tracker == "tensorboard" else tracker


def require_clients(settings: RunSettings) -> None:
    """Raise ``ConfigError`` where the client of a tracker that the settings name cannot be imported."""
    for name in _trackers_of(settings):
        module = client_of(name)
        try:
            # A folder of logs with the module's name in the working directory can be imported, too, but is no file.
            if import_module(module).__file__ is None:
                raise ImportError
        except Exception as error:  # a client that does not fit what else is installed may raise anything
            listed = name in (settings.report_to or ())
            what, remove = (
                (f"report_to names {name}", f"{name} from report_to") if listed else ("wandb is set", "the key")
            )
            fault = "is missing" if isinstance(error, ImportError) else f"cannot be imported ({first_line(error)})"
            raise ConfigError(
                f"{what}, but its client {module} {fault}; run pip install 'mlx-cpo-plugin[{name}]', or remove "
                f"{remove}.",
                key="report_to" if listed else "wandb",
            ) from error


def _trackers_of(settings: RunSettings) -> list[str]:
    names = list(settings.report_to or ())
    return names if settings.wandb is None or "wandb" in names else [*names, "wandb"]


@contextmanager
def tracked_run(settings: RunSettings, callback: TrainingCallback | None) -> Iterator[TrainingCallback | None]:
    """Wrap a callback in that of the trackers that the settings name, and finish them however the run ends.

    A run that was stopped on purpose has not failed. Without any tracker the callback is returned unchanged.
    """
    names = _trackers_of(settings)
    if not names:
        yield callback
        return
    folder = Path(settings.adapter_path)
    values = {key: value for key, value in vars(settings).items() if key not in ("run_identity", "begun")}
    run = RunDescription(
        settings.project or settings.wandb or "mlx-cpo",
        settings.run_name or folder.resolve().name,
        folder,
        {"run_id": settings.run_identity.id, **plain_values(values)},
    )
    trackers = {name: (TensorboardTracker if name == "tensorboard" else Tracker)(name) for name in names}
    tracking = TrackerCallback(trackers, run, callback, set(names) - set(settings.report_to or ()))
    failed = True
    try:
        yield tracking
        failed = False
    except (StoppedError, KeyboardInterrupt):
        failed = False
        raise
    finally:
        tracking.finish(failed)


class TrackerCallback(TrainingCallback):
    """Sends each report to every tracker.

    A tracker that raises is named in one warning; one that cannot even start is left out from then on.

    Args:
        trackers: by name.
        wrapped: another callback, which gets the same reports first.
        with_host_names: names of trackers whose metrics keep the host's names instead of TRL's.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        run: RunDescription,
        wrapped: TrainingCallback | None = None,
        with_host_names: Collection[str] = (),
    ) -> None:
        self.trackers, self.run, self.wrapped = dict(trackers), run, wrapped
        self.with_host_names = with_host_names
        self.run_ids: dict[str, str] = {}
        self.last_step = 0
        self._started = False
        self._told: Collection[tuple[str, int]] = ()
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

    def on_train_loss_report(self, train_info: Values) -> None:
        """Pass on a report of the training loss."""
        if self.wrapped is not None:
            self.wrapped.on_train_loss_report(train_info)
        self._send("train", train_info, train_info["iteration"])

    def on_val_loss_report(self, val_info: Values) -> None:
        """Pass on a report of a validation."""
        if self.wrapped is not None:
            self.wrapped.on_val_loss_report(val_info)
        self._send("valid", val_info, val_info["iteration"])

    def on_sample_report(self, report: Values) -> None:
        """Send answers to prompts as texts; the wrapped callback gets them if it wants to."""
        wanted = getattr(self.wrapped, "on_sample_report", None)
        if wanted is not None:
            wanted(report)
        self.start()
        step = report["iteration"]
        if ("sample", step) in self._told:
            return
        samples = enumerate(report["samples"], 1)
        texts = {f"samples/{number}": f"{one['prompt']}\n\n{one['answer']}" for number, one in samples}
        for name, tracker in self.trackers.items():
            self._guarded(name, "updated", tracker.log_texts, texts, step)

    def on_test_report(self, metrics: Mapping[str, float]) -> None:
        """Send the metrics of the final test, named as in ``test_loss``, at the iteration of the last report."""
        self._send("test", metrics, self.last_step)

    def finish(self, failed: bool) -> None:
        """End the run in every tracker."""
        for name, tracker in self.trackers.items() if self._started else ():
            self._guarded(name, "finished", tracker.finish, failed)

    def state(self) -> Values:
        """Return what a resumed run has to know."""
        return {"run_ids": dict(self.run_ids), "last_step": self.last_step}

    def resume(self, state: Values, told: Collection[tuple[str, int]]) -> None:
        """Continue the runs of :meth:`state`; reports in ``told``, made after it, are not sent a second time.

        Those that a client had not passed on when its process was killed do not get out later either.
        """
        self.run_ids, self.last_step, self._told = dict(state["run_ids"]), state["last_step"], told

    def _send(self, kind: str, report: Mapping[str, float], step: int) -> None:
        self.start()
        self.last_step = step
        if (kind, step) in self._told:
            return
        numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
        finite = {name: value for name, value in numbers.items() if name != "iteration" and math.isfinite(value)}
        for name, tracker in self.trackers.items():
            values = finite if name in self.with_host_names else trl_names(finite)
            self._guarded(name, "updated", tracker.log, values, step)

    def _guarded(self, name: str, done: str, action: Callable[..., Result], *arguments: object) -> Result | None:
        """Call ``action``; where it raises, warn of the tracker once and return ``None``."""
        try:
            return action(*arguments)
        except Exception as error:  # clients raise anything, and none of it is worth ending a run of hours
            if name not in self._warned:
                self._warned.add(name)
                tqdm.write(f"Warning: {name} could not be {done} ({first_line(error)}); training continues.")
            return None


def trl_names(report: Mapping[str, float]) -> dict[str, float]:
    """Return a report of the trainer under the names that TRL's reports have in trackers.

    ``train_margins`` is ``train/rewards/margins``, ``val_loss`` is ``eval/loss``. Metrics that TRL has no name for keep
    their own, e.g. ``train/tokens_per_second``.
    """
    named = {}
    for name, value in report.items():
        prefix = next(filter(name.startswith, _PREFIXES), "train_")
        metric = name.removeprefix(prefix)
        named[_PREFIXES[prefix] + _TRL_NAMES.get(metric, metric)] = value
    return named
