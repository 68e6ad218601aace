"""What validations decide: which adapter is the best, when to stop early, and the advice to change the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_cpo_plugin.settings.cpo_options import MEASURES

BEST_ADAPTER_NAME = "best_adapters.safetensors"
# Validations without a better margin in the first part of a run that make a plateau.
PLATEAU = 3
EARLY_PART = 0.5


class BestSoFar:
    """Follows the validations of a run.

    Args:
        measure: a key of :data:`mlx_cpo_plugin.settings.cpo_options.MEASURES`.
        patience: validations in a row without an improvement before the run stops; ``None``: it never does.
        pairs: what tells the validation pairs from others; values over other pairs are not compared.
        saves: whether the adapter of the best validation is saved.

    Attributes:
        value: of the best validation; ``None`` before the first.
        iteration: of the best validation.
        waited: validations since then.
        last: iteration of the last validation, whatever it was compared with.
    """

    def __init__(self, measure: str, patience: int | None = None, pairs: str = "", saves: bool = False) -> None:
        self.name, self.sign = MEASURES[measure]
        self.pairs = pairs
        self.saves = saves
        self.patience = patience
        self.value: float | None = None
        self.iteration = 0
        self.waited = 0
        self.last = 0

    def take_note(self, iteration: int, means: Mapping[str, float]) -> None:
        """Take note of a validation."""
        self.last = iteration
        if self.is_best(means):
            self.value, self.iteration, self.waited = means[self.name], iteration, 0
        else:
            self.waited += 1

    def is_best(self, means: Mapping[str, float]) -> bool:
        """Return whether a validation is better than all those that were taken note of."""
        value = means[self.name]
        return math.isfinite(value) and (self.value is None or self.sign * value > self.sign * self.value)

    @property
    def exhausted(self) -> bool:
        """Whether patience is over."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        measured = {"measure": self.name, "pairs": self.pairs, "saved": self.saves}
        return {**measured, "value": self.value, "iteration": self.iteration, "waited": self.waited, "last": self.last}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned, unless it was measured otherwise: then the search begins anew."""
        self.last = state.get("last", 0)
        if self.goes_on_from(state):
            self.value, self.iteration, self.waited = state["value"], state["iteration"], state["waited"]

    def goes_on_from(self, state: Mapping[str, Any]) -> bool:
        """Return whether ``state`` is the same measure of the same pairs, and the adapter was saved if it is to be."""
        same = (state["measure"], state["pairs"]) == (self.name, self.pairs)
        return same and (state["saved"] or not self.saves)


class PlateauAdvice:
    """Tells once that the validation margin stopped rising early, and that ``dpop`` may help."""

    def __init__(self, loss_type: str, iters: int, pairs: str = "") -> None:
        self.margins = BestSoFar("margin", pairs=pairs)
        self.loss_type = loss_type
        self.iters = iters
        self.told = False

    def advice(self, iteration: int, means: Mapping[str, float]) -> str | None:
        """Take note of a validation; return what there is to tell after it."""
        self.margins.take_note(iteration, means)
        early = iteration <= EARLY_PART * self.iters
        if self.told or self.loss_type == "dpop" or not early or self.margins.waited < PLATEAU:
            return None
        self.told = True
        return (
            f"Iter {iteration}: the validation margin has not risen since iteration {self.margins.iteration}; if this "
            "stays so, switch to dpo_cpo_loss_type: dpop and bound the drift with delta."
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {"margins": self.margins.state(), "told": self.told}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.margins.restore(state["margins"])
        self.told = state["told"]
