"""Pairs split where their answers part: the shared prefix is computed once, and each answer goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.pair import PreferencePair


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens, and which tokens are scored from within.

    Attributes:
        inputs: int32 [1, n]; what the model reads.
        positions: int32 [m]; the inputs whose hidden state predicts a scored token.
        targets: int32 [m]; the scored tokens.
    """

    inputs: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]

    def __len__(self) -> int:
        return int(self.inputs.shape[1])


@dataclass(frozen=True)
class SplitPair:
    """A pair split at the first token where its answers differ: the shared prefix, then the rest of each answer.

    The last shared token is read by the answers' segments, since it predicts the first token of each.

    Attributes:
        prefix: ``None`` where only that one token is shared.
    """

    prefix: Segment | None
    chosen: Segment
    rejected: Segment

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments that there are."""
        return (self.chosen, self.rejected) if self.prefix is None else (self.prefix, self.chosen, self.rejected)

    @property
    def token_counts(self) -> tuple[int, int]:
        """Scored tokens of the chosen and of the rejected answer, the shared ones included."""
        shared = 0 if self.prefix is None else len(self.prefix.targets)
        return shared + len(self.chosen.targets), shared + len(self.rejected.targets)


def split_shared_prefix(pair: PreferencePair) -> SplitPair:
    """Split a pair after its prompt and whatever its answers have in common, down to their last token each."""
    common = _common_tokens(pair)
    prefix = np.concatenate([pair.prompt, pair.chosen[:common]])
    scored = np.concatenate([np.zeros(len(pair.prompt), bool), pair.chosen_scored[:common]])
    chosen, rejected = (
        _segment(_from_last(prefix, answer[common:]), _from_last([False], answer_scored[common:]))
        for answer, answer_scored in pair.answers
    )
    return SplitPair(_segment(prefix, scored) if len(prefix) > 1 else None, chosen, rejected)


def _common_tokens(pair: PreferencePair) -> int:
    longest = min(len(pair.chosen), len(pair.rejected)) - 1
    same = (pair.chosen[:longest] == pair.rejected[:longest]) & (
        pair.chosen_scored[:longest] == pair.rejected_scored[:longest]
    )
    return int(np.argmin(np.append(same, False)))


def _from_last(prefix: Sequence[Any] | NDArray[Any], rest: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.asarray(prefix)[-1:], rest])


def _segment(tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> Segment:
    at = np.flatnonzero(scored)
    return Segment(
        inputs=tokens[None, :-1].astype(np.int32),
        positions=(at - 1).astype(np.int32),
        targets=tokens[at].astype(np.int32),
    )


def is_long(pair: PreferencePair, step_size: int | None) -> bool:
    """Whether a pair has a side, prompt included, with more tokens than the step size; ``None``: no pair is long."""
    return step_size is not None and pair.length > step_size


def pieces(segment: Segment, step_size: int | None) -> list[Segment]:
    """Split a segment into consecutive ones of at most ``step_size`` tokens; ``None`` leaves it whole."""
    if step_size is None:
        return [segment]
    result = []
    for start in range(0, len(segment), step_size):
        inside = np.flatnonzero((segment.positions >= start) & (segment.positions < start + step_size))
        inputs = segment.inputs[:, start : start + step_size]
        result.append(Segment(inputs, segment.positions[inside] - start, segment.targets[inside]))
    return result
