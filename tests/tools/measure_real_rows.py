"""Train a real model on real preference rows through the host's command, and print what became of held-out rows.

    python tests/tools/measure_real_rows.py --model MODEL_FOLDER [--model ANOTHER] --rows FOLDER_OF_JSONL

Each file is split into its first rows, to train on, and the ones after them, to validate on before and after. What is
printed is the Markdown table of docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """\
model: {model}
train: true
train_mode: cpo
data: {data}
adapter_path: {adapters}
beta: 0.05
learning_rate: 1e-4
batch_size: 4
epochs: 2
max_seq_length: 256
val_batches: -1
steps_per_report: 4
steps_per_eval: 1000
fuse: false
"""

HEADER = """\
| rows | model | trained on | held out | accuracy before | after | margin before | after |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def split(source: Path, folder: Path, train_rows: int, valid_rows: int) -> tuple[int, int]:
    """Write train.jsonl and valid.jsonl; a short file gives a third of its rows to the latter."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    valid = min(valid_rows, len(lines) // 3)
    train = min(train_rows, len(lines) - valid)
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:train]), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(lines[train : train + valid]), encoding="utf-8")
    return train, valid


def measure(model: Path, source: Path, train_rows: int, valid_rows: int) -> str:
    """Train, and return a row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, valid = split(source, folder / "data", train_rows, valid_rows)
        config = folder / "cpo.yaml"
        config.write_text(CONFIG.format(model=model, data=folder / "data", adapters=folder / "adapters"))
        command = [str(Path(sys.executable).parent / "mlx_lm_lora.train"), "--config", str(config)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        metrics = [json.loads(line) for line in (folder / "adapters" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line for line in metrics if line["kind"] == "valid"]
    accuracies = [f"{100 * line['val_accuracies']:.0f} %" for line in (before, after)]
    margins = [f"{line['val_margins']:+.2f}" for line in (before, after)]
    return f"| {source.stem} | {model.name} | {train} | {valid} | {' | '.join(accuracies)} | {' | '.join(margins)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=32)
    parser.add_argument("--valid-rows", type=int, default=16)
    args = parser.parse_args()
    print(HEADER)
    for model in args.model:
        for source in sorted(args.rows.glob("*.jsonl")):
            print(measure(model.resolve(), source, args.train_rows, args.valid_rows), flush=True)


if __name__ == "__main__":
    main()
