"""What training would see, as JSON: ``python -m mlx_cpo_plugin.studio.inspection CONFIG OUTPUT``.

A process of its own, so that neither tokenizer nor arrays stay with the page.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.commands.check import run_check, scored_runs
from mlx_cpo_plugin.data.dataset import PreferenceDataset, load_splits
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.settings.config import resolve

EXAMPLES = 20
PLACES = 20


def inspect(config: Path) -> dict[str, Any]:
    """Return the report of ``mlx-cpo check`` as text, and rows, lengths and pairs of each split as plain values.

    Raises:
        UserError: configuration or data are at fault.
    """
    settings = resolve({"train": True}, config).settings
    printed = io.StringIO()
    run_check(settings, train_modes()[settings.train_mode], printed, examples=0)
    tokenizer = load_chat_tokenizer(settings.model)
    splits = load_splits(settings, tokenizer, ("train", "valid", "test"))
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    return {
        "text": printed.getvalue(),
        "max_seq_length": settings.max_seq_length,
        "splits": [_split(dataset, chat_tokenizer) for dataset in splits if dataset.report.rows],
    }


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


def main() -> int:
    """Write the report into the file that the command line names; what is wrong goes to standard error."""
    config, output = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        report = inspect(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    output.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
