"""What became of the rows of a split: counts, lengths before and after the cut, and notes on what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.columns import ColumnsRead, first_few
from mlx_cpo_plugin.data.tokens import Lengths, TruncatedPair
from mlx_cpo_plugin.errors import shown

FEW = 0.03
"""The share of pairs that may lose something to the cut without a warning."""


@dataclass(frozen=True)
class DataReport:
    """What the rows of one split were made into.

    Attributes:
        split: ``train``, ``valid`` or ``test``.
        rows, pairs: rows read, and pairs made of them.
        skipped: reason -> the sources of the rows left out for it, e.g. ``train.jsonl:12``.
        prompts_cut, answers_cut: pairs of which the prompt, or an answer, was cut to ``max_seq_length``.
        lengths: ``prompt``, ``chosen``, ``rejected`` -> tokens of each pair before any cut, int [pairs]; those of rows
            that were left out for their length follow.
        columns: which were read.
        notes: how the rows were chosen, one sentence each.
        findings: what looks wrong with them, a warning or note each.
    """

    split: str
    rows: int = 0
    pairs: int = 0
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prompts_cut: int = 0
    answers_cut: int = 0
    lengths: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    columns: ColumnsRead = field(default_factory=ColumnsRead)
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def all_used(self) -> bool:
        """Whether every row is a pair, and none was cut."""
        return not (self.skipped or self.prompts_cut or self.answers_cut)

    def summary(self) -> str:
        """One line: ``Train: 1360 rows, 1358 pairs, 2 skipped (an answer is empty: train.jsonl:3, train.jsonl:9)``."""
        notes = " ".join(self.notes)
        if not self.rows:
            return f"{self.split.capitalize()}: {notes or 'none.'}"
        parts = [f"{self.rows} row{'s' * (self.rows != 1)}", f"{self.pairs} pair{'s' * (self.pairs != 1)}"]
        if self.skipped:
            reasons = [f"{reason}: {first_few(places, 3)}" for reason, places in self.skipped.items()]
            parts.append(f"{sum(map(len, self.skipped.values()))} skipped ({first_few(reasons, 8, '; ')})")
        if self.prompts_cut:
            parts.append(f"prompt cut in {self.prompts_cut}")
        if self.answers_cut:
            parts.append(f"answer cut in {self.answers_cut}")
        return f"{self.split.capitalize()}: {', '.join(parts)}. {notes}".rstrip()

    def lines(self) -> list[str]:
        """Return the summary, and what looks wrong."""
        return [self.summary(), *self.findings]

    def max_seq_length_for(self, share: float) -> int:
        """Return the smallest ``max_seq_length`` that leaves this share of the pairs whole."""
        longest = self.lengths["prompt"] + np.maximum(self.lengths["chosen"], self.lengths["rejected"])
        return int(np.sort(longest)[math.ceil(share * len(longest)) - 1])


def columns_of(whole: Sequence[Lengths]) -> dict[str, NDArray[np.int64]]:
    """Return the lengths of each part, int [pairs]."""
    table = np.array(whole, dtype=np.int64).reshape(-1, len(Lengths._fields))
    return dict(zip(Lengths._fields, table.T, strict=True))


def findings(report: DataReport, cuts: Sequence[TruncatedPair], train: Sequence[TruncatedPair]) -> tuple[str, ...]:
    """Return what looks wrong with the pairs of a split, a warning or note each with the first place and the number.

    Args:
        train: the training set, if this is another split.
    """
    found = (
        _losses(report, cuts),
        _control_text(cuts),
        *_unwritten(cuts),
        _without_prompt(cuts),
        _unread_column(report.columns),
        _repeats(cuts),
        _in_training_set(cuts, train),
    )
    return tuple(line for line in found if line)


def _losses(report: DataReport, cuts: Sequence[TruncatedPair]) -> str:
    pairs = len(cuts)
    if max(report.prompts_cut, report.answers_cut) <= FEW * pairs:
        return ""
    halved = sum(2 * len(cut.pair.prompt) < cut.whole.prompt for cut in cuts)
    return (
        f"Warning: the cut to max_seq_length shortens {report.prompts_cut / pairs:.0%} of the prompts "
        f"({halved / pairs:.0%} by more than half) and an answer in {report.answers_cut / pairs:.0%} of the pairs; "
        f"{report.max_seq_length_for(0.95)} keeps 95% of the pairs whole, {report.max_seq_length_for(1)} all."
    )


def _control_text(cuts: Sequence[TruncatedPair]) -> str:
    holding = [cut for cut in cuts if cut.control_text]
    if not holding:
        return ""
    text, source = shown(holding[0].control_text), holding[0].pair.source
    return (
        f"note: {_number(holding)} {text} or the like in the text (first {source}), which is for the chat template to "
        "write: give the text without it."
    )


def _unwritten(cuts: Sequence[TruncatedPair]) -> Iterator[str]:
    for what in dict.fromkeys(what for cut in cuts for what in cut.unwritten):
        holding = [cut for cut in cuts if what in cut.unwritten]
        first = holding[0].pair.source
        yield f"note: {_number(holding)} {what} (first {first}), which the chat template does not write."


def _without_prompt(cuts: Sequence[TruncatedPair]) -> str:
    plain = [cut for cut in cuts if cut.is_plain]
    if len(plain) in (0, len(cuts)):
        return ""
    return (
        f"note: {_number(plain, 'has', 'have')} no prompt (first {plain[0].pair.source}): read as plain text, without "
        "the chat template."
    )


def _unread_column(columns: ColumnsRead) -> str:
    if not columns.doubtful:
        return ""
    column, part = next(iter(columns.doubtful.items()))
    if not part:
        return f"note: the column {column} is not read: what is trained on is the text alone."
    read = " and ".join(columns.read.get(part, ()))
    if not read:
        return f"note: the column {column} is not read, and no other as the {part}; set {part}_feature if it is."
    return f"note: the column {column} is not read, as the {part} is in {read}; set {part}_feature to read another."


def _repeats(cuts: Sequence[TruncatedPair]) -> str:
    first: dict[object, TruncatedPair] = {}
    again = [(cut, there) for cut in cuts if (there := first.setdefault(_contents(cut), cut)) is not cut]
    if not again:
        return ""
    where = f"{again[0][0].pair.source} is {again[0][1].pair.source}"
    return f"note: {_number(again, 'repeats', 'repeat')} an earlier one ({where})."


def _in_training_set(cuts: Sequence[TruncatedPair], train: Sequence[TruncatedPair]) -> str:
    there = {_contents(cut): cut for cut in train}
    known = [(cut, there[key]) for cut in cuts if (key := _contents(cut)) in there]
    if not known:
        return ""
    where = f"{known[0][0].pair.source} is {known[0][1].pair.source}"
    return (
        f"note: {_number(known, 'is', 'are')} in the training set, too ({where}): what is measured on them does not "
        "hold for new ones."
    )


def _contents(cut: TruncatedPair) -> object:
    """What rows have in common that were alike before the cut."""
    pair = cut.pair
    return cut.whole, pair.prompt.tobytes(), pair.chosen.tobytes(), pair.rejected.tobytes()


def _number(rows: Sequence[object], one: str = "holds", many: str = "hold") -> str:
    return f"1 row {one}" if len(rows) == 1 else f"{len(rows)} rows {many}"
