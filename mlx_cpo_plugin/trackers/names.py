"""The names that TRL's logs give to the metrics, for people and charts that know them."""

from __future__ import annotations

import math
from collections.abc import Mapping

PREFIXES = {"train_": "", "val_": "eval_", "test_": "test_"}
TRL_NAMES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "accuracies": "rewards/accuracies",
    "margins": "rewards/margins",
    "policy_chosen_logps": "logps/chosen",
    "policy_rejected_logps": "logps/rejected",
    "chosen_logits_mean": "logits/chosen",
    "rejected_logits_mean": "logits/rejected",
    "gradient_norm": "grad_norm",
    "time": "runtime",
}


def trl_names(report: Mapping[str, float]) -> dict[str, float]:
    """Return a report of the trainer under TRL's names, without its iteration and what is not finite.

    ``train_`` falls away, ``val_`` becomes ``eval_``: ``train_margins`` is ``rewards/margins``, ``val_loss`` is
    ``eval_loss``. What TRL has no name for keeps its own, e.g. ``tokens_per_second``.
    """
    return {_trl_name(name): value for name, value in report.items() if name != "iteration" and math.isfinite(value)}


def _trl_name(name: str) -> str:
    for prefix, trl_prefix in PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return trl_prefix + TRL_NAMES.get(rest, rest)
    return name
