"""The tokenised form of one preference row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePair:
    """One prompt with its chosen and rejected answer, as tokens.

    Attributes:
        prompt: int32 [P], P >= 1; the tokens that both answers share as their context.
        chosen, rejected: int32 [C] and [R], C, R >= 1; what follows the prompt on either side.
        chosen_scored, rejected_scored: bool [C] and [R]; the tokens whose log-probs count. At least one is true.
        source: where the row came from, e.g. ``train.jsonl:12``.
    """

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    chosen_scored: NDArray[np.bool_]
    rejected_scored: NDArray[np.bool_]
    source: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longer side, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def __len__(self) -> int:
        return self.length

    @property
    def answers(self) -> tuple[tuple[NDArray[np.int32], NDArray[np.bool_]], ...]:
        """The chosen and the rejected answer, each with which of its tokens are scored."""
        return (self.chosen, self.chosen_scored), (self.rejected, self.rejected_scored)

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of the chosen answer."""
        return int(self.chosen_scored.sum())

    @property
    def tokens(self) -> int:
        """Tokens of prompt and both answers."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)
