"""What a run minimises: a registered loss bound to the values of its options, and the likelihood term beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.errors import ConfigError, first_line, is_device_fault
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings.cpo_options import BETA, CPO_ALPHA, DELTA, LABEL_SMOOTHING
from mlx_cpo_plugin.settings.validation import check, not_read, refused
from mlx_cpo_plugin.types import LossType

# A loss that falls by less than this for each nat is done with its pair: no update shows what it adds to the gradient,
# and the layers would make subnormal numbers of it, which cost a processor up to a hundred cycles each.
LEAST_SLOPE = 2.0**-50


@dataclass(frozen=True)
class Objective:
    """Scores of B pairs -> their losses, and what they add to the loss of an optimizer step.

    The loss of a step is the mean of ``fn`` over its pairs, plus ``cpo_alpha`` times the negative log-likelihood of
    their chosen answers, which is a mean over the tokens of all these answers together: each token weighs the same,
    whatever micro-batch, rank or answer it is in. Source: Xu et al. 2024, arXiv 2401.08417, section 3.

    Attributes:
        fn: ``fn(chosen_logps, rejected_logps, **options)``, float32 [B] to [B].
        options: the keyword arguments of ``fn``.
        length_normalised: whether ``fn`` wants log-probs averaged over the answer's tokens.
        beta: what turns log-probs into rewards in the metrics, unless the loss has rewards of its own.
        cpo_alpha: weight of the negative log-likelihood.
        reward_fn: ``reward_fn(logps, **options)``, the rewards of the loss itself, float32 [B] to [B].
        takes_masks: whether ``fn`` is called as the host calls its ``cpo_loss``.
    """

    fn: Callable[..., mx.array]
    options: Mapping[str, object]
    length_normalised: bool
    beta: float
    cpo_alpha: float = 0.0
    reward_fn: Callable[..., mx.array] | None = None
    takes_masks: bool = False

    def losses(self, scores: AnswerScores) -> mx.array:
        """Return the preference loss of each pair, float32 [B], without the likelihood term.

        Raises:
            ConfigError: the loss returns something else.
        """
        if self.takes_masks:
            return _losses_by_masks(self.fn, scores, self.options)
        losses = self.fn(scores.chosen_logps, scores.rejected_logps, **self.options)
        return _of_each_pair(losses, len(scores.chosen_logps), self.fn, "the loss of each pair, not their mean,")

    def chosen_nll(self, scores: AnswerScores) -> mx.array:
        """Return the negative log-likelihood of each chosen answer in nats, summed over its tokens, float32 [B]."""
        return -scores.chosen_logps * scores.chosen_tokens if self.length_normalised else -scores.chosen_logps

    def step_contribution(
        self, scores: AnswerScores, pairs: int | mx.array, chosen_tokens: int | mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return what B pairs add to the loss of an optimizer step, float32 [], and their preference losses [B].

        Args:
            pairs, chosen_tokens: of the whole step, as in :class:`mlx_cpo_plugin.data.batches.StepTotals`.
        """
        chosen_logps: Any = _without_least_slopes(scores.chosen_logps)
        rejected_logps: Any = _without_least_slopes(scores.rejected_logps)
        scores = scores._replace(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
        losses = self.losses(scores)
        part = losses.sum() / pairs
        if self.cpo_alpha:
            part = part + self.cpo_alpha * self.chosen_nll(scores).sum() / chosen_tokens
        return part, losses

    def rewards(self, logps: mx.array) -> NDArray[np.float64]:
        """Return what the metrics report as rewards of answers, float64 [B], from their log-probs, float32 [B].

        Raises:
            ConfigError: the rewards of the loss are something else.
        """
        if self.reward_fn is None:
            return self.beta * np.array(logps, np.float64)
        rewards = self.reward_fn(logps, **self.options)
        return np.array(_of_each_pair(rewards, len(logps), self.reward_fn, "the reward of each answer"), np.float64)


@mx.custom_function
def _without_least_slopes(logps: mx.array) -> mx.array:
    """Return ``logps``; a slope by them that is less than :data:`LEAST_SLOPE` is zero."""
    return logps


@_without_least_slopes.vjp
def _without_least_slopes_vjp(logps: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.where(mx.abs(cotangent) < LEAST_SLOPE, 0, cotangent)


def objective_for(
    loss_type: str,
    settings: Mapping[str, object],
    loss_fn: Callable[..., mx.array] | None = None,
    cpo_alpha: float = 0.0,
) -> Objective:
    """Return the objective that ``loss_type`` names.

    Args:
        settings: values of options by name; what the loss reads and this lacks takes the option's default.
        loss_fn: a function to use in place of the registered one; it gets those of the loss's options that it takes.
            One that takes ``policy_chosen_score`` is called as the host calls its ``cpo_loss``, also under a
            ``loss_type`` that nobody has registered.
        cpo_alpha: weight of the negative log-likelihood of the chosen answers.

    Raises:
        ConfigError: no such loss is registered, a value is out of its option's range, labels are to be smoothed for a
            loss that does not do it, or the function does not return a finite number for each pair.
    """
    known = loss_types()
    if loss_fn is not None and not callable(loss_fn):
        allowed = "a function of chosen_logps and rejected_logps; a loss that has a name is set by loss_type"
        raise refused("loss_fn", loss_fn, _in_the_call(""), allowed)
    takes_masks = loss_fn is not None and "policy_chosen_score" in _parameters(loss_fn)
    if loss_fn is not None and takes_masks:
        known = {loss_type: LossType(loss_type, loss_type, loss_fn, "", options=(BETA, DELTA)), **known}
    if loss_type not in known:
        names = ", ".join(known)
        raise ConfigError(f"The loss {loss_type!r} is not known; use one of {names}.", key="loss_type", allowed=names)
    loss = known[loss_type]
    values = {option.name: settings.get(option.name, option.default) for option in loss.options}
    options = {option.name: check(option, values[option.name], _in_the_call) for option in loss.options}
    smoothing = settings.get(LABEL_SMOOTHING.name)
    if smoothing and not loss.reads(LABEL_SMOOTHING.name):
        raise not_read(LABEL_SMOOTHING.name, smoothing, _in_the_call(""), loss, known.values())
    beta = float(options.get("beta", settings.get("beta", BETA.default)))
    if takes_masks:
        options = {"beta": beta, "delta": settings.get("delta", DELTA.default), "loss_type": loss_type}
    elif loss_fn is not None:
        options = {name: value for name, value in options.items() if _takes(loss_fn, name)}
    objective = Objective(
        fn=loss_fn or loss.fn,
        options=options,
        length_normalised=loss.length_normalised,
        beta=beta,
        cpo_alpha=check(CPO_ALPHA, cpo_alpha, _in_the_call),
        reward_fn=loss.rewards if loss_fn is None else None,
        takes_masks=takes_masks,
    )
    _try_out(objective)
    return objective


def _try_out(objective: Objective) -> None:
    """Raise ``ConfigError`` where the functions of an objective fail with the most ordinary of scores."""
    one, two = mx.array([-1.0, -2.0]), mx.array([-2.0, -1.0])
    scores = AnswerScores(one, two, one, two, mx.ones(2), mx.ones(2))
    _check_call(objective)
    for function, compute in (
        (objective.fn, lambda: objective.losses(scores)),
        (objective.reward_fn, lambda: objective.rewards(one)),
    ):
        if function is None:
            continue
        try:
            values = np.array(compute())
            fault = "" if np.isfinite(values).all() else f"returns {values.tolist()}"
        except ConfigError:
            raise
        except Exception as error:  # whatever somebody's function raises
            if is_device_fault(error):
                raise
            fault = f"fails ({type(error).__name__}: {first_line(error)})"
        if fault:
            given = "".join(f", {name} {value}" for name, value in objective.options.items())
            raise ConfigError(
                f"The function {name_of(function)} of {function.__module__} {fault} for log-probs of -1 and -2{given}, "
                "but must return finite numbers."
            )


def _check_call(objective: Objective) -> None:
    """Raise ``ConfigError`` where the parameters of the loss are not those that it is called with."""
    masks = ("policy_chosen_score", "policy_rejected_score", "chosen_masks", "rejected_masks")
    named_arguments = (*(masks if objective.takes_masks else ()), *objective.options)
    positional = () if objective.takes_masks else ("chosen_logps", "rejected_logps")
    try:
        signature(objective.fn).bind(*positional, **dict.fromkeys(named_arguments))
    except TypeError as error:
        call = ", ".join((*positional, *(f"{name}=" for name in named_arguments)))
        raise ConfigError(
            f"The function {name_of(objective.fn)} of {objective.fn.__module__} is called as "
            f"{name_of(objective.fn)}({call}), but its parameters are others ({first_line(error)}): give it these.",
            key="loss_fn",
            allowed=call,
        ) from error
    except ValueError:  # functions written in C may not tell their parameters
        return


def _losses_by_masks(function: Callable[..., object], scores: AnswerScores, options: Mapping[str, object]) -> mx.array:
    """Return the loss of each pair, float32 [B], by a function that returns the mean over a batch, alone or first.

    It is asked pair by pair. Its masks have one entry before the answer, as the host's have, and one that counts for
    all scored tokens.
    """
    losses = []
    for pair in range(len(scores.chosen_logps)):
        of_pair = AnswerScores(*(column[pair : pair + 1] for column in scores))
        result = function(
            policy_chosen_score=of_pair.chosen_logps,
            policy_rejected_score=of_pair.rejected_logps,
            chosen_masks=mx.pad(of_pair.chosen_tokens[:, None], [(0, 0), (1, 0)]),
            rejected_masks=mx.pad(of_pair.rejected_tokens[:, None], [(0, 0), (1, 0)]),
            **options,
        )
        loss = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(loss, mx.array) and loss.size == 1:
            loss = loss.reshape(1)
        losses.append(_of_each_pair(loss, 1, function, "their mean loss, alone or first in a tuple,"))
    return mx.concatenate(losses)


def _of_each_pair(result: object, pairs: int, function: Callable[..., object], what: str) -> mx.array:
    """Return the result of a function for B pairs as float32 [B]; raise ``ConfigError`` where it is something else."""
    found = type(result).__name__
    if isinstance(result, mx.array):
        floats = mx.issubdtype(result.dtype, mx.floating)  # others have no gradient
        if floats and result.shape == (pairs,):
            return result.astype(mx.float32)
        found = f"an array of {f'shape {list(result.shape)}' if floats else result.dtype}"
    raise ConfigError(
        f"The function {name_of(function)} of {function.__module__} returns {found} for {pairs} "
        f"pair{'s' * (pairs > 1)}, but must return {what} as an mlx.core.array of floats of shape [{pairs}]."
    )


def name_of(function: Callable[..., object]) -> str:
    """Return what a function is called."""
    return str(getattr(function, "__name__", type(function).__name__))


def _takes(function: Callable[..., object], name: str) -> bool:
    parameters = _parameters(function)
    return name in parameters or any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())


def _parameters(function: Callable[..., object]) -> Mapping[str, Parameter]:
    """Return the parameters of a function by name; empty where one written in C does not tell them."""
    try:
        return signature(function).parameters
    except ValueError:
        return {}


def _in_the_call(key: str) -> str:
    return "in the call"
