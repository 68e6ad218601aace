"""Train a model once for each loss and beta, and plot what became of held-out rows.

    python tests/tools/sweep_losses.py --model MODEL_FOLDER --rows FILE.jsonl [--rows ANOTHER] --output FOLDER

Of each file, the first rows that are short enough are trained on, and the ones after them are held out. Every finished
run is a line of ``runs.jsonl`` in the output folder; started again, the sweep goes on after the last of them. At its
end it draws ``losses-NAME.svg`` for each file. What is compared does not depend on beta: log-probs in nats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import batch_generate

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.run.building import load_model
from mlx_cpo_plugin.run.mode import train_mode
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.validation import evaluate_pairs

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


@dataclass(frozen=True)
class Setting:
    """What one run trains with; ``loss`` is None for the model as it is."""

    loss: str | None = None
    beta: float = 1.0
    cpo_alpha: float = 0.0

    @property
    def label(self) -> str:
        """The name of the curve that the run is a point of."""
        return f"{self.loss}, cpo_alpha {self.cpo_alpha:g}" if self.cpo_alpha else str(self.loss)


def settings_of(losses: Sequence[str], betas: int) -> Iterator[Setting]:
    """Yield the untrained model, then every loss, and sigmoid with the likelihood term, one beta after the other."""
    yield Setting()
    for number in range(betas):
        for loss in losses:
            yield Setting(loss, BETAS[loss][number])
            if loss == "sigmoid":
                yield Setting(loss, BETAS[loss][number], cpo_alpha=1.0)


def run_settings(setting: Setting, rows: Path, adapter_path: str, args: argparse.Namespace) -> SimpleNamespace:
    """Return every setting of a run."""
    given = {
        "model": str(args.model),
        "data": str(rows),
        "adapter_path": adapter_path,
        "train": True,
        "train_mode": "cpo",
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "num_layers": args.num_layers,
        "seed": args.seed,
        "fuse": False,
    }
    if setting.loss is not None:
        given |= {"dpo_cpo_loss_type": setting.loss, "beta": setting.beta, "cpo_alpha": setting.cpo_alpha}
    return resolve(given).settings


def short_rows(rows: Path, tokenizer: Any, args: argparse.Namespace) -> list[PreferencePair]:
    """Return the first pairs of a file that have at most ``args.longest`` tokens, prompt and both answers."""
    count = args.train_rows + args.valid_rows
    pairs, _, _ = load_dataset(run_settings(Setting(), rows, "unused", args), tokenizer)
    short = [pair for pair in pairs if pair.tokens <= args.longest][:count]
    if len(short) < count:
        raise SystemExit(f"{rows} has {len(short)} rows of at most {args.longest} tokens, not {count}.")
    return short


def log_probs(model: nn.Module, pairs: Sequence[PreferencePair]) -> dict[str, list[float]]:
    """Return the summed log-probs of both answers of each pair, in nats."""
    objective = objective_for("sigmoid", {})
    with compile_where_it_pays():
        scorer = choose_scorer(model, pairs, "auto")
        means = [evaluate_pairs(model, [pair], objective, batch_size=1, scorer=scorer).means for pair in pairs]
    return {side: [round(of_pair[f"policy_{side}_logps"], 4) for of_pair in means] for side in ("chosen", "rejected")}


def answer_lengths(model: nn.Module, tokenizer: Any, pairs: Sequence[PreferencePair], most: int) -> list[int]:
    """Return how many tokens the greedy answer to each prompt has, of which there are ``most`` at most."""
    prompts = [pair.prompt.tolist() for pair in pairs]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=most, return_token_ids=True)
    return [len(tokens) for tokens in answers.token_ids]


def run(
    setting: Setting, rows: Path, pairs: Sequence[PreferencePair], tokenizer: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Train with one setting, and return what the model then makes of the held-out rows."""
    started = time.perf_counter()
    train, valid = pairs[: args.train_rows], pairs[args.train_rows :]
    with tempfile.TemporaryDirectory() as folder:
        settings = run_settings(setting, rows, folder, args)
        model, _ = load_model(settings)
        if setting.loss is not None:
            train_mode(settings, train_modes()["cpo"], model, train, [], None)
    model.eval()
    return {
        **log_probs(model, valid),
        "chosen_tokens": [pair.chosen_tokens for pair in valid],
        "rejected_tokens": [int(pair.rejected_scored.sum()) for pair in valid],
        "answer_lengths": answer_lengths(model, tokenizer, valid[: args.answers], args.answer_tokens),
        "seconds": round(time.perf_counter() - started, 1),
    }


def identity(setting: Setting, rows: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a finished run is recognised by."""
    sizes = (
        "epochs",
        "batch_size",
        "learning_rate",
        "num_layers",
        "longest",
        "train_rows",
        "valid_rows",
        "answers",
        "answer_tokens",
    )
    return {
        "model": args.model.name,
        "rows": rows.stem,
        **asdict(setting),
        "seed": args.seed,
        **{name: getattr(args, name) for name in sizes},
    }


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Carry out what is not in ``runs.jsonl`` yet, and return all runs that the arguments ask for."""
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "runs.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    tokenizer = load_chat_tokenizer(str(args.model))
    pairs = {rows: short_rows(rows, tokenizer, args) for rows in args.rows}
    results = []
    for setting in settings_of(args.losses, args.betas):
        for rows in args.rows:
            key = identity(setting, rows, args)
            result = next((line for line in done if key.items() <= line.items()), None)
            if result is None and args.no_more_runs:
                continue
            if result is None:
                result = {**key, **run(setting, rows, pairs[rows], tokenizer, args)}
                mx.clear_cache()
                with file.open("a") as lines:
                    lines.write(json.dumps(result) + "\n")
            results.append(result)
    return results


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return what is plotted and tabled of a run."""
    chosen, rejected = np.array(result["chosen"]), np.array(result["rejected"])
    return {
        "accuracy": float(np.mean(chosen > rejected)),
        "margin": float(np.mean(chosen - rejected)),
        "chosen": float(chosen.sum() / sum(result["chosen_tokens"])),
        "length": float(np.mean(result["answer_lengths"])),
    }


PANELS = {
    "accuracy": "preference accuracy",
    "margin": "log-prob of chosen minus rejected, nats",
    "chosen": "log-prob of the chosen answers, nats a token",
    "length": "tokens of a greedy answer",
}


def change(result: dict[str, Any], before: dict[str, Any], name: str) -> tuple[float, float]:
    """Return the mean change over the rows of ``margin`` or ``chosen``, and its standard error.

    The first is in nats, the second in nats a token, where each row weighs the same.
    """
    values = []
    for of in (result, before):
        chosen, rejected = np.array(of["chosen"]), np.array(of["rejected"])
        values.append(chosen - rejected if name == "margin" else chosen / np.array(of["chosen_tokens"]))
    changes = values[0] - values[1]
    return float(changes.mean()), float(changes.std(ddof=1) / np.sqrt(len(changes)))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each setting, the untrained model first, and columns for each file.

    Of the untrained model it holds margin and chosen log-prob, of the others how these changed.
    """
    files: dict[str, dict[tuple[str, float, float], dict[str, Any]]] = {}
    for result in results:
        files.setdefault(result["rows"], {})[place(result)] = result
    titles = " | ".join(f"{name}: accuracy | margin | chosen | answer" for name in files)
    lines = [f"| loss | beta | {titles} |", "| --- | --- |" + " --- |" * 4 * len(files)]
    for setting in sorted({place(result) for result in results}):
        loss, cpo_alpha, beta = setting
        name = f"`{loss}`" if loss else "before training"
        cells = [name + (f", `cpo_alpha` {cpo_alpha:g}" if cpo_alpha else ""), f"{beta:g}" if loss else ""]
        for on_file in files.values():
            cells += _cells(on_file[setting], on_file[UNTRAINED]) if setting in on_file else [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


UNTRAINED = ("", 0.0, 0.0)


def place(result: dict[str, Any]) -> tuple[str, float, float]:
    """Return loss, ``cpo_alpha`` and beta of a run: its line in the table."""
    return (result["loss"], result["cpo_alpha"], result["beta"]) if result["loss"] else UNTRAINED


def _cells(result: dict[str, Any], before: dict[str, Any]) -> list[str]:
    of_run = figures(result)
    margin, chosen = f"{of_run['margin']:+.1f}", f"{of_run['chosen']:.2f}"
    if result is not before:
        margin = "{:+.1f} ± {:.1f}".format(*change(result, before, "margin"))
        chosen = "{:+.2f} ± {:.2f}".format(*change(result, before, "chosen"))
    return [f"{100 * of_run['accuracy']:.0f} %", margin, chosen, f"{of_run['length']:.0f}"]


def label(result: dict[str, Any]) -> str:
    """Return the name of the curve that a run is a point of."""
    return Setting(result["loss"], result["beta"], result["cpo_alpha"]).label


MARKERS = "osD^vP*"  # some curves lie on one another


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw every figure over beta, one curve for each loss, with the untrained model as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    # Without a date and with a fixed salt the same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "sweep", "svg.fonttype": "none"})
    from matplotlib import pyplot

    before, *trained = results
    trained.sort(key=lambda result: float(result["beta"]))
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for panel, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        panel.axhline(figures(before)[name], color="tab:gray", linestyle="--", label="before training")
        for curve, marker in zip(dict.fromkeys(map(label, trained)), MARKERS, strict=False):
            points = [result for result in trained if label(result) == curve]
            panel.plot(
                [result["beta"] for result in points],
                [figures(result)[name] for result in points],
                marker=marker,
                fillstyle="none",
                label=curve,
            )
        panel.set_xscale("log")
        panel.set_xlabel("beta")
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


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
    parser.add_argument("--answers", type=int, default=12, help="held-out prompts to answer")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-more-runs", action="store_true", help="only draw what is finished")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    results = sweep(args)
    for rows in args.rows:
        on_rows = [result for result in results if result["rows"] == rows.stem]
        if not on_rows:
            raise SystemExit(f"There is no run on {rows.stem} yet; leave --no-more-runs out.")
        draw(on_rows, args.output / f"losses-{rows.stem}.svg")
    print(table(results))


if __name__ == "__main__":
    main()
