"""Whether a model is better than before training, by its held-out pairs: as numbers of a report, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of the chosen answers, in nats per token: what preference training may take from them unpunished.
NLL_ALLOWANCE = 0.2
# A change that no reader would see, such as that of a learning rate of 1e-9, can be certain all the same.
LEAST = 0.001
# The mean share of an answer's phrases that it has had before: a model's own answers are below half of it.
REPETITIVE = 0.5
# Rows that all change alike, as accuracies may, from which on that is certain at 95 %, by the sign test.
LEAST_ALIKE = 6
# The two-sided 95 % point of the normal distribution.
Z = 1.959964
# What is left of a standard error that is none: ranks exchange float32 numbers.
ROUNDING = 1e-6
_LENGTH = ("val_sample_length", "val_sample_length_change")
_REPETITION = ("val_sample_repetition", "val_sample_repetition_change")
_OF_ANSWERS = (*_LENGTH, *_REPETITION)
OUTCOMES = {1: "better", 0: "undecided", -1: "worse"}


class Measure(NamedTuple):
    """What is compared: its name in reports, its label, 1 where more is better and -1 where less is, how it is written.

    Attributes:
        allowance: how far it may get worse before that counts.
    """

    name: str
    label: str
    sign: int
    form: str
    allowance: float = LEAST


MEASURES = (
    Measure("loss", "loss", -1, ".3f"),
    Measure("nll_loss", "nll", -1, ".3f", NLL_ALLOWANCE),
    Measure("margins", "margin", 1, ".3f"),
    Measure("accuracies", "accuracy", 1, ".1%"),
)


class Change(NamedTuple):
    """The mean of paired differences, after minus before, its standard error, and how many rows it is worth.

    Pairs of one row, which share a prompt and answers, are no further evidence: the error is that of rows, and where
    some have more pairs than others, see :func:`worth_in_rows`.
    """

    mean: float
    stderr: float
    rows: int

    def sign(self, least: float = LEAST) -> int:
        """Return 1 or -1 where the change is, at 95 %, certain to exceed ``least`` on that side of zero; else 0."""
        alike = self.stderr <= ROUNDING * abs(self.mean)
        if not math.isfinite(self.mean) or self.rows < 2 or (alike and self.rows < LEAST_ALIKE):
            return 0
        certain = abs(self.mean) - least > students_t(self.rows - 1) * self.stderr
        return int(math.copysign(1, self.mean)) if certain else 0


@dataclass(frozen=True)
class Verdict:
    """How a model compares with the one before training.

    Attributes:
        outcome: a key of :data:`OUTCOMES`.
        changes: name of a measure -> mean change and standard error.
        answers: length and repetition of greedy answers and how they changed, as in reports; empty where not known.
    """

    outcome: int
    changes: Mapping[str, tuple[float, float]]
    answers: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, changes: Mapping[str, Change], answers: Mapping[str, float] | None = None) -> Verdict:
        """Judge by the changes of all measures.

        A model whose loss rises, whose chosen answers become much less likely, or whose own answers become empty or
        begin to repeat themselves is worse, whatever its accuracy is; otherwise the measures that moved decide if they
        agree.
        """
        signs = {}
        for measure in MEASURES:
            change = changes[measure.name]
            side = measure.sign * change.sign()
            signs[measure.name] = side if side > 0 else measure.sign * change.sign(measure.allowance)
        lost = any(not math.isfinite(change.mean) for change in changes.values())
        answers = dict(answers or {})
        if lost or -1 in (signs["loss"], signs["nll_loss"]) or _repeats(answers) or _are_empty(answers):
            outcome = -1
        else:
            outcome = (1 in signs.values()) - (-1 in signs.values())
        return cls(outcome, {name: (change.mean, change.stderr) for name, change in changes.items()}, answers)

    @classmethod
    def from_report(cls, report: Mapping[str, float | None]) -> Verdict | None:
        """Return what :meth:`report` wrote, e.g. into a line of ``metrics.jsonl``; None where it has no verdict."""
        outcome = report.get("val_verdict")
        if outcome is None or outcome not in OUTCOMES:
            return None
        changes = {}
        for name in (measure.name for measure in MEASURES):
            values = [report.get(f"val_{name}_{part}") for part in ("change", "stderr")]
            mean, stderr = (math.nan if value is None else float(value) for value in values)
            changes[name] = (mean, stderr)
        return cls(
            int(outcome), changes, {name: value for name in _OF_ANSWERS if (value := report.get(name)) is not None}
        )

    def report(self) -> dict[str, float]:
        """Return the numbers that a report of a validation has of it: ``val_verdict``, 1, 0 or -1, and the changes."""
        numbers: dict[str, float] = {"val_verdict": self.outcome}
        for name, (mean, stderr) in self.changes.items():
            numbers |= {f"val_{name}_change": mean, f"val_{name}_stderr": stderr}
        return numbers | dict(self.answers)

    @property
    def word(self) -> str:
        """``better``, ``undecided`` or ``worse``."""
        return OUTCOMES[self.outcome]

    def sentence(self) -> str:
        """Return the outcome, changes and standard errors: ``worse than before training: loss +1.2 ± 0.2``."""
        figures = []
        for measure in MEASURES:
            mean, stderr = self.changes[measure.name]
            error = f" ± {stderr:{measure.form}}" if math.isfinite(stderr) else ""
            figures.append(f"{measure.label} {mean:+{measure.form}}{error}")
        than = f"{self.word} than" if self.outcome else "not certain to be better or worse than"
        if _repeats(self.answers):
            now, change = (self.answers[name] for name in _REPETITION)
            figures.append(f"answers that repeat {now:.0%} of their phrases, {now - change:.0%} before")
        if _are_empty(self.answers):
            figures.append("answers that are empty")
        return f"{than} before training: {', '.join(figures)}"


def _repeats(answers: Mapping[str, float]) -> bool:
    """Whether answers have come to repeat themselves."""
    if not all(name in answers for name in _REPETITION):
        return False
    now, change = (answers[name] for name in _REPETITION)
    return now > REPETITIVE and now - change < REPETITIVE / 2


def _are_empty(answers: Mapping[str, float]) -> bool:
    """Whether no answer has a token any more."""
    now, change = (answers.get(name, 0.0) for name in _LENGTH)
    return now == 0 > change


def sums_of_rows(values: NDArray[np.float64], rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return the sums of the values of each row's pairs: float64 [M, ``count``].

    Args:
        values: of M measures of N pairs, float64 [M, N].
        rows: which row each pair is from, numbered from 0, below ``count``: int64 [N].
    """
    return np.array([np.bincount(rows, of_measure, count) for of_measure in values], np.float64)


def worth_in_rows(rows: NDArray[np.int64]) -> int:
    """Return how many rows of one size are as much evidence as these: all of them where each has as many pairs.

    Source: Kish 1965, Survey Sampling, the effective size of a sample with weights.

    Args:
        rows: which row each pair is from, int64 [N].
    """
    sizes = np.unique(rows, return_counts=True)[1].tolist()
    return int(sum(sizes) ** 2 // sum(size**2 for size in sizes)) if sizes else 0


def error_of_rows(of_rows: NDArray[np.float64], pairs: float) -> NDArray[np.float64]:
    """Return the standard errors of M means over pairs, NaN where all are from one row: float64 [M].

    Where each row has one pair, they are the usual ones.
    Source: Liang and Zeger 1986, Longitudinal data analysis using generalized linear models.

    Args:
        of_rows: the sum of the distances of each row's pairs from the mean, float64 [M, R].
        pairs: how many there are.
    """
    measures, rows = of_rows.shape
    if rows < 2:
        return np.full(measures, np.nan)
    errors: NDArray[np.float64] = np.sqrt(rows / (rows - 1) * (of_rows**2).sum(1)) / pairs
    return errors


def students_t(freedom: int) -> float:
    """Return the two-sided 95 % point of Student's t, to 1 %.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z = Z
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))
