"""Write the demo's preference rows: ``python -m mlx_cpo_plugin.demo.make_rows``.

The facts are split first, so a question of the validation and test rows asks for a fact that no training row asks for.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mlx_cpo_plugin.demo.shop import Fact, curt_answer, helpful_answer, make_facts

DATA_DIR = Path(__file__).parent / "data"
SEED = 7
VALID_FACTS, TEST_FACTS = 40, 60

Row = dict[str, str]


def make_rows(seed: int = SEED) -> dict[str, list[Row]]:
    """Return the rows of each split: 280 train (two phrasings of 140 facts), 40 valid, 60 test."""
    source = random.Random(seed)
    facts = make_facts(seed)
    source.shuffle(facts)
    held_out = VALID_FACTS + TEST_FACTS
    rows = {
        "valid": [_row(fact, source.randrange(3), source) for fact in facts[:VALID_FACTS]],
        "test": [_row(fact, source.randrange(3), source) for fact in facts[VALID_FACTS:held_out]],
        "train": [_row(fact, phrasing, source) for fact in facts[held_out:] for phrasing in source.sample(range(3), 2)],
    }
    source.shuffle(rows["train"])
    return rows


def _row(fact: Fact, phrasing: int, source: random.Random) -> Row:
    return {
        "prompt": fact.question(phrasing),
        "chosen": helpful_answer(fact, source),
        "rejected": curt_answer(fact, source),
    }


def write_rows(folder: Path, seed: int = SEED) -> None:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows(seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's preference rows.")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of facts, split and sentences")
    options = parser.parse_args()
    write_rows(options.out, options.seed)


if __name__ == "__main__":
    main()
