"""Prints the tables of docs/results.md from what ``measure_learning.py`` has left in a folder.

    python tests/tools/learning_tables.py FOLDER

Changes are against the model before training, paired row by row; of several seeds, each row counts with its mean over
them. Behind ± stands the standard error over rows.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.comparison.text_metrics import chrf
from mlx_cpo_plugin.training.samples import repetition

HEAD = "| rows | loss | learning rate | seeds | accuracy | change | margin, nats | chosen, nats a token |"
TEXT_HEAD = (
    "| trained with | learning rate | seeds | chrF | change | tokens | repetition | ended | peak memory | time |"
)


def change(values: NDArray[np.float64], form: str) -> str:
    """Return mean and standard error of changes of N rows."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+{form}} ± {error:{form}}"


def change_per_token(values: NDArray[np.float64], tokens: NDArray[np.float64]) -> str:
    """Return the change of all rows together by token, and the standard error of that ratio over rows."""
    ratio = values.sum() / tokens.sum()
    error = (values - ratio * tokens).std(ddof=1) / np.sqrt(len(values)) / tokens.mean()
    return f"{ratio:+.3f} ± {error:.3f}"


def means_of(runs: list[dict[str, Any]], scores: str = "scores") -> dict[str, NDArray[np.float64]]:
    """Return, of each held-out row, the means over seeds of log-probs, margin and accuracy."""
    chosen, rejected = (np.array([run[scores][f"{side}_logps"] for run in runs]) for side in ("chosen", "rejected"))
    return {
        "chosen": chosen.mean(0),
        "margin": (chosen - rejected).mean(0),
        "accuracy": (chosen > rejected).astype(np.float64).mean(0),
    }


def lines_of(part: str, runs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of one part of the measurements."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    before = {run["task"]["rows"]: run for run in runs if run["task"]["trainer"] == "none"}
    for run in runs:
        if run["task"]["trainer"] != "none":
            groups[run["task"]["rows"], run["task"]["loss"], run["task"]["rate"]].append(run)
    lines = [f"{part}", "", HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]
    for rows, run in sorted(before.items()):
        base, tokens = means_of([run]), np.array(run["scores"]["chosen_tokens"])
        start = f"{base['margin'].mean():+.2f} | {base['chosen'].sum() / tokens.sum():.3f} |"
        lines.append(
            f"| {rows}, {len(tokens)} held out | before training | | | {base['accuracy'].mean():.1%} | | {start}"
        )
        of_rows = sorted((key, group) for key, group in groups.items() if key[0] == rows)
        for (_, loss, rate), seeds in of_rows:
            lines.append(f"| | `{loss}` | {rate:g} | {len(seeds)} | {changes(means_of(seeds), base, tokens)} |")
        for (_, loss, rate), seeds in of_rows:
            if "quantised_scores" in seeds[0]:
                after = changes(means_of(seeds, "quantised_scores"), base, tokens)
                lines.append(f"| | `{loss}`, merged, in 4 bits | {rate:g} | {len(seeds)} | {after} |")
        if "quantised_scores" in run:
            after = changes(means_of([run], "quantised_scores"), base, tokens)
            lines.append(f"| | before training, in 4 bits | | | {after} |")
    return lines


def changes(
    after: dict[str, NDArray[np.float64]], before: dict[str, NDArray[np.float64]], tokens: NDArray[np.float64]
) -> str:
    """Return accuracy, and the changes of accuracy, margin and log-prob of the chosen answers, as cells of a table."""
    cells = (
        f"{after['accuracy'].mean():.1%}",
        change(after["accuracy"] - before["accuracy"], ".1%"),
        change(after["margin"] - before["margin"], ".2f"),
        change_per_token(after["chosen"] - before["chosen"], tokens),
    )
    return " | ".join(cells)


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
            lines.append(f"{start} | {change(values - before, '.1f')} | {figures}")
        else:
            lines.append(f"{start} | | {figures} | | |")
    return lines


def chrf_of(run: dict[str, Any]) -> NDArray[np.float64]:
    """Return chrF of each of N answers with its reference."""
    return chrf("chrf", *zip(*((answer["answer"], answer["reference"]) for answer in run["answers"]), strict=True))[0]


def main() -> None:
    runs = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*.json"))]
    for part in sorted({run["task"]["part"] for run in runs}):
        of_part = [run for run in runs if run["task"]["part"] == part]
        print("\n".join(lines_of(part, of_part)), end="\n\n")
        if any("answers" in run for run in of_part):
            print("\n".join(text_lines(of_part)), end="\n\n")


if __name__ == "__main__":
    main()
