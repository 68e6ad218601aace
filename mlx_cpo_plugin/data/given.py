"""Data sets that a call gives, of raw rows, tokens or pairs, as pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mlx_cpo_plugin.data.columns import Columns, rows_in
from mlx_cpo_plugin.data.conversion import Outcome
from mlx_cpo_plugin.data.dataset import PreferenceDataset, collect, make_pairs, rows_as_group
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer, TokenIds, as_ids, common_prefix
from mlx_cpo_plugin.data.tokens import CUT, Side, split_pair, truncate
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.types import Tokenizer


def as_pairs(
    dataset: Sequence[object] | None,
    max_seq_length: int | None = None,
    tokenizer: Tokenizer | None = None,
    split: str = "train",
) -> PreferenceDataset:
    """Pairs of any preference data, cut to ``max_seq_length`` where it is given.

    Args:
        dataset: a PreferenceDataset, a sequence of PreferencePair, raw rows as any iterable, or a sequence of mappings
            with the token ids ``chosen`` and ``rejected`` and, where known, ``chosen_prompt_length`` and
            ``rejected_prompt_length`` (without them the prompt is what both sides share); None is an empty one.
        max_seq_length: tokens that either side may have, prompt included. Where a prompt of token ids is cut, the token
            with which all items begin stays first.
        tokenizer: turns raw rows into tokens.
        split: which one the report names.

    Raises:
        DataError: an item is something else, there is no tokenizer for raw rows, or more than half of the items are
            unusable.
    """
    if dataset is None:
        return PreferenceDataset(split=split)
    digest = ""
    if isinstance(dataset, PreferenceDataset):
        if max_seq_length is None or all(pair.length <= max_seq_length for pair in dataset):
            return dataset
        if dataset.cut_to is not None:
            return dataset.cut_to(max_seq_length)
        split, digest = dataset.report.split, dataset.tokenizer
    # Data sets of mlx-lm-lora have no iterator of their own; generators have nothing else.
    rows_in(dataset, f"the {split} data set")
    items = [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "__len__") else list(dataset)
    if any(_is_row(item) for item in items) and all(isinstance(item, Mapping) for item in items):
        if tokenizer is None:
            raise DataError(
                "The data set holds rows, not token ids: give their tokenizer as tokenizer=, or the data set that "
                "create_dataset or load_dataset of mlx-lm-lora makes of them with train_mode 'cpo'.",
                key="tokenizer",
            )
        return make_pairs(rows_as_group(items, Columns()), ChatTokenizer(tokenizer), split, max_seq_length, CUT)

    sources = [f"item {i}" for i in range(len(items))]
    pairs = [
        item if isinstance(item, PreferencePair) else _sides_of_item(item, source)
        for item, source in zip(items, sources, strict=True)
    ]
    # BOS is not known from ids alone: it is what all of several items begin with.
    firsts = [pair.prompt[:1] if isinstance(pair, PreferencePair) else pair[0].ids[:1] for pair in pairs]
    beginnings = {int(first[0]) for first in firsts if len(first)}
    bos_id = beginnings.pop() if len(pairs) > 1 and len(beginnings) == 1 else None

    def outcome(item: PreferencePair | tuple[Side, Side], source: str) -> Outcome:
        try:
            pair = item if isinstance(item, PreferencePair) else split_pair(*item, source)
            return truncate(pair, sys.maxsize if max_seq_length is None else max_seq_length, bos_id)
        except UnusableRow as error:
            return error

    return collect(map(outcome, pairs, sources), sources, "the data set", split, tokenizer=digest)


def _is_row(item: object) -> bool:
    """Whether an item is a raw row, with text or messages in place of token ids."""
    return isinstance(item, Mapping) and not all(_are_ids(item.get(side)) for side in ("chosen", "rejected"))


def _are_ids(side: object) -> bool:
    if not isinstance(side, Iterable) or isinstance(side, str | Mapping):
        return False
    return not any(isinstance(token, str | Mapping) for token in side)


def _sides_of_item(item: object, source: str) -> tuple[Side, Side]:
    """Both sides of one item of mlx-lm-lora's tokenised data sets."""
    values = item if isinstance(item, Mapping) else {}
    try:
        ids = [_given_ids(values[part]) for part in ("chosen", "rejected")]
        known = [values.get(f"{part}_prompt_length") for part in ("chosen", "rejected")]
        known = [None if size is None else int(size) for size in known]
    except (KeyError, TypeError, ValueError, IndexError):
        raise DataError(
            f"{source} of the data set is not a tokenised preference: give token ids, whole numbers from 0 on, as "
            "chosen and rejected (and in chosen_prompt_length how many are the prompt's), or rows of text or messages "
            "and their tokenizer.",
            key="data",
            place=source,
        ) from None
    shared = common_prefix(*ids)
    sizes = [shared if size is None else size for size in known]
    chosen, rejected = (Side(side, np.arange(len(side)) >= size) for side, size in zip(ids, sizes, strict=True))
    return chosen, rejected


def _given_ids(side: object) -> TokenIds:
    """Return a caller's token ids as int32 [T]; raise ValueError where they are none."""
    given = np.asarray(side)
    if given.size and (given.dtype.kind not in "iuf" or not np.all((given >= 0) & (given < 2**31) & (given % 1 == 0))):
        raise ValueError(side)
    return as_ids(given)
