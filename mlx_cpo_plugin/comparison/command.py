"""The arguments of ``mlx-cpo compare``, and what it prints or writes.

The JSON is one object::

    {
      "adapter_path": "adapters", "model": "...", "train_type": "lora",
      "loss_type": "sigmoid", "beta": 0.05, "max_tokens": 128,
      "answers": [
        {"source": "prompt", "prompt": "Hi!", "chosen": null, "rejected": null,
         "base": {"text": "...", "finished": true}, "tuned": {"text": "...", "finished": false}}
      ],
      "held_out": "test",
      "preference": [
        {"name": "all", "pairs": 60, "shortest": 21, "longest": 52,
         "before": {"accuracy": 0.5, "margin": 0.1, "loss": 0.6, "chosen_logps": -9.1, "rejected_logps": -10.2},
         "after": {...}}
      ]
    }

``source`` is ``prompt`` for the user's own prompts, which come first, and otherwise where the row stands, whose own
answers are ``chosen`` and ``rejected``. ``finished`` is false where ``max_tokens`` cut an answer off. ``held_out`` is
``test``, ``valid``, ``file`` for a file without a split, or null with an empty ``preference``. The first entry there is
of all pairs; with three pairs or more ``short``, ``medium`` and ``long`` follow, a third each. ``shortest`` and
``longest`` are tokens of a pair's longer side, prompt included. ``margin`` is the difference of the rewards, which are
beta times the log-probs unless the loss has its own; log-probs are in nats, of whole answers (per token for losses such
as ipo). What is not finite is null.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cpo_plugin.errors import ConfigError

if TYPE_CHECKING:
    from mlx_cpo_plugin.comparison.measure import Comparison

DEFAULT_ROWS = 4
DEFAULT_TOKENS = 128
STANDARD_OUTPUT = "-"
MEANS = {
    "accuracy": "accuracies",
    "margin": "margins",
    "loss": "loss",
    "chosen_logps": "policy_chosen_logps",
    "rejected_logps": "policy_rejected_logps",
}
"""Name in the JSON -> name among the means over pairs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("adapter_path", type=Path, metavar="ADAPTER_PATH", help="folder of a run")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt of your own; may be given repeatedly"
    )
    parser.add_argument(
        "--rows",
        type=_count,
        default=DEFAULT_ROWS,
        metavar="N",
        help="ask the prompts of the first N held-out rows, too (default: %(default)s)",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="held-out rows in place of those of the run: a file, a folder or a hub name"
    )
    parser.add_argument("--model", metavar="MODEL", help="base model in place of the one that the run names")
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens of an answer at most (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help=f"write all of it there; {STANDARD_OUTPUT} prints it instead")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_compare(chosen: argparse.Namespace) -> int:
    """Compare, print and write what the arguments ask for; progress goes to standard error.

    Raises:
        UserError: the arguments, the adapter, the model or the data are at fault.
    """
    to_file = chosen.json not in (None, STANDARD_OUTPUT)
    if to_file and not Path(chosen.json).parent.is_dir():
        raise ConfigError(f"--json {chosen.json}: there is no folder {Path(chosen.json).parent}; make it first.")
    from mlx_cpo_plugin.atomic_files import replace_whole
    from mlx_cpo_plugin.comparison.measure import compare

    comparison = compare(
        chosen.adapter_path,
        prompts=chosen.prompt,
        rows=chosen.rows,
        model=chosen.model,
        data=chosen.data,
        max_tokens=chosen.max_tokens,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    figures = as_json(comparison, chosen.adapter_path, chosen.max_tokens)
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    if to_file:
        try:
            replace_whole(Path(chosen.json), lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--json {chosen.json} cannot be written ({error.strerror}); give another.") from error
    print(text if chosen.json == STANDARD_OUTPUT else as_text(figures), end="")
    return 0


def as_json(comparison: Comparison, adapter_path: Path, max_tokens: int) -> dict[str, Any]:
    """Return the figures as plain values, see the top of this module."""
    settings = comparison.settings
    return {
        "adapter_path": str(adapter_path),
        "model": settings.model,
        "train_type": settings.train_type,
        "loss_type": settings.dpo_cpo_loss_type,
        "beta": settings.beta,
        "max_tokens": max_tokens,
        "answers": [
            {
                "source": question.source,
                "prompt": question.prompt,
                "chosen": question.chosen,
                "rejected": question.rejected,
                "base": {"text": base.text, "finished": base.finished},
                "tuned": {"text": tuned.text, "finished": tuned.finished},
            }
            for question, base, tuned in zip(comparison.questions, comparison.base, comparison.tuned, strict=True)
        ],
        "held_out": comparison.held_out or None,
        "preference": [
            {**group.description(), "before": _named_means(before), "after": _named_means(after)}
            for group, before, after in zip(comparison.groups, comparison.before, comparison.after, strict=True)
        ],
    }


def _named_means(means: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value := means[ours]) else None for name, ours in MEANS.items()}


def as_text(figures: dict[str, Any]) -> str:
    """Return the table of preferences and below it the answers, for a terminal."""
    lines = []
    if figures["preference"]:
        lines += [
            f"{'held out: ' + figures['held_out']:<20}{'pairs':>6}{'tokens':>12}{'accuracy':>10}{'after':>8}"
            f"{'margin':>10}{'after':>10}"
        ]
        for group in figures["preference"]:
            before, after = group["before"], group["after"]
            tokens = f"{group['shortest']}-{group['longest']}"
            lines.append(
                f"{group['name']:<20}{group['pairs']:>6}{tokens:>12}{_shown(before['accuracy'], '.1%'):>10}"
                f"{_shown(after['accuracy'], '.1%'):>8}{_shown(before['margin'], '+.3f'):>10}"
                f"{_shown(after['margin'], '+.3f'):>10}"
            )
    for answer in figures["answers"]:
        lines += ["", f"{answer['source']}: {answer['prompt'].strip()}"]
        for name in ("base", "tuned"):
            text = answer[name]["text"] + ("" if answer[name]["finished"] else " […]")
            lines += [f"  {name}:", textwrap.indent(text, "    ")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _shown(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
