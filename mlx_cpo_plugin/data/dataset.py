"""Build the data set of each split: its rows as pairs that fit, with a report of what was left out."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from mlx_cpo_plugin.data.columns import Columns, ColumnsRead, DataSettings, ValidationSettings, first_few, rows_in
from mlx_cpo_plugin.data.conversion import Outcome, RowConverter, SourcedRow, convert_rows
from mlx_cpo_plugin.data.files import numbered
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.ranked import row_key, row_of
from mlx_cpo_plugin.data.reading import RowGroup, read_splits
from mlx_cpo_plugin.data.report import DataReport, columns_of, findings
from mlx_cpo_plugin.data.rows import repeating_prompts
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import Lengths, OverlongRow, TruncatedPair
from mlx_cpo_plugin.errors import DataError, named
from mlx_cpo_plugin.types import Tokenizer, Values

Item = TypeVar("Item")


class PreferenceDataset(list[PreferencePair]):
    """The usable pairs of one split, in the order of their rows.

    Attributes:
        report: rows read, skipped and cut.
        tokenizer: fingerprint of the tokenizer; empty where it is not known.
        chat_tokenizer: what made the pairs; None where that is not known.
        cut_to: makes the data set again for a ``max_seq_length``; None where the pairs were cut already.
    """

    cut_to: Callable[[int], PreferenceDataset] | None = None
    chat_tokenizer: ChatTokenizer | None = None

    def __init__(
        self,
        pairs: Sequence[TruncatedPair] = (),
        split: str = "train",
        skipped: Mapping[str, Sequence[str]] | None = None,
        notes: tuple[str, ...] = (),
        tokenizer: str = "",
        *,
        too_long: Sequence[Lengths] = (),
        columns: ColumnsRead | None = None,
        train: Sequence[TruncatedPair] = (),
    ) -> None:
        super().__init__(cut.pair for cut in pairs)
        self._cut = pairs
        self._told = False
        self.tokenizer = tokenizer
        skipped, columns = skipped or {}, columns or ColumnsRead()
        report = DataReport(
            split=split,
            rows=_rows_behind([*(cut.pair.source for cut in pairs), *chain.from_iterable(skipped.values())]),
            pairs=len(pairs),
            skipped=skipped,
            prompts_cut=sum(cut.prompt_cut for cut in pairs),
            answers_cut=sum(cut.answer_cut for cut in pairs),
            lengths=columns_of([*(cut.whole for cut in pairs), *too_long]),
            columns=columns,
            notes=notes,
        )
        self._others: Values = {"skipped": skipped, "notes": notes, "too_long": too_long, "columns": columns}
        self.report = replace(report, findings=findings(report, pairs, train))

    def process(self, pair: PreferencePair) -> PreferencePair:
        """Return the pair as it is; mlx-lm-lora's ``CacheDataset`` calls this."""
        return pair

    def tell(self, say: Callable[[str], object]) -> None:
        """Pass the summary and what looks wrong to ``say``, the first time only."""
        for line in () if self._told else self.report.lines():
            say(line)
        self._told = True

    @classmethod
    def joined(cls, parts: Sequence[PreferenceDataset], spread: bool = False) -> PreferenceDataset:
        """Concatenate data sets, at least one; or :func:`spread_evenly` their pairs."""
        if len(parts) == 1:
            return parts[0]
        skipped: dict[str, list[str]] = {}
        for part in parts:
            for reason, places in part.report.skipped.items():
                skipped.setdefault(reason, []).extend(places)
        cuts = [part._cut for part in parts]
        pairs = spread_evenly(cuts) if spread else [*chain(*cuts)]
        too_long = [whole for part in parts for whole in part._others["too_long"]]
        notes = tuple(dict.fromkeys(note for part in parts for note in part.report.notes))
        columns = ColumnsRead.joined([part.report.columns for part in parts])
        split, tokenizer = parts[0].report.split, parts[0].tokenizer
        joined = cls(pairs, split, skipped, notes, tokenizer, too_long=too_long, columns=columns)
        joined.chat_tokenizer = parts[0].chat_tokenizer
        return joined

    def beside(self, train: PreferenceDataset) -> PreferenceDataset:
        """The same data set, whose report says which of its rows are in ``train``, too."""
        if not self or not train:
            return self
        made = PreferenceDataset(
            self._cut, self.report.split, tokenizer=self.tokenizer, **self._others, train=train._cut
        )
        made.cut_to = self.cut_to
        return made

    def split_off(self, fraction: float, seed: int) -> tuple[PreferenceDataset, PreferenceDataset]:
        """Training and validation set: ``fraction`` of the rows, at least one, drawn by ``seed``, go to the latter.

        Of a single row nothing goes there.
        """
        # The pairs of a row with several answers stay together.
        rows = [row_key(cut.pair.source, place) for place, cut in enumerate(self._cut)]
        each = list(dict.fromkeys(rows))
        drawn = set(random.Random(seed).sample(each, rows_held_out(fraction, len(each))))
        kept, carved = (
            [cut for row, cut in zip(rows, self._cut, strict=True) if (row in drawn) == taken]
            for taken in (False, True)
        )
        note = f"Drawn from the training set (valid_fraction {fraction:g}, seed {seed})."
        training = PreferenceDataset(kept, self.report.split, tokenizer=self.tokenizer, **self._others)
        return training, PreferenceDataset(carved, "valid", notes=(note,))

    @classmethod
    def mixed(cls, parts: Sequence[tuple[str, float, PreferenceDataset]], seed: int) -> PreferenceDataset:
        """Concatenate data sets, each with its name and its weight: how often an epoch has each of its pairs.

        Of a weight with a fraction, that share of the pairs, drawn by ``seed``, comes once more. The report is that of
        the rows, however often they come.
        """
        joined = copy(cls.joined([part for _, _, part in parts]))
        cuts = [(name, weight, part.cut_to) for name, weight, part in parts if part.cut_to]
        if len(cuts) == len(parts):
            joined.cut_to = lambda length: cls.mixed([(name, weight, cut(length)) for name, weight, cut in cuts], seed)
        if all(weight == 1 for _, weight, _ in parts):
            return joined
        epoch: list[PreferencePair] = []
        sizes = []
        for name, weight, part in parts:
            pairs = _weighted(part, weight, seed)
            sizes.append((f"{len(pairs)} of {name} (weight {weight:g})", len(pairs)))
            epoch += pairs
        told = [f"{what}, {size / max(len(epoch), 1):.0%}" for what, size in sizes]
        joined[:] = epoch
        note = f"An epoch has {len(epoch)}: {'; '.join(told)}."
        joined.report = replace(joined.report, notes=(*joined.report.notes, note))
        return joined


def _weighted(pairs: Sequence[PreferencePair], weight: float, seed: int) -> list[PreferencePair]:
    """The pairs as often as a weight says, at least one of them."""
    whole = int(weight)
    rest = round((weight - whole) * len(pairs)) or (not whole and bool(pairs))
    return [*pairs] * whole + [pairs[i] for i in sorted(random.Random(seed).sample(range(len(pairs)), rest))]


def spread_evenly(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the items of all parts, each in its order, so that of the first ones each part has its share."""
    placed = [((number + 0.5) / len(part), item) for part in parts for number, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda each: each[0])]


def _rows_behind(sources: Sequence[str]) -> int:
    """How many rows pairs, or skipped rows, come from."""
    several = {row for source in sources if (row := row_of(source)) != source}
    return len(several) + sum(row_of(source) == source for source in sources)


Splits = tuple[PreferenceDataset, PreferenceDataset, PreferenceDataset]

SPENT = 0.1
"""The share of rows of which the cut may leave nothing of the prompt or an answer; they are skipped."""


def load_dataset(
    settings: DataSettings, tokenizer: Tokenizer, rows: Mapping[str, Iterable[object]] | None = None
) -> Splits:
    """Read, tokenise and cut the splits that ``train`` and ``test`` ask for; the others are empty.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper, or the tokenizer inside it.
        rows: raw rows by split, to take in place of those that the settings name.

    Raises:
        DataError: data is missing or unreadable, a column is missing, or more than half of the rows are unusable.
    """
    wanted = (["train", "valid"] if settings.train else []) + (["test"] if settings.test else [])
    splits = load_splits(settings, tokenizer, wanted, rows)
    require_splits(settings, splits)
    return splits


def require_splits(settings: DataSettings, splits: Sequence[PreferenceDataset]) -> None:
    """Raise DataError where ``train``, ``test`` or ``load_best`` is on and has no pairs to go by."""
    for split in splits:
        name = split.report.split
        if name != "valid" and getattr(settings, name) and not split:
            raise DataError(
                f"{name} is on, but the data holds no {name} rows: add some, or set {name}: false.", key=name
            )
        if name == "valid" and settings.train:
            require_validation(settings, split)


def require_validation(settings: ValidationSettings, valid: Sequence[PreferencePair]) -> None:
    """Raise DataError where the weights that validate best are wanted, but nothing is validated."""
    if settings.load_best and not (valid and settings.val_batches):
        missing, remedy = (
            ("the data holds no valid rows", "add some, set valid_fraction")
            if settings.val_batches
            else ("val_batches is 0", "set it to -1")
        )
        raise DataError(f"load_best is on, but {missing}: {remedy}, or set load_best: false.", key="load_best")


def load_splits(
    settings: DataSettings,
    tokenizer: Tokenizer,
    wanted: Sequence[str],
    rows: Mapping[str, Iterable[object]] | None = None,
) -> Splits:
    """Like :func:`load_dataset`, for the ``wanted`` splits; those that the data does not have are empty."""
    return splits_of_rows(read_splits(settings, wanted, rows), tokenizer, settings)


def splits_of_rows(read: Mapping[str, Sequence[RowGroup]], tokenizer: Tokenizer, settings: DataSettings) -> Splits:
    """Tokenise and cut the rows that :func:`~.reading.read_splits` has read; raises DataError as it does."""
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    # The training set in as many parts as there are sets with a weight of their own.
    parts: dict[tuple[str, float], list[RowGroup]] = {}
    for group in read.get("train", ()):
        parts.setdefault(group.share or ("", 1.0), []).append(group)
    parts = parts or {("", 1.0): []}
    sets = [
        (*share, make_pairs(groups, chat_tokenizer, "train", settings.max_seq_length, settings.overlong))
        for share, groups in parts.items()
    ]
    valid, test = (
        make_pairs(read.get(split, ()), chat_tokenizer, split, settings.max_seq_length, settings.overlong)
        for split in ("valid", "test")
    )
    if "valid" in read and any(pairs for *_, pairs in sets) and not valid:
        if settings.valid_fraction:
            halves = [pairs.split_off(settings.valid_fraction, settings.seed) for *_, pairs in sets]
            sets = [(*share, train) for share, (train, _) in zip(parts, halves, strict=True)]
            valid = PreferenceDataset.joined([carved for _, carved in halves], spread=True)
            if not valid:
                raise DataError(
                    "valid_fraction needs at least two usable training rows: add rows, or set it to 0.",
                    key="valid_fraction",
                )
        else:
            note = "No validation set, so validation is skipped; valid_fraction takes one from the training set."
            valid = PreferenceDataset(split="valid", notes=(note,))
    train = PreferenceDataset.mixed(sets, settings.seed)
    splits_of_run = train, valid.beside(train), test.beside(train)
    for pairs in splits_of_run:
        pairs.chat_tokenizer = chat_tokenizer
    return splits_of_run


def rows_held_out(fraction: float, rows: int) -> int:
    """Return how many of so many rows ``valid_fraction`` takes: at least one, but never the last."""
    return min(max(1, round(fraction * rows)), max(rows - 1, 0))


def pairs_of_rows(
    rows: Iterable[object], tokenizer: Tokenizer, settings: DataSettings, split: str = "train"
) -> PreferenceDataset:
    """Tokenise and cut raw rows of any accepted format, as :func:`load_dataset` does those of a file.

    Where ``max_seq_length`` is None, they are cut when it is known, by ``cut_to``.
    """
    groups = rows_as_group(rows, Columns.from_settings(settings))
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    return make_pairs(groups, chat_tokenizer, split, settings.max_seq_length, settings.overlong)


def rows_as_group(rows: Iterable[object], columns: Columns) -> list[RowGroup]:
    """Return rows of a call as the one group that they are; raises DataError as the rows of a file do."""
    group = RowGroup("the data set", numbered(rows_in(rows, "the data set"), "row", before=" "), columns)
    columns.check([row.value for row in group.rows], group.name)
    return [group]


def make_pairs(
    groups: Sequence[RowGroup], tokenizer: ChatTokenizer, split: str, max_length: int | None, overlong: str
) -> PreferenceDataset:
    """Return the data set of the rows of a split; raises DataError as :func:`collect` and :func:`load_dataset` do."""
    repeating = [repeating_prompts([row.value for row in group.rows], group.columns) for group in groups]
    read_as = [
        replace(group.columns, prompt_repeated=bool(repeats)) for group, repeats in zip(groups, repeating, strict=True)
    ]
    of_groups = [
        [
            SourcedRow(value, columns, source)
            for row in group.rows
            for value, source in columns.pair_rows(row.value, row.source)
        ]
        for group, columns in zip(groups, read_as, strict=True)
    ]
    # A validation of a few batches is to be one of all sets.
    rows = [*chain(*of_groups)] if split == "train" else spread_evenly(of_groups)
    outcomes = convert_rows(rows, RowConverter(tokenizer, max_length or sys.maxsize, overlong))
    notes = tuple(group.note for group in groups if group.note)
    if repeats := sum(repeating):
        notes += (f"Both answers begin with the prompt in {repeats}, and are read without it.",)
    name = named(" and ".join(group.name for group in groups))
    columns = ColumnsRead.joined([group.columns.read([row.value for row in group.rows]) for group in groups])
    pairs = collect(outcomes, [row.source for row in rows], name, split, notes, tokenizer.digest(), columns)
    pairs.chat_tokenizer = tokenizer
    if max_length is None:
        pairs.cut_to = lambda length: make_pairs(groups, tokenizer, split, length, overlong)
    return pairs


def collect(
    outcomes: Iterable[Outcome],
    sources: Sequence[str],
    name: str,
    split: str,
    notes: tuple[str, ...] = (),
    tokenizer: str = "",
    columns: ColumnsRead | None = None,
) -> PreferenceDataset:
    """The data set of converted items, the unusable ones set aside under their sources.

    Raises:
        DataError: more than half are unusable, or the cut leaves nothing of the prompt or an answer of more than
            :data:`SPENT`, not counting those that the settings leave out.
    """
    pairs: list[TruncatedPair] = []
    skipped: dict[str, list[str]] = {}
    too_long: list[OverlongRow] = []
    left_out: Counter[str] = Counter()
    overlong = 0
    for outcome, source in zip(outcomes, sources, strict=True):
        if isinstance(outcome, UnusableRow):
            skipped.setdefault(str(outcome), []).append(source)
            left_out[str(outcome)] += outcome.by_choice
            overlong += outcome.by_choice and isinstance(outcome, OverlongRow)
            too_long += [outcome] if isinstance(outcome, OverlongRow) else []
        else:
            pairs.append(outcome)
    others = sum(map(len, skipped.values())) - left_out.total()
    if overlong and not (pairs or others):
        raise DataError(
            f"no row of {name} fits: raise max_seq_length, or set overlong: cut.", key="max_seq_length", place=name
        )
    if left_out.total() and not (pairs or others):
        raise DataError(f"no row of {name} has scores that differ by min_gap: lower it.", key="min_gap", place=name)
    dataset = PreferenceDataset(
        pairs, split, skipped, notes, tokenizer, too_long=[row.whole for row in too_long], columns=columns
    )
    spent = len(too_long) - overlong
    if spent > SPENT * (spent + len(pairs)):
        reason = next(str(outcome) for outcome in too_long if not outcome.by_choice)
        raise DataError(
            f"{reason} in {skipped[reason][0]}, and so it is in {spent} of {spent + len(pairs)} rows of {name}, more "
            f"than {SPENT:.0%}: raise max_seq_length ({dataset.report.max_seq_length_for(0.95)} keeps 95% of the rows "
            "whole), or set overlong: drop.",
            key="max_seq_length",
            place=skipped[reason][0],
        )
    unusable = sum(map(len, skipped.values())) - left_out.total()
    if unusable > len(pairs):
        reason, places = max(skipped.items(), key=lambda entry: len(entry[1]) - left_out[entry[0]])
        raise DataError(
            f"{unusable} of {len(sources)} rows of {name} cannot be used, mostly because {reason} "
            f"({first_few(places, 3)}): correct or remove them.",
            place=places[0],
        )
    return dataset
