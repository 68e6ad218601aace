"""What became of the runs of a sweep: their figures, means over seeds with standard errors, the table and the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, METRICS_FILE
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError, adapter_metadata
from mlx_cpo_plugin.report.record import ReportError, Row, RunRecord, number
from mlx_cpo_plugin.sweep.plan import PlannedRun, Sweep, described, value_text, varied
from mlx_cpo_plugin.verdict import OUTCOMES

RESULT = "sweep_result.json"
FINISHED, FAILED, GIVEN_UP, WAITING = "finished", "failed", "given up", "waiting"


class Figure(NamedTuple):
    """A column of the table: its name in metrics, 1 where more is better and -1 where less is, how it is written."""

    title: str
    metric: str
    sign: int
    form: str


FIGURES = {
    "accuracy": Figure("accuracy", "val_accuracies", 1, ".1%"),
    "nll": Figure("nll of chosen", "val_nll_loss", -1, ".3f"),
    "margin": Figure("margin", "val_margins", 1, ".3f"),
    "loss": Figure("loss", "val_loss", -1, ".3f"),
    "answer": Figure("tokens of an answer", "val_sample_length", 0, ".0f"),
}
VERDICT = "val_verdict"
COMPARABLE = ("accuracy", "nll", "answer")
"""The figures whose scale does not depend on the loss."""


@dataclass(frozen=True)
class Outcome:
    """How a run stands.

    Attributes:
        status: ``finished``, ``failed``, ``given up`` (it was of the worse half) or ``waiting``.
        reason: why it failed, or was given up.
        before, after: the validation before training, and the one that the run is judged by; empty where it has none.
    """

    run: PlannedRun
    folder: Path
    status: str = WAITING
    reason: str = ""
    before: Row | None = None
    after: Row | None = None

    @classmethod
    def of(cls, run: PlannedRun, folder: Path, given_up: str = "") -> Outcome:
        """Return how the run in a folder stands.

        Args:
            given_up: why it is not continued, if it is not.
        """
        kept = read_result(folder)
        status, reason = kept.get("status", WAITING), kept.get("reason", "")
        if given_up and status == WAITING:
            status, reason = GIVEN_UP, given_up
        return cls(run, folder, str(status), str(reason), *validations_of(folder))

    def figure(self, name: str) -> float:
        """Return a figure of :data:`FIGURES` after training, or the verdict; NaN where there is none."""
        return number(self.after or {}, FIGURES[name].metric if name in FIGURES else VERDICT)

    def change(self, name: str) -> float:
        """Return how a figure has changed since the validation before training."""
        return number(self.after or {}, f"{FIGURES[name].metric}_change")

    @property
    def word(self) -> str:
        """The verdict in a word; ``-`` where there is none."""
        value = self.figure("verdict")
        return OUTCOMES[int(value)] if value in OUTCOMES else "-"

    def stderr(self, name: str) -> float:
        """Return the standard error of the change over the validation pairs."""
        return number(self.after or {}, f"{FIGURES[name].metric}_stderr")


def record_of(folder: Path) -> RunRecord | None:
    """Return the record of the run in a folder; None where it has not begun."""
    with suppress(ReportError):
        return RunRecord.read(folder)
    return None


def read_result(folder: Path) -> Row:
    """Return what :func:`write_result` left; empty where it has not been written."""
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def validations_of(folder: Path) -> tuple[Row | None, Row | None]:
    """Return the validation of a run before training, and the one that it is judged by; None where it has none.

    Those of a finished run are what :func:`write_result` has kept of them, whatever has become of its metrics.
    """
    kept = read_result(folder)
    if kept.get("status") == FINISHED and isinstance(kept.get("after"), dict):
        return kept.get("before"), kept["after"]
    record = record_of(folder)
    if record is None or not record.valid:
        return None, None
    return record.valid[0], (record.best or record.valid)[-1]


def lost_validation(folder: Path) -> str:
    """Return what is missing of a run that has ended well, of which the metrics lack the weights that it has left."""
    with suppress(CheckpointError, ValueError):
        left = int(adapter_metadata(folder / ADAPTER_FILE).get("iteration", ""))
        after = validations_of(folder)[1]
        if after is None or number(after, "iteration") != left:
            return f"{METRICS_FILE} lacks the validation of iteration {left}; remove the run's folder to train it again"
    return ""


def write_result(folder: Path, run: PlannedRun, status: str, reason: str = "", before: float = 0.0) -> None:
    """Write down that a run has finished, with the validations that it is judged by, or failed.

    Args:
        before: the part of the run at whose end it failed to arrive.
    """
    values: Row = {"status": status, "reason": reason, "before_part": before, "options": run.options, "seed": run.seed}
    if status == FINISHED:
        values["before"], values["after"] = validations_of(folder)
    replace_whole(folder / RESULT, lambda partial: partial.write_text(json.dumps(values, indent=1) + "\n"))


class Mean(NamedTuple):
    """A mean, and its standard error; the latter is NaN where it is not known."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SettingResult:
    """The runs of one setting, one for each seed."""

    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        return described(self.outcomes[0].run.options)

    @property
    def finished(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == FINISHED)

    @property
    def is_complete(self) -> bool:
        """Whether every run has finished."""
        return len(self.finished) == len(self.outcomes)

    def mean(self, name: str) -> Mean:
        """Return the mean of a figure over the finished runs."""
        return _mean([outcome.figure(name) for outcome in self.finished])

    def change(self, name: str) -> Mean:
        """Return the mean change; the error of a single run is that over its validation pairs."""
        of_seeds = _mean([outcome.change(name) for outcome in self.finished])
        return Mean(of_seeds.value, self.finished[0].stderr(name)) if len(self.finished) == 1 else of_seeds

    def score(self, metric: str) -> tuple[float, ...]:
        """Return what settings are ordered by, more being better; a figure that is not finite is the worst."""
        return (self.is_complete, bool(self.finished), *score_of(self.finished, metric))


def score_of(outcomes: Sequence[Outcome], metric: str) -> tuple[float, ...]:
    """Return what runs of one setting are worth, more being better.

    By ``verdict`` these are the mean of 1 for better, 0 for undecided and -1 for worse, then accuracy, then nll.
    """
    names = ("verdict", "accuracy", "nll") if metric == "verdict" else (metric, "nll")
    worth = []
    for name in names:
        mean = _mean([outcome.figure(name) for outcome in outcomes]).value
        sign = FIGURES[name].sign if name in FIGURES else 1
        worth.append(sign * mean if math.isfinite(mean) else -math.inf)
    return tuple(worth)


def _mean(values: Sequence[float]) -> Mean:
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan)
    mean = sum(values) / count
    if count < 2:
        return Mean(mean, math.nan)
    return Mean(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count))


def results_of(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[SettingResult]:
    """Return the settings of a sweep, the best first; those that are alike keep their order.

    Args:
        outcomes: by the digest of the run.
    """
    results = [SettingResult(tuple(outcomes[run.digest] for run in runs)) for runs in sweep.settings.values()]
    return sorted(results, key=lambda result: result.score(sweep.metric), reverse=True)


def table(sweep: Sweep, results: Sequence[SettingResult]) -> str:
    """Return a Markdown table: a line before training, then one for each setting, the best first."""
    options = list(varied(sweep.runs))
    outcomes = [outcome for result in results for outcome in result.outcomes]
    figures = [name for name in FIGURES if any(math.isfinite(outcome.figure(name)) for outcome in outcomes)]
    titles = [*(f"`{name}`" for name in options), "seeds", "verdict", *(FIGURES[name].title for name in figures)]
    lines = [titles, ["---"] * len(titles)]
    if befores := [outcome.before for outcome in outcomes if outcome.before]:
        # Other models, rows or lengths begin elsewhere: what differs is no setting's.
        texts = {name: {_written(name, number(row, FIGURES[name].metric)) for row in befores} for name in figures}
        before = [min(texts[name]) if name in COMPARABLE and len(texts[name]) == 1 else "" for name in figures]
        lines.append([*["before training", *[""] * (len(options) + 1)][: len(options) + 1], "", *before])
    for result in results:
        values = [_cell(result.outcomes[0].run.options.get(name, "")) for name in options]
        seeds = f"{len(result.finished)}" + ("" if result.is_complete else f" of {len(result.outcomes)}")
        lines.append([*values, seeds, _status(result), *(_figure(result, name) for name in figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_on_errors(results)}"


def _cell(value: object) -> str:
    return value_text(value).replace("|", "\\|")


def _written(name: str, value: float) -> str:
    return f"{value:{FIGURES[name].form}}" if math.isfinite(value) else "-"


def _figure(result: SettingResult, name: str) -> str:
    """Return a figure and how it has changed: ``81.3% (+12.5% ± 4.2%)``."""
    if not result.finished:
        return "-"
    form, change = FIGURES[name].form, result.change(name)
    text = _written(name, result.mean(name).value)
    if not math.isfinite(change.value):
        return text
    error = f" ± {change.stderr:{form}}" if math.isfinite(change.stderr) else ""
    return f"{text} ({change.value:+{form}}{error})"


def _status(result: SettingResult) -> str:
    """Return the verdicts of the finished runs, and what has become of the others."""
    words = [outcome.word for outcome in result.finished]
    words += [
        outcome.status + (f": {_cell(outcome.reason)}" if outcome.reason else "")
        for outcome in result.outcomes
        if outcome.status != FINISHED
    ]
    counted = {word: words.count(word) for word in words if word}
    return ", ".join(word if len(counted) == 1 else f"{count} {word}" for word, count in counted.items())


def _on_errors(results: Sequence[SettingResult]) -> str:
    several = any(len(result.finished) > 1 for result in results)
    over = "seeds; with one finished run, over its validation pairs" if several else "validation pairs, of one run each"
    return f"In brackets: the change since before training; ± is its standard error over {over}."


def conclusion(results: Sequence[SettingResult], metric: str) -> str:
    """Return one sentence on the best setting, and whether it is certain to be better than the second."""
    best, *others = results
    words = f"Best by {metric}: {best.name}"
    rivals = [other for other in others if other.finished]
    if not rivals:
        return f"{words}."
    names = ("accuracy", "nll") if metric == "verdict" else (metric,)
    name = next((name for name in names if best.mean(name).value != rivals[0].mean(name).value), names[0])
    means = [result.mean(name) for result in (best, rivals[0])]
    difference, error = means[0].value - means[1].value, math.hypot(means[0].stderr, means[1].stderr)
    form = FIGURES[name].form
    if not math.isfinite(error):
        return f"{words}; one seed does not tell how much of it is chance: give seeds: 3 or more."
    return (
        f"{words}; its {name} differs from that of the second, {rivals[0].name}, by {difference:+{form}} ± "
        f"{error:{form}}."
    )
