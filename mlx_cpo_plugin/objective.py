"""The loss of a run: a registered loss type bound to the values of its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.scoring import AnswerScores


@dataclass(frozen=True)
class Objective:
    """Scores of B pairs -> their losses.

    Attributes:
        fn: ``fn(chosen_logps, rejected_logps, **options)``, float32 [B] to [B].
        options: the keyword arguments of ``fn``.
        length_normalised: whether ``fn`` wants log-probs averaged over the answer's tokens.
        beta: what turns log-probs into rewards in the metrics.
    """

    fn: Callable[..., mx.array]
    options: Mapping[str, Any]
    length_normalised: bool
    beta: float

    def losses(self, scores: AnswerScores) -> mx.array:
        """Return the loss of each pair, float32 [B]."""
        return self.fn(scores.chosen_logps, scores.rejected_logps, **self.options).astype(mx.float32)


def objective_for(
    loss_type: str, settings: Mapping[str, Any], loss_fn: Callable[..., mx.array] | None = None
) -> Objective:
    """Return the objective that ``loss_type`` names.

    Args:
        settings: values of options by name; what the loss reads and this lacks takes the option's default.
        loss_fn: a function of the same signature to use in place of the registered one.

    Raises:
        ConfigError: no such loss is registered.
    """
    known = loss_types()
    if loss_type not in known:
        raise ConfigError(f"The loss {loss_type!r} is not known; use one of {', '.join(known)}.")
    loss = known[loss_type]
    options = {option.name: settings.get(option.name, option.default) for option in loss.options}
    return Objective(
        fn=loss_fn or loss.fn,
        options=options,
        length_normalised=loss.length_normalised,
        beta=float(options.get("beta", settings.get("beta", 0.1))),
    )
