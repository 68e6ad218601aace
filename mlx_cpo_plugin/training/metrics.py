"""Means over pairs, the host's names for them, and where they are written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.scoring.answers import AnswerScores
from mlx_cpo_plugin.training.exchange import of_all_ranks
from mlx_cpo_plugin.training.objective import Objective

PAIR_METRICS = (
    "loss",
    "chosen_reward",
    "rejected_reward",
    "accuracies",
    "margins",
    "policy_chosen_logps",
    "policy_rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
)


class PairMeans:
    """Running means over preference pairs, each pair weighing the same.

    ``nll_loss`` is the mean over the scored tokens of their chosen answers, each token weighing the same. ``loss`` is
    the mean of the preference losses plus ``cpo_alpha`` times ``nll_loss``.

    Sums are kept in float64 on the host, so neither batch size nor order changes a mean beyond rounding.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums = np.zeros(len(PAIR_METRICS))
        self.chosen_nll = 0.0
        self.chosen_tokens = 0
        self.pairs = 0
        self.tokens = 0

    def add(self, losses: mx.array, scores: AnswerScores, tokens: int) -> None:
        """Add a batch of B pairs.

        Args:
            losses: preference losses, float32 [B].
            scores: the scores of the same pairs.
            tokens: scored tokens of both sides.
        """
        chosen, rejected = np.array(scores.chosen_logps, np.float64), np.array(scores.rejected_logps, np.float64)
        rewards = [self.objective.rewards(logps) for logps in (scores.chosen_logps, scores.rejected_logps)]
        columns = (
            np.array(losses, np.float64),
            rewards[0],
            rewards[1],
            (chosen > rejected).astype(np.float64),
            rewards[0] - rewards[1],
            chosen,
            rejected,
            np.array(scores.chosen_logits, np.float64),
            np.array(scores.rejected_logits, np.float64),
        )
        self.sums += np.array([column.sum() for column in columns])
        self.chosen_nll += float(np.array(self.objective.chosen_nll(scores), np.float64).sum())
        self.chosen_tokens += int(np.array(scores.chosen_tokens).sum())
        self.pairs += len(chosen)
        self.tokens += tokens

    def state(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {
            "sums": self.sums.tolist(),
            "chosen_nll": self.chosen_nll,
            "chosen_tokens": self.chosen_tokens,
            "pairs": self.pairs,
            "tokens": self.tokens,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.sums, self.pairs, self.tokens = np.array(state["sums"]), state["pairs"], state["tokens"]
        self.chosen_nll, self.chosen_tokens = state["chosen_nll"], state["chosen_tokens"]

    def over_ranks(self) -> tuple[dict[str, float], int]:
        """Return the means over the pairs of all ranks, by name, and the scored tokens of all ranks.

        The means of no pairs at all are NaN.
        """
        mine = [*self.sums.tolist(), self.chosen_nll, self.chosen_tokens, self.pairs, self.tokens]
        totals = np.sum(of_all_ranks(mine), axis=0)
        chosen_nll, chosen_tokens, pairs, tokens = totals[-4:].tolist()
        if not pairs:
            return dict.fromkeys((*PAIR_METRICS, "nll_loss"), np.nan), 0
        means = dict(zip(PAIR_METRICS, (totals[:-4] / pairs).tolist(), strict=True))
        means["nll_loss"] = chosen_nll / chosen_tokens
        if self.objective.cpo_alpha:
            means["loss"] += self.objective.cpo_alpha * means["nll_loss"]
        return means, int(tokens)


def host_report(prefix: str, means: Mapping[str, float]) -> dict[str, float]:
    """Name means as the host's callbacks do: ``train_accuracies``, ``val_chosen_reward``, …"""
    return {f"{prefix}_{name}": value for name, value in means.items()}


class MetricsFile:
    """Appends one JSON object a line to ``metrics.jsonl``; does nothing where ``path`` is ``None``."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def size(self) -> int:
        """Return the bytes written so far."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cut(self, size: int) -> set[tuple[str, int]]:
        """Forget what was written after the first ``size`` bytes; return kind and iteration of each such line."""
        if self.path is None or self.size() <= size:
            return set()
        with self.path.open("rb") as file:
            file.seek(size)
            lines = file.read().splitlines()
        os.truncate(self.path, size)
        return {told for told in map(_kind_and_iteration, lines) if told is not None}

    def append(self, kind: str, values: Mapping[str, float]) -> None:
        """Write a line; ``kind`` is ``train``, ``valid`` or ``test``. JSON has no NaN and no infinity: they are null.

        Raises:
            UserError: the file cannot be written.
        """
        self._write(kind, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def append_warning(self, text: str) -> None:
        """Write a line of the kind ``warning``, with what was said under ``text``.

        Raises:
            UserError: the file cannot be written.
        """
        self._write("warning", {"text": text})

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); free space or change adapter_path.") from error


def _kind_and_iteration(line: bytes) -> tuple[str, int] | None:
    try:
        values = json.loads(line)
        return values["kind"], values["iteration"]
    except (ValueError, TypeError, KeyError):  # half a line, or the final test's
        return None
