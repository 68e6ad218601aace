"""One class for each tracker's own client, which is imported when a run reports to it and not before."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from mlx_lm.tuner import callbacks

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.config import RunSettings

DEFAULT_PROJECT = "mlx-cpo"
LOG_FOLDER = "runs"
FLUSH_SECONDS = 1


@dataclass(frozen=True)
class RunDescription:
    """Description of a run for trackers.

    Attributes:
        project: the project that the run belongs to.
        name: of the run.
        folder: the run's adapter folder, for what a client keeps on disk.
        settings: the run's settings by key, as plain values.
    """

    project: str
    name: str
    folder: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """A tracker as the callback sees it. Any method may raise what its client raises."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        """Begin a run, or continue the one that ``run_id`` names; return the run's id."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send metrics by name."""

    def finish(self, failed: bool) -> None:
        """End the run, and wait until what was sent has arrived."""


class _RunOfClient:
    """Base of the clients whose run is an object that takes metrics."""

    run: Any

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)


class WandbTracker(_RunOfClient):
    """Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        self.run = import_module("wandb").init(
            project=run.project,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.settings),
            id=run_id,
            resume="allow" if run_id else None,
        )
        return str(self.run.id)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorboardTracker:
    """Event files in ``runs`` inside the adapter folder, one folder a run, its name being the id."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        folder = run.folder / LOG_FOLDER
        names = (run.name if number == 1 else f"{run.name}-{number}" for number in count(1))
        run_id = run_id or next(name for name in names if not (folder / name).exists())
        # The suffix distinguishes the files of two processes that start within one second.
        self.writer = import_module("tensorboardX").SummaryWriter(
            logdir=str(folder / run_id), flush_secs=FLUSH_SECONDS, filename_suffix=f".{time.time_ns()}"
        )
        self.writer.add_text("settings", f"```json\n{json.dumps(run.settings, indent=2)}\n```")
        return run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, failed: bool) -> None:
        self.writer.close()


class TrackioTracker(_RunOfClient):
    """Trackio, which keeps runs in a database on this machine unless its own settings say otherwise."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        self.run = import_module("trackio").init(
            project=run.project,
            name=run_id or run.name,
            config=dict(run.settings),
            resume="allow" if run_id else "never",
            embed=False,
        )
        return str(self.run.name)

    def finish(self, failed: bool) -> None:
        self.run.finish()


class SwanlabTracker(_RunOfClient):
    """SwanLab; ``SWANLAB_MODE=offline`` keeps it on this machine."""

    def start(self, run: RunDescription, run_id: str | None) -> str:
        self.run = import_module("swanlab").init(
            project=run.project,
            name=run.name,
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.settings),
            id=run_id,
            resume="allow" if run_id else None,
        )
        return str(self.run.id)

    def finish(self, failed: bool) -> None:
        self.run.finish(state="crashed" if failed else "success")


CLIENTS: dict[str, tuple[type[Tracker], str, str]] = {
    "wandb": (WandbTracker, "wandb", "init"),
    "tensorboard": (TensorboardTracker, "tensorboardX", "SummaryWriter"),
    "trackio": (TrackioTracker, "trackio", "init"),
    "swanlab": (SwanlabTracker, "swanlab", "init"),
}
"""Value of ``report_to`` -> its class, the module of its client, and what that module has to have."""


def require_clients(settings: RunSettings) -> None:
    """Find out whether the client of each tracker that the settings name can be imported.

    Raises:
        ConfigError: one cannot.
    """
    for name in (settings.report_to or ()) if settings.train else ():
        _, module, attribute = CLIENTS[name]
        try:
            # A folder of logs with the module's name in the working directory can be imported, too, but is empty.
            getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"report_to names {name}, but its client {module} is missing; run pip install "
                f"'mlx-cpo-plugin[{name}]', or remove {name} from report_to."
            ) from error
    if settings.wandb is not None and callbacks.wandb is None:
        raise ConfigError("wandb is set, but the package is missing; run 'pip install wandb' or remove the key.")
