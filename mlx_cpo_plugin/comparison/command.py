"""The arguments of ``mlx-cpo compare``, and what it prints or writes.

The JSON is one object::

    {
      "loss_type": "sigmoid", "beta": 0.05, "max_tokens": 128,
      "models": [
        {"name": "base", "model": "...", "adapter_path": null, "train_type": null},
        {"name": "tuned", "model": "...", "adapter_path": "adapters", "train_type": "lora"}
      ],
      "measures": [
        {"name": "accuracy", "of": "pairs", "count": 60,
         "models": [{"name": "base", "mean": 0.45, "low": 0.331, "high": 0.575}, ...],
         "best": "tuned",
         "comparisons": [
           {"model": "tuned", "against": "base", "difference": 0.533, "low": 0.404, "high": 0.662,
            "wins": 33, "ties": 26, "losses": 1,
            "win_rate": 0.767, "win_rate_low": 0.646, "win_rate_high": 0.856, "outcome": "better"}
         ]}
      ],
      "answers": [
        {"source": "prompt", "prompt": "Hi!", "chosen": null, "rejected": null,
         "models": [{"text": "...", "finished": true, "tokens": 12}, ...]}
      ],
      "held_out": "test",
      "preference": [
        {"name": "all", "pairs": 60, "shortest": 21, "longest": 52,
         "models": [
           {"accuracy": 0.45, "margin": 0.1, "loss": 0.6, "chosen_logps": -9.1, "rejected_logps": -10.2}, ...
         ]}
      ]
    }

``models`` within an answer or a group are in the order of those at the top. ``low`` and ``high`` bound the 95 %
interval: Wilson's of a rate and of a win rate, in which a tie is half a win, and Student's t of a mean and of the mean
difference on the same pairs or answers. ``outcome`` is ``better``, ``worse`` or ``undecided``, where the difference is
not certain to have a sign; measures that are neither good nor bad, such as length, have none, and no wins. Every model
is compared with the base model and with the best. A corpus has one chrF, ``corpus``, which is not the mean. The measure
of a reward function is called ``reward NAME``. That of a judge has ``judge``, its name, no means and no differences,
but in each comparison ``points``, 1, 0.5 or 0 for each answer, and ``unclear``, how many replies named none, which
count as ties.

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
import sys
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.json_output import STANDARD_OUTPUT, check_json, write_json
from mlx_cpo_plugin.settings.validation import LARGEST_INTEGER

DEFAULT_ROWS = 4
DEFAULT_TOKENS = 128
DEFAULT_TIMEOUT = 60
FROM_INPUT = "-"
METRICS = ("chrf", "chrf++")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "adapter_paths",
        type=Path,
        nargs="+",
        metavar="ADAPTER_PATH",
        help="folder of a run, another adapter or a whole model; several are compared with each other, too",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"a prompt of your own; {FROM_INPUT} reads it from standard input; may be given repeatedly",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        default=DEFAULT_ROWS,
        metavar="N",
        help="ask the prompts of the first N held-out rows, too, or of 'all' (default: %(default)s)",
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
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        choices=METRICS,
        help="measure how like the chosen answers of the rows the answers are; may be given repeatedly",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="measure answers by a reward function, as mlx-lm-lora's are; FILE.py:FUNCTION works, too; may be repeated",
    )
    parser.add_argument(
        "--judge", metavar="MODEL", help="have a model of MLX say which answer is better, in both orders"
    )
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        help="have the model behind an OpenAI-compatible endpoint say it; prompts and answers are sent there",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the model's name at --judge-url")
    parser.add_argument(
        "--judge-key", metavar="VARIABLE", help="environment variable that holds the key of --judge-url"
    )
    parser.add_argument(
        "--judge-timeout",
        type=_positive,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="how long --judge-url may take for a reply (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help=f"write all of it there; {STANDARD_OUTPUT} prints it instead")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _rows(text: str) -> int:
    return sys.maxsize if text == "all" else _count(text)


def _positive(text: str) -> int:
    if not 1 <= _count(text) <= LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {LARGEST_INTEGER}")
    return int(text)


def _entered() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompt {FROM_INPUT}: standard input is no {error.encoding} text; give it in that encoding.",
            key="prompt",
        ) from error


def run_compare(chosen: argparse.Namespace) -> int:
    """Compare, print and write what the arguments ask for; progress goes to standard error.

    Raises:
        UserError: the arguments, the adapter, the model or the data are at fault.
    """
    check_json(chosen.json)
    from mlx_cpo_plugin.comparison.deciding import Deciders
    from mlx_cpo_plugin.comparison.figures import figures_of
    from mlx_cpo_plugin.comparison.measure import compare
    from mlx_cpo_plugin.comparison.table import as_text
    from mlx_cpo_plugin.comparison.text_metrics import check_metrics

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    check_metrics(chosen.metric)
    if chosen.prompt.count(FROM_INPUT) > 1:
        raise ConfigError(f"--prompt {FROM_INPUT} can be given once: there is one standard input.", key="prompt")
    if not chosen.rows and (chosen.metric or (_decides(chosen) and not chosen.prompt)):
        raise ConfigError("--rows 0 leaves no answers to measure; give --rows N, or --prompt for judges.", key="rows")
    deciders = Deciders(chosen)
    comparison = compare(
        chosen.adapter_paths,
        prompts=[_entered() if prompt == FROM_INPUT else prompt for prompt in chosen.prompt],
        rows=chosen.rows,
        model=chosen.model,
        data=chosen.data,
        max_tokens=chosen.max_tokens,
        say=say,
    )
    decided: list[dict[str, Any]] = []
    fault: UserError | None = None
    try:
        if comparison.questions:
            decided.extend(deciders.entries(comparison, say))
    except UserError as error:  # what the models took long to answer is shown all the same
        fault = error
    figures = figures_of(comparison, chosen.max_tokens, list(dict.fromkeys(chosen.metric)), decided)
    if chosen.json is not None:  # before anything is printed, which may fail as well
        in_unicode = chosen.json != STANDARD_OUTPUT or "utf" in (sys.stdout.encoding or "").lower()
        try:
            write_json(chosen.json, json.dumps(figures, indent=2, ensure_ascii=not in_unicode))
        except UserError as error:
            fault = error
    if chosen.json != STANDARD_OUTPUT:
        print(as_text(figures), end="")
    if fault is not None:
        raise fault
    return 0


def _decides(chosen: argparse.Namespace) -> bool:
    return bool(chosen.reward or chosen.judge or chosen.judge_url)
