"""A run as its adapter folder tells of it: settings, metrics, warnings and times."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, METRICS_FILE, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED, read_record
from mlx_cpo_plugin.errors import ConfigError, UserError, first_line, named
from mlx_cpo_plugin.settings.run_settings import read_run_settings
from mlx_cpo_plugin.verdict import Verdict

# The default name of an adapter folder, which tells nothing.
GENERIC = "adapters"

_ADAPTER_SETTINGS = {"fine_tune_type": "train_type", "num_layers": "num_layers", "lora_parameters": "lora_parameters"}
# The same run can be kept anywhere.
_NOT_COMPARED = frozenset({"adapter_path"})

Row = dict[str, Any]


class ReportError(UserError):
    """A folder holds no run that can be read, or a report cannot be drawn or written."""


@dataclass(frozen=True)
class RunRecord:
    """The last run that trained into a folder.

    Attributes:
        folder: the run's ``adapter_path``.
        settings: what is known of the configuration, by YAML key.
        versions: one line that names versions and device; empty where they are not known.
        train, valid, test: the rows of ``metrics.jsonl`` of each kind, in order; a value that was no number is None.
        samples: answers to prompts, one row each, in order.
        warnings: what the run warned of.
        best: the validation whose weights a finished run has left, with ``load_best``.
        trained: whether the run has written down that its training is complete, as one that was stopped early has.
        template_arguments: of the chat template, as its prompts were rendered with; empty where they are not known.
    """

    folder: Path
    settings: dict[str, Any]
    versions: str
    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    samples: tuple[Row, ...]
    warnings: tuple[str, ...]
    best: tuple[Row, ...] = ()
    trained: bool = False
    template_arguments: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, needs_metrics: bool = True) -> RunRecord:
        """Read the record of the last run in ``folder``; lines of the metrics that are torn are skipped.

        Raises:
            ReportError: there are no metrics although they are needed, or a file cannot be read.
        """
        folder = Path(folder)
        rows = rows_of_last_run(folder) if needs_metrics or (folder / METRICS_FILE).exists() else []
        settings, versions = _read_settings(folder)
        told, of_run = read_record(folder), rows[-1].get("run") if rows else None

        def of_kind(kind: str) -> tuple[Row, ...]:
            return tuple(row for row in rows if row["kind"] == kind)

        return cls(
            folder=folder,
            settings=settings,
            versions=versions,
            train=of_kind("train"),
            valid=of_kind("valid"),
            test=of_kind("test"),
            samples=of_kind("sample"),
            warnings=tuple(str(row.get("text", "")) for row in of_kind("warning")),
            best=of_kind("best"),
            trained=told is not None and TRAINED in told.done and told.run.id == of_run,
            template_arguments=told.template_arguments if told else {},
        )

    @property
    def iteration(self) -> int:
        """The last iteration that was reported; 0 before the first."""
        iterations = (number(row, "iteration") for row in self.train)
        return int(max((value for value in iterations if not math.isnan(value)), default=0))

    @property
    def iters(self) -> int | None:
        """How many iterations the run was to have; None where that is not known."""
        return whole if isinstance(whole := self.settings.get("iters"), int) else None

    @property
    def started(self) -> datetime | None:
        """When the first line was reported."""
        return _time(min(self._times(), default=None))

    @property
    def updated(self) -> datetime | None:
        """When the last line was reported."""
        return _time(max(self._times(), default=None))

    @property
    def finished(self) -> datetime | None:
        """When the last line was reported, of a run that got to its end; None otherwise, or where it is not known."""
        complete = self.trained or bool(self.test) or (self.iters is not None and self.iteration >= self.iters)
        return self.updated if complete else None

    @property
    def last(self) -> Row:
        """The newest value of every metric, by its name in ``metrics.jsonl``."""
        values: Row = {}
        for row in (*self.train, *self.valid, *self.best, *self.test):
            values |= {key: value for key, value in row.items() if key not in ("kind", "run", "time", "iteration")}
        return values

    @property
    def verdict(self) -> Verdict | None:
        """How the last validation, or that of the weights that were loaded, compares with the one before training."""
        rows = self.best or self.valid
        return Verdict.from_report(rows[-1]) if rows else None

    def _times(self) -> list[float]:
        times = (number(row, "time") for row in (*self.train, *self.valid, *self.test))
        return [time for time in times if not math.isnan(time)]


def names_of_runs(folders: Sequence[Path], taken: str = "") -> list[str]:
    """Return a short name for each folder: as many of its last parts as tell it from the others and from ``taken``."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    shorter = [path[:-1] if path[-1] == GENERIC and len(path) > 2 else path for path in paths]
    paths = shorter if len(set(shorter)) == len(paths) else paths
    others = [(taken,), *paths]
    return [
        next(
            ("/".join(path[-count:]) for count in range(1, len(path)) if _ends(others, path[-count:]) == 1),
            str(Path(*path)),
        )
        for path in paths
    ]


def _ends(paths: Sequence[tuple[str, ...]], end: tuple[str, ...]) -> int:
    """Return how many paths end so."""
    return sum(path[-len(end) :] == end for path in paths)


def has_reported(folder: Path) -> bool:
    """Whether a run has written its metrics into a folder, and nothing that is read of it is a link."""
    files = [folder / name for name in (METRICS_FILE, RUN_SETTINGS, ADAPTER_CONFIG)]
    return files[0].is_file() and not any(file.is_symlink() for file in files)


def answers_over_time(samples: Iterable[Row], most: int = 6) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return prompts with their answers by iteration: the first, the last, and some between if there are many."""
    by_prompt: dict[str, dict[int, str]] = {}
    for row in samples:
        if not math.isnan(iteration := number(row, "iteration")):
            by_prompt.setdefault(str(row.get("prompt", "")), {})[int(iteration)] = str(row.get("answer", ""))
    picked = []
    for prompt, answers in by_prompt.items():
        count = min(most, len(answers))
        places = {round(place * (len(answers) - 1) / max(count - 1, 1)) for place in range(count)}
        picked.append((prompt, [answer for place, answer in enumerate(answers.items()) if place in places]))
    return picked


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all ``records``: key -> each record's value, None where not set."""
    keys = dict.fromkeys(key for record in records for key in record.settings if key not in _NOT_COMPARED)
    values = {key: [record.settings.get(key) for record in records] for key in keys}
    return {key: given for key, given in values.items() if any(value != given[0] for value in given)}


def number(row: Row, name: str) -> float:
    """Return a metric as a float; NaN where it is missing or no finite number."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def _read_metrics(file: Path) -> list[Row]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError as error:
        raise ReportError(
            f"There is no {METRICS_FILE} in {named(str(file.parent))}; give the adapter_path of a CPO run.",
            place=str(file.parent),
        ) from error
    except OSError as error:
        raise ReportError(
            f"{named(str(file))} cannot be read ({error.strerror}); check the path.", place=str(file)
        ) from error
    return parsed_rows(lines)


def parsed_rows(lines: Iterable[str]) -> list[Row]:
    """Return the rows in lines of metrics; those that are torn are left out."""
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "kind" in row else None


def rows_of_last_run(folder: Path) -> list[Row]:
    """Return the rows of the run that wrote last into a folder.

    Raises:
        ReportError: there are no metrics, or they cannot be read.
    """
    return last_run_of(_read_metrics(folder / METRICS_FILE))


def last_run_of(rows: list[Row]) -> list[Row]:
    """Return those of the run that wrote last.

    Rows that do not say which run they are of, as earlier versions wrote them, are taken since their iterations last
    began anew.
    """
    if rows and "run" in rows[-1]:
        return [row for row in rows if row.get("run") == rows[-1]["run"]]
    first, before, trained = 0, 0.0, 0.0
    for place, row in enumerate(rows):
        iteration = number(row, "iteration")
        if math.isnan(iteration):
            continue
        if iteration < before or (row["kind"] == "train" and iteration == trained):
            first = place
        before = iteration
        trained = iteration if row["kind"] == "train" else trained
    return rows[first:]


def _read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what ``run_settings.yaml`` says, or else what the adapter's configuration says, and the versions."""
    try:
        settings, versions = read_run_settings(folder)
    except (ConfigError, OSError, ValueError) as error:
        raise ReportError(
            f"The settings in {named(str(folder))} cannot be read ({first_line(error)}); restore or remove the file.",
            place=str(folder),
        ) from error
    return settings or _adapter_settings(folder / ADAPTER_CONFIG), versions


def _adapter_settings(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the metrics can be shown without
    return {ours: config[theirs] for theirs, ours in _ADAPTER_SETTINGS.items() if theirs in config}


def _time(seconds: float | None) -> datetime | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return None
