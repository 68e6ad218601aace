"""What training would see, as JSON: ``python -m mlx_cpo_plugin.studio.inspection CONFIG OUTPUT``.

A process of its own, so that neither tokenizer nor arrays stay with the page. Rows are tokenised once. The output is
written three times: of the first rows of each split, of all rows, and with the report of ``mlx-cpo check``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.commands.check import run_check, scored_runs
from mlx_cpo_plugin.data.dataset import PreferenceDataset, load_splits
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.studio.child import leave, work_on_config

SPLITS = ("train", "valid", "test")
EXAMPLES = 20
PLACES = 20
SAMPLE = 100
"""Rows of each split that are looked at first, where there are more than ten times as many."""


def inspect(config: Path, output: Path) -> None:
    """Write rows, lengths and pairs of each split as plain values, with the report of ``mlx-cpo check`` as text.

    Raises:
        UserError: configuration or data are at fault; what could be looked at has been written.
    """
    settings = resolve({"train": True}, config).settings
    mode = train_modes()[settings.train_mode]
    report: dict[str, Any] = {"text": "", "error": "", "splits": [], "sample": 0}

    def write(splits: Sequence[PreferenceDataset], tokenizer: ChatTokenizer, sample: int = 0) -> None:
        report["splits"] = [_split(dataset, tokenizer) for dataset in splits if dataset.report.rows]
        report["sample"] = sample
        leave(report, output)

    with suppress(UserError):  # of all rows, if anything is
        _look_at_first(settings, write)
    printed = io.StringIO()
    try:
        run_check(settings, mode, printed, examples=0, loaded=write)
    except UserError as error:
        if not report["splits"] or report["sample"]:
            raise
        report["error"] = str(error)
    leave(report | {"text": printed.getvalue()}, output)


def _look_at_first(settings: RunSettings, write: Any) -> None:
    """Write what the first rows are, where tokenising all of them takes long."""
    print("Reading the rows.", file=sys.stderr, flush=True)
    rows = {
        split: [row.value for group in groups for row in group.rows]
        for split, groups in read_splits(settings, SPLITS).items()
    }
    if max(map(len, rows.values()), default=0) > 10 * SAMPLE:
        tokenizer = load_chat_tokenizer(settings.model)
        first = {split: some[:SAMPLE] for split, some in rows.items()}
        splits = load_splits(settings, tokenizer, [*first], first)
        write(splits, ChatTokenizer.from_settings(tokenizer, settings), SAMPLE)
    print("Tokenising.", file=sys.stderr, flush=True)


def _split(dataset: PreferenceDataset, tokenizer: ChatTokenizer) -> dict[str, Any]:
    report = dataset.report
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
