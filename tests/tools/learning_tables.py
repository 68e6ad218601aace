"""Prints the tables of docs/results.md from what ``measure_learning.py`` has left in folders, and draws them.

    python tests/tools/learning_tables.py FOLDER [FOLDER …] [--plot FILE.svg]

A folder is called what its model and rows are to be called in the plot. The plot's figures are kept beside it, in
``FILE.json``: another time, those of the folders join them, or take the place of those of the same rows and loss.

Changes are against the model before training, paired row by row; of several seeds, each row counts with its mean over
them. Behind ± stands the standard error over rows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.bench.plots import pyplot, save
from mlx_cpo_plugin.comparison.text_metrics import chrf
from mlx_cpo_plugin.training.samples import repetition

HEAD = "| rows | loss | learning rate | seeds | accuracy | change | margin, nats | chosen, nats a token |"
TEXT_HEAD = (
    "| trained with | learning rate | seeds | chrF | change | tokens | repetition | ended | peak memory | time |"
)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean and standard error of changes of N rows."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def per_token(values: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float]:
    """Return the change of all rows together by token, and the standard error of that ratio over rows."""
    ratio = values.sum() / tokens.sum()
    return float(ratio), mean_and_error(values - ratio * tokens)[1] / float(tokens.mean())


def change(found: tuple[float, float], form: str) -> str:
    """Return a mean and its standard error as a cell of a table."""
    return f"{found[0]:+{form}} ± {found[1]:{form}}"


def means_of(runs: list[dict[str, Any]], bits: str | None = None) -> dict[str, NDArray[np.float64]]:
    """Return, of each held-out row, the means over seeds of log-probs, margin and accuracy.

    Args:
        bits: of the merged model; ``None``: of the model as it was trained.
    """
    found = [run["quantised_scores"][bits] if bits else run["scores"] for run in runs]
    chosen, rejected = (np.array([each[f"{side}_logps"] for each in found]) for side in ("chosen", "rejected"))
    return {
        "chosen": chosen.mean(0),
        "margin": (chosen - rejected).mean(0),
        "accuracy": (chosen > rejected).astype(np.float64).mean(0),
    }


class Part:
    """One part of the measurements of a folder.

    Attributes:
        before: the run of the model as it is, by file of rows.
        after: of each file, loss and rate the runs with its seeds.
    """

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self.before = {run["task"]["rows"]: run for run in runs if run["task"]["trainer"] == "none"}
        self.after: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            if run["task"]["trainer"] != "none":
                self.after[run["task"]["rows"], run["task"]["loss"], run["task"]["rate"]].append(run)
        if alone := {rows for rows, *_ in self.after} - self.before.keys():
            raise SystemExit(f"The model as it is has no run on {', '.join(sorted(alone))}; measure it, too.")

    def lines(self) -> list[str]:
        """Return its table."""
        lines = [HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]
        for rows, run in sorted(self.before.items()):
            base, tokens = means_of([run]), np.array(run["scores"]["chosen_tokens"])
            start = f"{base['margin'].mean():+.2f} | {base['chosen'].sum() / tokens.sum():.3f} |"
            lines.append(
                f"| {rows}, {len(tokens)} held out | before training | | | {base['accuracy'].mean():.1%} | | {start}"
            )
            of_rows = sorted((key, group) for key, group in self.after.items() if key[0] == rows)
            for (_, loss, rate), seeds in of_rows:
                lines.append(f"| | `{loss}` | {rate:g} | {len(seeds)} | {cells(means_of(seeds), base, tokens)} |")
            of_models = [(f"`{loss}`, merged", f"{rate:g} | {len(seeds)}", seeds) for (_, loss, rate), seeds in of_rows]
            for name, run_by, seeds in [("before training", "| ", [run]), *of_models]:
                for bits in seeds[0].get("quantised_scores", ()):
                    after = cells(means_of(seeds, bits), base, tokens)
                    lines.append(f"| | {name}, in {bits} bits | {run_by} | {after} |")
        return lines


def cells(
    after: dict[str, NDArray[np.float64]], before: dict[str, NDArray[np.float64]], tokens: NDArray[np.float64]
) -> str:
    """Return accuracy, and the changes of accuracy, margin and log-prob of the chosen answers, as cells of a table."""
    found = changes(after, before, tokens)
    forms = {"accuracy": ".1%", "margin": ".2f", "chosen": ".3f"}
    return " | ".join([f"{after['accuracy'].mean():.1%}", *(change(found[name], form) for name, form in forms.items())])


def changes(
    after: dict[str, NDArray[np.float64]], before: dict[str, NDArray[np.float64]], tokens: NDArray[np.float64]
) -> dict[str, tuple[float, float]]:
    """Return the changes of accuracy, margin and log-prob of the chosen answers, each with its standard error."""
    found = {name: mean_and_error(after[name] - before[name]) for name in ("accuracy", "margin")}
    return {**found, "chosen": per_token(after["chosen"] - before["chosen"], tokens)}


def drawn_figures(folder: str, part: Part) -> list[dict[str, Any]]:
    """Return what the plot shows of each loss and rate of a folder; accuracies in per cent."""
    found = []
    for (rows, loss, rate), seeds in sorted(part.after.items()):
        run, file_of_rows = part.before[rows], f", {rows}" if len(part.before) > 1 else ""
        before, after = means_of([run]), means_of(seeds)
        changed = changes(after, before, np.array(run["scores"]["chosen_tokens"]))
        start, end = (100 * float(each["accuracy"].mean()) for each in (before, after))
        error = 100 * changed["accuracy"][1]
        figures = {"accuracy": [start, end, error], "chosen": list(changed["chosen"])}
        found.append({"rows": f"{folder}{file_of_rows}", "loss": f"{loss}, {rate:g}", "seeds": len(seeds), **figures})
    return found


def joined(kept: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that were kept and the new ones, in the place of those of the same rows and loss."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for each in (*kept, *new):
        groups[each["rows"]][each["loss"]] = each
    return [each for group in groups.values() for each in group.values()]


def plot(figures: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw, of each loss, accuracy before and after, and the change of the chosen answers' log-prob."""
    drawn, axes = pyplot().subplots(1, 2, figsize=(9.4, 0.9 + 0.42 * len(figures)), sharey=True, layout="constrained")
    for place, each in enumerate(figures):
        (start, end, error), (mean, spread) = each["accuracy"], each["chosen"]
        axes[0].plot([start, end], [place, place], color="tab:blue")
        axes[0].plot(start, place, "o", color="white", markeredgecolor="tab:blue")
        axes[0].errorbar(end, place, xerr=error, fmt="o", color="tab:blue", capsize=3)
        axes[1].errorbar(mean, place, xerr=spread, fmt="o", color="tab:orange", capsize=3)
    axes[0].set_yticks(range(len(figures)), [f"{each['rows']}\n{each['loss']}" for each in figures])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 100)
    axes[0].set_xlabel("held-out preference accuracy, %: before (hollow), after")
    axes[1].set_xlabel("log-prob of the chosen answers, change in nats a token")
    axes[1].axvline(0, color="#888888", linewidth=0.8)
    axes[1].locator_params(axis="x", nbins=6)
    save(drawn, file)


def text_lines(runs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of runs whose model answered the held-out prompts; chrF is the mean over answers."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if "answers" in run:
            groups[run["task"]["loss"], run["task"]["rate"]].append(run)
    lines = ["text", "", TEXT_HEAD, "|" + " --- |" * TEXT_HEAD.count(" | ") + " --- |"]
    (base,) = [run for run in runs if run["task"]["trainer"] == "none"]
    before = chrf_of(base)
    for (name, rate), seeds in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        values = np.mean([chrf_of(run) for run in seeds], axis=0)
        given = [answer for run in seeds for answer in run["answers"]]
        tokens, ended = (np.mean([answer[key] for answer in given]) for key in ("tokens", "ended"))
        repeated = np.mean([repetition(answer["answer"].split()) for answer in given])
        figures = f"{tokens:.0f} | {repeated:.1%} | {ended:.1%}"
        start = f"| {name} | {f'{rate:g} | {len(seeds)}' if rate else '| '} | {values.mean():.1f}"
        if rate:
            memory, seconds = (np.mean([run[key] for run in seeds]) for key in ("peak_memory", "seconds"))
            figures += f" | {memory / 1e9:.2f} GB | {seconds:.0f} s |"
            lines.append(f"{start} | {change(mean_and_error(values - before), '.1f')} | {figures}")
        else:
            lines.append(f"{start} | | {figures} | | |")
    return lines


def chrf_of(run: dict[str, Any]) -> NDArray[np.float64]:
    """Return chrF of each of N answers with its reference."""
    return chrf("chrf", *zip(*((answer["answer"], answer["reference"]) for answer in run["answers"]), strict=True))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracies and betas in there")
    given = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for folder in given.folders:
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        for name in sorted({run["task"]["part"] for run in runs}):
            of_part = [run for run in runs if run["task"]["part"] == name]
            part = Part(of_part)
            print("\n".join([f"{folder.absolute().name}, {name}", "", *part.lines()]), end="\n\n")
            if any("answers" in run for run in of_part):
                print("\n".join(text_lines(of_part)), end="\n\n")
            if name in ("accuracy", "betas"):
                figures += drawn_figures(folder.absolute().name, part)
    if given.plot:
        file = given.plot.with_suffix(".json")
        figures = joined(json.loads(file.read_text()) if file.exists() else [], figures)
        file.write_text("[\n" + ",\n".join(map(json.dumps, figures)) + "\n]\n")
        plot(figures, given.plot)


if __name__ == "__main__":
    main()
