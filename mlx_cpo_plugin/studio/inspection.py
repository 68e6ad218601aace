"""What training would see, as JSON: ``python -m mlx_cpo_plugin.studio.inspection CONFIG OUTPUT``.

A process of its own, so that neither tokenizer nor arrays stay with the page. Rows are read once. The output is
written three times: of the first rows of each set, of all rows, and with the report of ``mlx-cpo check``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.commands.check import run_check, scored_runs
from mlx_cpo_plugin.data.dataset import PreferenceDataset, Splits, splits_of_rows
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.reading import RowGroup, read_splits
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.studio.child import leave, work_on_config
from mlx_cpo_plugin.types import Tokenizer

SPLITS = ("train", "valid", "test")
EXAMPLES = 20
PLACES = 20
SAMPLE = 100
"""Rows of each set that are looked at first, where there are more than ten times as many in a split."""


def inspect(config: Path, output: Path) -> None:
    """Write rows, lengths and pairs of each split as plain values, with the report of ``mlx-cpo check`` as text.

    Raises:
        UserError: configuration or data are at fault; what could be looked at has been written.
    """
    settings = resolve({"train": True}, config).settings
    report: dict[str, Any] = {"text": "", "error": "", "splits": [], "sample": 0}

    def write(splits: Splits, sample: int = 0) -> None:
        report["splits"] = [_split(dataset) for dataset in splits if dataset.report.rows]
        report["sample"] = sample
        leave(report, output)

    def load(settings: RunSettings, tokenizer: Tokenizer) -> Splits:
        _say("Reading the rows.")
        rows = read_splits(settings, SPLITS)
        if max(sum(len(group.rows) for group in groups) for groups in rows.values()) > 10 * SAMPLE:
            with suppress(UserError):  # of all rows, if anything is
                write(splits_of_rows(_first(rows), tokenizer, settings), SAMPLE)
        _say("Tokenising.")
        splits = splits_of_rows(rows, tokenizer, settings)
        write(splits)
        _say("Planning the run.")
        return splits

    printed = io.StringIO()
    try:
        run_check(settings, train_modes()[settings.train_mode], printed, examples=0, load=load)
    except UserError as error:
        if not report["splits"] or report["sample"]:
            raise
        report["error"] = str(error)
    leave(report | {"text": printed.getvalue()}, output)


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _first(splits: Mapping[str, Sequence[RowGroup]]) -> dict[str, list[RowGroup]]:
    return {split: [replace(group, rows=group.rows[:SAMPLE]) for group in groups] for split, groups in splits.items()}


def _split(dataset: PreferenceDataset) -> dict[str, Any]:
    report, tokenizer = dataset.report, dataset.chat_tokenizer
    assert tokenizer is not None  # as of whatever is loaded
    return {
        "name": report.split,
        "rows": report.rows,
        "pairs": report.pairs,
        "skipped": {reason: [len(places), list(places[:PLACES])] for reason, places in report.skipped.items()},
        "prompts_cut": report.prompts_cut,
        "answers_cut": report.answers_cut,
        "notes": [*report.notes, *report.findings],
        "lengths": {part: lengths.tolist() for part, lengths in report.lengths.items()},
        "examples": [_example(pair, tokenizer) for pair in dataset[:EXAMPLES]],
    }


def _example(pair: PreferencePair, tokenizer: ChatTokenizer) -> dict[str, Any]:
    return {
        "source": pair.source,
        "prompt": tokenizer.decode(pair.prompt),
        "chosen": scored_runs(pair.chosen, pair.chosen_scored, tokenizer),
        "rejected": scored_runs(pair.rejected, pair.rejected_scored, tokenizer),
    }


if __name__ == "__main__":
    sys.exit(work_on_config(inspect))
