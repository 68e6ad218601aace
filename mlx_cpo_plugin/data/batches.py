"""Batch pairs: which pairs are seen when, and how they are laid out in arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, islice, takewhile
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.pair import PreferencePair

LENGTH_MULTIPLE = 32
SCORED_MULTIPLE = 32

Arrays = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
StepArrays = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Batch:
    """Answers as arrays, one a row. Of B pairs, row i is the i-th chosen answer and row B + i the i-th rejected one.

    Attributes:
        tokens: int32 [rows, T]; prompt and answer, padded on the right with zeros.
        scored_positions: int32 [N]; where the scored tokens are predicted, as ``row * (T - 1) + position``.
        targets: int32 [N]; the scored tokens themselves.
        target_rows: int32 [N]; the row of each scored token, or the number of rows where the entry is padding.
        token_counts: float32 [rows]; scored tokens of each row.
    """

    tokens: mx.array
    scored_positions: mx.array
    targets: mx.array
    target_rows: mx.array
    token_counts: mx.array

    @property
    def arrays(self) -> Arrays:
        """The arrays alone, for a compiled function to take; ``Batch(*arrays)`` is the batch again."""
        return self.tokens, self.scored_positions, self.targets, self.target_rows, self.token_counts


def collate(pairs: Sequence[PreferencePair]) -> Batch:
    """Lay out both answers of every pair, the chosen ones first."""
    return collate_answers(
        [(pair.prompt, pair.chosen, pair.chosen_scored) for pair in pairs]
        + [(pair.prompt, pair.rejected, pair.rejected_scored) for pair in pairs]
    )


def collate_answers(answers: Sequence[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]]) -> Batch:
    """Lay out answers, each given as (prompt, answer, scored), padded so that few shapes occur."""
    longest = max(len(prompt) + len(answer) for prompt, answer, _ in answers)
    width = 1 + _round_up(longest - 1, LENGTH_MULTIPLE)
    tokens = np.zeros((len(answers), width), np.int32)
    positions, targets, rows = [], [], []
    for row, (prompt, answer, scored) in enumerate(answers):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + len(answer)] = answer
        offsets = np.flatnonzero(scored)
        positions.append(row * (width - 1) + len(prompt) + offsets - 1)
        targets.append(answer[offsets])
        rows.append(np.full(len(offsets), row))
    counts = [len(row) for row in rows]
    padding = _round_up(sum(counts), SCORED_MULTIPLE) - sum(counts)
    return Batch(
        tokens=mx.array(tokens),
        scored_positions=_padded(positions, padding, 0),
        targets=_padded(targets, padding, 0),
        target_rows=_padded(rows, padding, len(answers)),
        token_counts=mx.array(np.array(counts, np.float32)),
    )


def _padded(parts: Sequence[NDArray[np.generic]], padding: int, value: int) -> mx.array:
    return mx.array(np.concatenate([*parts, np.full(padding, value)]).astype(np.int32))


def scored_tokens(pairs: Sequence[PreferencePair]) -> int:
    """Return how many tokens of both sides are scored."""
    return sum(pair.chosen_tokens + int(pair.rejected_scored.sum()) for pair in pairs)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class StepTotals(NamedTuple):
    """What the means of an optimizer step are over, all its micro-batches and ranks: pairs, and their chosen tokens."""

    pairs: int
    chosen_tokens: int

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair]) -> StepTotals:
        """Return the totals of a step of these pairs."""
        return cls(len(pairs), sum(pair.chosen_tokens for pair in pairs))

    @property
    def arrays(self) -> StepArrays:
        """Both as float32 [], for a compiled function to take."""
        return mx.array(float(self.pairs)), mx.array(float(self.chosen_tokens))


@dataclass(frozen=True)
class MicroBatch:
    """One iteration's share of an optimizer step.

    Attributes:
        indices: the pairs of this rank; empty where a tail has fewer pairs than there are ranks.
        window: the pairs of the whole optimizer step, over all its micro-batches and ranks.
        closes_window: whether the optimizer step follows.
        epoch: passes over the data once it is done, e.g. 1.5.
    """

    indices: tuple[int, ...]
    window: tuple[int, ...]
    closes_window: bool
    epoch: float

    def totals(self, chosen_tokens: Sequence[int]) -> StepTotals:
        """Return what the whole optimizer step holds, of all pairs' scored tokens of their chosen answers."""
        return StepTotals(len(self.window), sum(chosen_tokens[index] for index in self.window))


@dataclass(frozen=True)
class BatchSize:
    """How much goes into a micro-batch, over all ranks.

    Attributes:
        pairs: this many pairs, unless ``tokens`` is set.
        tokens: as many pairs as have no more tokens together; one at least.
        accumulation: micro-batches of an optimizer step.
    """

    pairs: int
    tokens: int | None = None
    accumulation: int = 1

    def windows(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[list[int]]]:
        """Yield the micro-batches of each optimizer step of an epoch, whose pairs come in ``order``.

        By pairs, a step is cut into micro-batches of like length, so that accumulating k batches of b pairs is, pair
        for pair, the step of one batch of k * b. By tokens, micro-batches follow the order.
        """
        if self.tokens is None:
            step = self.pairs * self.accumulation
            for start in range(0, len(order), step):
                window = sorted(order[start : start + step], key=lambda index: lengths[index])
                yield [window[at : at + self.pairs] for at in range(0, len(window), self.pairs)]
            return
        batches: list[list[int]] = []
        room = 0
        for index in order:
            if lengths[index] > room:
                batches.append([])
                room = self.tokens
            batches[-1].append(index)
            room -= lengths[index]
        for start in range(0, len(batches), self.accumulation):
            yield batches[start : start + self.accumulation]


def training_plan(
    lengths: Sequence[int], size: BatchSize, *, iters: int, seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """Yield ``iters`` micro-batches in which every epoch sees each pair exactly once, in a seeded order.

    Args:
        lengths: tokens of each pair.
        iters: micro-batches to yield; a step that they cut short closes early and counts only what it holds.
    """
    remaining = iters
    for epoch in count():
        windows = list(_windows(lengths, size, seed, [epoch]))
        in_epoch, done = sum(map(len, windows)), 0
        for window in windows:
            micro_batches = window[:remaining]
            in_window = tuple(chain.from_iterable(micro_batches))
            for number, indices in enumerate(micro_batches, 1):
                passes = epoch + (done + number) / in_epoch
                yield MicroBatch(tuple(indices[rank::world_size]), in_window, number == len(micro_batches), passes)
            done += len(micro_batches)
            remaining -= len(micro_batches)
            if remaining == 0:
                return


def last_step_start(lengths: Sequence[int], size: BatchSize, *, iters: int, seed: int) -> int:
    """Return how many of the first ``iters`` micro-batches of :func:`training_plan` come before its last step."""
    ends = accumulate(len(window) for window in _windows(lengths, size, seed, count()))
    return max(takewhile(lambda end: end < iters, ends), default=0)


def epoch_ends(lengths: Sequence[int], size: BatchSize, *, iters: int, seed: int) -> frozenset[int]:
    """Return after which of the first ``iters`` micro-batches of :func:`training_plan` an epoch is over."""
    ends = accumulate(sum(map(len, _windows(lengths, size, seed, [epoch]))) for epoch in count())
    return frozenset(takewhile(lambda end: end <= iters, ends))


def micro_batches_of(epochs: int, lengths: Sequence[int], size: BatchSize, seed: int) -> int:
    """Return how many micro-batches :func:`training_plan` has in its first epochs."""
    return sum(len(window) for window in _windows(lengths, size, seed, range(epochs)))


def _windows(lengths: Sequence[int], size: BatchSize, seed: int, epochs: Iterable[int]) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each optimizer step."""
    for epoch in epochs:
        yield from size.windows(epoch_order(len(lengths), seed, epoch), lengths)


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch sees the pairs; it depends on nothing else."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
    return order


def evaluation_plan(
    pairs: Sequence[PreferencePair], *, batch_size: int, num_batches: int = -1, rank: int = 0, world_size: int = 1
) -> Iterator[list[PreferencePair]]:
    """Yield this rank's share of every pair, each exactly once, or of the first ``num_batches`` batches; -1 means all.

    A limit takes pairs in the order of the data, so that it means the same pairs however many ranks there are.
    """
    limit = len(pairs) if num_batches < 0 else min(len(pairs), num_batches * batch_size)
    mine = sorted(islice(pairs, limit), key=lambda pair: pair.length)[rank::world_size]
    rows = max(1, batch_size // world_size)
    for start in range(0, len(mine), rows):
        yield mine[start : start + rows]
