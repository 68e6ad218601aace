"""Means over pairs, the host's names for them, and where they are written."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.exchange import gather
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.training.objective import Objective
from mlx_cpo_plugin.training.state import Resumable
from mlx_cpo_plugin.types import Values

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
PAIR_VALUES = (*PAIR_METRICS, "chosen_nll", "chosen_tokens")
"""What is known of each pair; ``loss`` is the preference loss alone, ``chosen_nll`` in nats, summed over the answer."""


class PairMeans(Resumable):
    """Running means over preference pairs, each pair weighing the same.

    ``nll_loss`` is the mean over the scored tokens of their chosen answers, each token weighing the same. ``loss`` is
    the mean of the preference losses plus ``cpo_alpha`` times ``nll_loss``.

    Sums are float64 on the host, so neither batch size nor order changes a mean beyond rounding.
    """

    remembered = ("sums", "chosen_nll", "chosen_tokens", "pairs", "tokens")

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums = [0.0] * len(PAIR_METRICS)
        self.chosen_nll = 0.0
        self.chosen_tokens = 0
        self.pairs = 0
        self.tokens = 0

    def add(self, losses: mx.array, scores: AnswerScores, tokens: int) -> NDArray[np.float64]:
        """Add a batch of B pairs; return their :data:`PAIR_VALUES`, float64 [len(PAIR_VALUES), B].

        Args:
            losses: preference losses, float32 [B].
            scores: the scores of the same pairs.
            tokens: scored tokens of both sides.
        """
        chosen, rejected = np.array(scores.chosen_logps, np.float64), np.array(scores.rejected_logps, np.float64)
        rewards = [self.objective.rewards(logps) for logps in (scores.chosen_logps, scores.rejected_logps)]
        columns = [
            np.array(losses, np.float64),
            rewards[0],
            rewards[1],
            (chosen > rejected).astype(np.float64),
            rewards[0] - rewards[1],
            chosen,
            rejected,
            np.array(scores.chosen_logits, np.float64),
            np.array(scores.rejected_logits, np.float64),
            np.array(self.objective.chosen_nll(scores), np.float64),
            np.array(scores.chosen_tokens, np.float64),
        ]
        sums = [float(column.sum()) for column in columns]
        self.sums = [total + more for total, more in zip(self.sums, sums[:-2], strict=True)]
        self.chosen_nll += sums[-2]
        self.chosen_tokens += int(sums[-1])
        self.pairs += len(chosen)
        self.tokens += tokens
        return np.array(columns)

    def over_ranks(self) -> tuple[dict[str, float], int]:
        """Return the means over the pairs of all ranks, by name, and the scored tokens of all ranks.

        The means of no pairs at all are NaN.
        """
        mine = [*self.sums, self.chosen_nll, self.chosen_tokens, self.pairs, self.tokens]
        totals = np.sum(gather(mine), axis=0)
        pairs, tokens = totals[-2:].tolist()
        if not pairs:
            return dict.fromkeys((*PAIR_METRICS, "nll_loss"), np.nan), 0
        return means_of_sums(totals[:-2], int(pairs), self.objective), int(tokens)


def means_of_sums(sums: NDArray[np.float64], pairs: int, objective: Objective) -> dict[str, float]:
    """Return means by name, as :class:`PairMeans` has them, of :data:`PAIR_VALUES` added up over ``pairs``."""
    *_, chosen_nll, chosen_tokens = sums.tolist()
    means = dict(zip(PAIR_METRICS, (sums[:-2] / pairs).tolist(), strict=True))
    means["nll_loss"] = chosen_nll / chosen_tokens
    if objective.cpo_alpha:
        means["loss"] += objective.cpo_alpha * means["nll_loss"]
    return means


class MetricsFile:
    """Appends lines of JSON to ``metrics.jsonl``; where that fails one warning says so, and the run continues.

    Args:
        path: ``None``: nothing is written.
        run_id: of the run, written into each line.

    Attributes:
        rows: lines of the run so far.
    """

    def __init__(self, path: Path | None, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self.rows = 0
        self._told = False

    def resume(self, source: Path, run_id: str, rows: int, iteration: int) -> tuple[set[tuple[str, int]], str | None]:
        """Reduce the file to what a run had reported when it wrote a checkpoint.

        Args:
            source: the metrics file of that run, which may be this one.
            run_id: its identity.
            rows: how many lines it had written by ``iteration``.

        Returns:
            Kind and iteration of what it reported afterwards, and a note on missing rows, if there are any.

        Raises:
            UserError: the file cannot be written.
        """
        if self.path is None:
            return set(), None
        try:
            lines = source.read_bytes().split(b"\n")
        except OSError:
            lines = []
        rows_there = [row for line in lines if (row := _row(line)) is not None and row.get("run") == run_id]
        found = [row for row in rows_there if row.get("kind") != "test"]  # of a test beside the run, which counted none
        last = max(iteration, 1)  # what was there before training is reported as of the first iteration
        kept = [row for row in found[:rows] if row.get("iteration", 0) <= last]
        later = {(row["kind"], row["iteration"]) for row in found[len(kept) :] if "kind" in row and "iteration" in row}
        text = "".join(json.dumps({**row, "run": self.run_id}) + "\n" for row in kept).encode()
        self.rows = len(kept)
        if text != (self.path.read_bytes() if self.path.is_file() and not self.path.is_symlink() else b""):
            try:
                replace_whole(self.path, lambda partial: partial.write_bytes(text))
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be written ({error}); free space or change adapter_path.",
                    key="adapter_path",
                    place=str(self.path),
                ) from error
        if len(kept) == rows:
            return later, None
        missing = rows - len(kept)
        return later, f"Of {rows} reports up to iteration {iteration}, {missing} are missing in {self.path}."

    def append(self, kind: str, values: Mapping[str, float | str]) -> None:
        """Write a line; ``kind`` is ``train``, ``valid``, ``test``, ``best``, ``sample`` or ``warning``.

        Non-finite values become null.
        """
        if self.path is None:
            return
        row = {"kind": kind, "run": self.run_id, "time": round(time.time(), 3), **values}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        line = json.dumps(finite) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line.encode())
            self.rows += 1
        except OSError as error:
            if not self._told:
                tqdm.write(
                    f"Warning: {self.path} cannot be written ({error}); the run goes on without what is missing."
                )
            self._told = True


def _append(path: Path, line: bytes) -> None:
    """Append a line, after one that was torn, too; a link is not followed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        line = b"\n" + line if torn else line
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _row(line: bytes) -> Values | None:
    try:
        values = json.loads(line)
    except ValueError:  # half a line
        return None
    return values if isinstance(values, dict) and isinstance(values.get("iteration", 0), int) else None
