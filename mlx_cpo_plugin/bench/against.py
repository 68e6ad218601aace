"""Compares any number of trainers, those of other projects included, on the same micro-batches and over an epoch."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from mlx_cpo_plugin.bench.cases import Case
from mlx_cpo_plugin.bench.host_trainer import host_row
from mlx_cpo_plugin.bench.job import EPOCH, HOST, PLUGIN, TIME, Measurement
from mlx_cpo_plugin.bench.runs import Runs, Say
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import load_chat_tokenizer

# By how much losses of the same weights on the same tokens may differ, as a share of their mean.
TOLERANCE = 1e-3
TOLERANCE_OF_HALF_PRECISION = 0.05
# What is measured -> its heading; the second one takes the number of rows.
MODES = {
    TIME: "the same micro-batches",
    EPOCH: "an epoch of the same rows, batched as each trainer does by default",
}

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Timing:
    """What one trainer took in one mode.

    Attributes:
        seconds_per_pair: of each round.
        peak_memory: bytes allocated by MLX at most, the median of the rounds; ``None`` on torch, which does not tell.
        peak_resident: bytes that the process held in main memory at most, the median of the rounds.
        loss: the mean of all iterations.
        blas, dtype: as in :class:`~mlx_cpo_plugin.bench.job.Measurement`.
    """

    seconds_per_pair: list[float]
    peak_memory: int | None
    peak_resident: int
    loss: float
    blas: str
    dtype: str


@dataclass(frozen=True)
class Contest:
    """Several trainers on one case.

    Attributes:
        rounds: processes of each trainer and mode, one trainer after the other.
        iterations: timed micro-batches of each, after one to warm up.
        timings: by mode, then by trainer; this project's is the first.
        notes: what differs between the trainers, one sentence each.
        failures: why a trainer has no figures, or losses that it should not have.
        stopped: whether Ctrl-C ended it; it has what was measured up to there.
    """

    case: Case
    rounds: int
    iterations: int
    timings: dict[str, dict[str, Timing]]
    notes: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    def ratio(self, mode: str, trainer: str) -> float:
        """Return how many times the seconds of this project's trainer a trainer takes, the median of the rounds."""
        theirs, ours = (self.timings[mode][name].seconds_per_pair for name in (trainer, PLUGIN))
        return median(their / our for their, our in zip(theirs, ours, strict=True))


def hold_contest(
    case: Case,
    trainers: Sequence[str],
    pythons: Mapping[str, str],
    *,
    iterations: int,
    rounds: int,
    say: Say,
) -> Contest:
    """Measure this project's trainer and the others on ``case``.

    Args:
        trainers: the others.
        pythons: the Python of each trainer that has an environment of its own.
        iterations: timed micro-batches of each process, after one to warm up.
        rounds: processes of each trainer and mode.
        say: takes progress, a few words at a time.

    Raises:
        ConfigError: there are fewer rows than a micro-batch takes.
        MeasurementError: this project's trainer failed.
        KeyboardInterrupt: Ctrl-C, before this project's trainer was measured.
    """
    if len(case.pairs) < case.settings.batch_size:
        raise ConfigError(
            f"{case.name}: there are {len(case.pairs)} rows, and batch_size is {case.settings.batch_size}; "
            "give more rows or a smaller batch_size."
        )
    failures: dict[str, str] = {}
    batches, epoch = case.batches(iterations + 1), case.epoch()
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-bench-") as folder:
        runs = Runs(case, Path(folder), say, pythons)
        same = runs.time_in_turn([PLUGIN, *trainers], batches, rounds, TIME, failures)
        if PLUGIN not in same:
            raise KeyboardInterrupt
        whole = {} if runs.stopped else runs.time_in_turn([*same], epoch, rounds, EPOCH, failures)
    timed = sum(map(len, batches[1:]))
    # mlx-lm-lora draws full micro-batches only.
    drawn = {HOST: len(epoch) * case.settings.batch_size}
    first = {name: measured[0] for name, measured in same.items()}
    differences = _differences_of_tokens(case, batches, first)
    notes, wrong = _differences_of_losses(first, differences)
    timings = {TIME: {name: _timing(measured, 1, timed) for name, measured in same.items()}}
    if whole:
        pairs = {name: drawn.get(name, len(case.pairs)) for name in whole}
        timings[EPOCH] = {name: _timing(measured, 0, pairs[name]) for name, measured in whole.items()}
    return Contest(
        case=case,
        rounds=len(same[PLUGIN]),
        iterations=iterations,
        timings=timings,
        notes=(*case.notes, *(patch for measured in first.values() for patch in measured.patches), *notes),
        failures=failures | wrong,
        stopped=runs.stopped,
    )


def _timing(rounds: Sequence[Measurement], warm_up: int, pairs: int) -> Timing:
    first = rounds[0]
    peaks = [measured.peak_memory for measured in rounds if measured.peak_memory is not None]
    return Timing(
        seconds_per_pair=[sum(measured.seconds[warm_up:]) / pairs for measured in rounds],
        peak_memory=int(median(peaks)) if peaks else None,
        peak_resident=int(median(measured.peak_resident for measured in rounds)),
        loss=mean(first.losses),
        blas=first.blas,
        dtype=first.dtype,
    )


def _differences_of_losses(
    measured: Mapping[str, Measurement], of_tokens: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, str]]:
    """Return notes on trainers that read other tokens, and what is wrong with those that have other losses without."""
    ours = measured[PLUGIN]
    notes, wrong = [], {}
    for name, theirs in measured.items():
        difference = loss_difference(ours.losses, theirs.losses)
        tolerance = TOLERANCE if {ours.dtype, theirs.dtype} == {"float32"} else TOLERANCE_OF_HALF_PRECISION
        if name in of_tokens:
            notes += [f"{name}: {note}" for note in of_tokens[name]]
            notes.append(f"{name}: with these tokens, its losses differ from {PLUGIN}'s by {difference:.2%} at most")
        elif not difference <= tolerance:  # nor is it with NaN
            wrong[name] = (
                f"{name} has other losses than {PLUGIN} on the same tokens ({_listed(theirs.losses)}, "
                f"not {_listed(ours.losses)}); its figures are of other work."
            )
    return notes, wrong


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the greatest difference of two losses of an iteration, as a share of the mean loss."""
    greatest = float(np.max([abs(our - their) for our, their in zip(ours, theirs, strict=True)]))  # NaN if any is
    return greatest / max(mean(map(abs, ours)), 1e-9)


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.4g}" for loss in losses)


def _differences_of_tokens(
    case: Case, batches: Sequence[Sequence[int]], measured: Mapping[str, Measurement]
) -> dict[str, list[str]]:
    """Return how the tokens of trainers that tokenise themselves differ from this project's, where they do."""
    tokenising = {name: theirs.row_tokens for name, theirs in measured.items() if theirs.row_tokens is not None}
    if not tokenising:
        return {}
    ours = [host_row(case.pairs[index]) for batch in batches for index in batch]
    decode = load_chat_tokenizer(case.settings.model).decode
    found = {name: differences_of_tokens(ours, theirs, decode) for name, theirs in tokenising.items()}
    return {name: notes for name, notes in found.items() if notes}


def differences_of_tokens(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], decode: Decode
) -> list[str]:
    """Say how one trainer's tokens differ from those of this project's, and in how many sequences.

    Args:
        ours, theirs: both sides of each row, as :func:`~mlx_cpo_plugin.bench.host_trainer.host_row` gives them.
        decode: makes text of tokens.
    """
    kinds: Counter[str] = Counter()
    for our, their in zip(ours, theirs, strict=True):
        for side in ("chosen", "rejected"):
            starts = [row[f"{side}_prompt_length"] for row in (our, their)]
            kinds.update([*dict.fromkeys(_differences(our[side], their[side], starts, decode))])
    return [f"{kind} ({count} of {2 * len(ours)} sequences)" for kind, count in kinds.items()]


def _differences(
    ours: Sequence[int], theirs: Sequence[int], starts_of_answer: Sequence[int], decode: Decode
) -> Iterator[str]:
    our_start, their_start = starts_of_answer
    expected = our_start
    for kind, i, i_end, j, j_end in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        if i == 0 or i_end <= our_start > i:
            expected += (j_end - j) - (i_end - i)
        where = "at the start" if i == 0 else "at the end" if i_end == len(ours) else ""
        if not where:
            yield "other tokens inside"
        elif kind == "replace":
            yield f"{decode(theirs[j:j_end])!r} in place of {decode(ours[i:i_end])!r} {where}"
        elif kind == "insert":
            yield f"{decode(theirs[j:j_end])!r} more {where}"
        else:
            yield f"no {decode(ours[i:i_end])!r} {where}"
    if their_start != expected:
        yield f"scores from {abs(their_start - expected)} tokens {'later' if their_start > expected else 'earlier'} on"
