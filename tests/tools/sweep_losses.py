"""Sweep over losses and betas on the short rows of a file, by ``mlx-cpo sweep``.

    python tests/tools/sweep_losses.py --model MODEL_FOLDER --rows FILE.jsonl [--rows ANOTHER] --output FOLDER

Of each file, the first rows that are short enough are trained on, and the ones after them are held out. Started again,
a sweep goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.files import read_file
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.yaml_settings import dump_settings

# Losses of summed log-probs want small betas; those of means over tokens want large ones. For ipo, 1 / (2 * beta) is
# the margin that it aims at, in nats a token. The outer betas come first, for a sweep that is to try two of each.
BETAS = {
    "sigmoid": (0.05, 0.5, 0.1),
    "hinge": (0.05, 0.5, 0.1),
    "ipo": (0.1, 2.0, 0.5),
    "dpop": (0.05, 0.5, 0.1),
    "simpo": (2.0, 10.0, 5.0),
    "alphapo": (2.0, 10.0, 5.0),
}


def grids(losses: Sequence[str], betas: int) -> list[dict[str, Any]]:
    """Return a grid for each loss, and one for sigmoid with the likelihood term."""
    found: list[dict[str, Any]] = []
    for loss in losses:
        grid = {"dpo_cpo_loss_type": loss, "beta": list(BETAS[loss][:betas])}
        found += [grid, {**grid, "cpo_alpha": 1.0}] if loss == "sigmoid" else [grid]
    return found


def write_short_rows(rows: Path, folder: Path, args: argparse.Namespace) -> None:
    """Write the first rows of at most ``args.longest`` tokens, prompt and both answers, as two sets."""
    settings = RunSettings.of({"data": str(rows), "train": True})
    pairs, _, _ = load_dataset(settings, load_chat_tokenizer(str(args.model)))
    count = args.train_rows + args.valid_rows
    short = [pair.source for pair in pairs if pair.tokens <= args.longest][:count]
    if len(short) < count:
        raise SystemExit(f"{rows} has {len(short)} rows of at most {args.longest} tokens, not {count}.")
    by_source = {row.source: row.value for row in read_file(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in (("train", short[: args.train_rows]), ("valid", short[args.train_rows :])):
        lines = [json.dumps(by_source[source]) + "\n" for source in sources]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def sweep_file(rows: Path, args: argparse.Namespace) -> Path:
    """Write the sweep over the rows of one file, and return where it is."""
    folder = args.output / rows.stem
    write_short_rows(rows, folder / "rows", args)
    base = {"model": str(args.model), "data": str(folder / "rows"), "val_batches": -1, "steps_per_eval": 10**6}
    base |= {key: getattr(args, key) for key in ("epochs", "batch_size", "learning_rate", "num_layers")}
    file: Path = folder / "sweep.yaml"
    sweep = {"base": base, "grid": grids(args.losses, args.betas), "seeds": args.seeds}
    file.write_text(dump_settings(sweep), encoding="utf-8")
    return file


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, action="append", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--losses", nargs="+", choices=BETAS, default=list(BETAS))
    parser.add_argument("--betas", type=int, choices=(1, 2, 3), default=3, help="how many betas of each loss")
    parser.add_argument("--longest", type=int, default=110, help="tokens of prompt and both answers")
    parser.add_argument("--train-rows", type=int, default=64)
    parser.add_argument("--valid-rows", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--num-layers", type=int, default=8, help="layers with an adapter, counted from the last")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-more-runs", action="store_true", help="only show what is finished")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Carry out the sweep over each file; return the exit code of the first that fails, or 0."""
    args = arguments(given)
    rest = ["--no-more-runs"] * args.no_more_runs
    codes = [cli.main(["sweep", str(sweep_file(rows, args)), *rest]) for rows in args.rows]
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    raise SystemExit(main())
