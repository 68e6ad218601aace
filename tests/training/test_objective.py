"""The loss of an optimizer step: what each pair and each token weighs in it, and its gradient against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.refusals import refused
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.model.logps import AnswerScores
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.training.gradient_methods import AnswerGradients, BatchGradients, GradientMethod
from mlx_cpo_plugin.training.gradients import gradients_for
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.trainer import evaluate_cpo

BETA, GAMMA, ALPHA, DELTA = 0.3, 0.7, 0.25, 3.0
OPTIONS = {"beta": BETA, "simpo_gamma": GAMMA, "alphapo_alpha": ALPHA, "delta": DELTA}


def shared(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    return gradients_for(model, objective, choose_scorer(model, pairs, "shared"), pairs)


def segments(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    return gradients_for(model, objective, choose_scorer(model, pairs, "shared"), pairs, step_size=6)


METHODS: dict[str, Callable[..., GradientMethod]] = {
    "plain": lambda model, objective, pairs: BatchGradients(model, objective),
    "answer by answer": lambda model, objective, pairs: AnswerGradients(model, objective),
    "shared": shared,
    "segments": segments,
}


def some_pairs() -> list[PreferencePair]:
    """Pairs with answers of very different lengths, the first one's with a common start, and tokens not scored."""
    pairs = [*build_pairs(3, seed=2, longest=14), *build_pairs(2, seed=3, longest=3)]
    first = pairs[0]
    alike = min(len(first.chosen), len(first.rejected)) // 2
    first.rejected[:alike] = first.chosen[:alike]
    pairs[1].chosen_scored[0] = False
    return pairs


def step_loss(
    model: nn.Module, pairs: Sequence[PreferencePair], loss_type: str, smoothing: float, cpo_alpha: float
) -> mx.array:
    """The loss of one step over ``pairs``, spelled out in the model's own precision."""
    losses, nll, tokens = [], mx.array(0.0, mx.float64), 0
    for pair in pairs:
        sums, counts = [], []
        for answer, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
            logits = model(mx.array(np.concatenate([pair.prompt, answer]))[None, :-1])[0, len(pair.prompt) - 1 :]
            picked = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
            sums.append(mx.where(mx.array(scored), picked - mx.logsumexp(logits, axis=-1), 0).sum())
            counts.append(int(scored.sum()))
        nll, tokens = nll - sums[0], tokens + counts[0]
        if loss_type in ("ipo", "simpo", "alphapo"):
            sums = [total / count for total, count in zip(sums, counts, strict=True)]
        losses.append(pair_loss(loss_type, *sums, smoothing))
    return sum(losses) / len(pairs) + cpo_alpha * nll / tokens


def pair_loss(loss_type: str, chosen: mx.array, rejected: mx.array, smoothing: float) -> mx.array:
    logits = chosen - rejected
    if loss_type == "hinge":
        return mx.maximum(1 - BETA * logits, 0)
    if loss_type == "ipo":
        return (logits - 1 / (2 * BETA)) ** 2
    if loss_type == "dpop":
        return mx.log(1 + mx.exp(-BETA * logits)) + DELTA * mx.maximum(-logits, 0)
    margin = BETA * logits
    if loss_type == "simpo":
        margin = BETA * logits - GAMMA
    if loss_type == "alphapo":
        margin = BETA * (mx.exp(-ALPHA * rejected) - mx.exp(-ALPHA * chosen)) / ALPHA - GAMMA
    return (1 - smoothing) * mx.log(1 + mx.exp(-margin)) + smoothing * mx.log(1 + mx.exp(margin))


def float64_gradient(
    pairs: Sequence[PreferencePair], loss_type: str, smoothing: float, cpo_alpha: float
) -> tuple[float, dict[str, np.ndarray]]:
    with mx.stream(mx.cpu):
        wide = add_adapter(build_model())
        wide.set_dtype(mx.float64)
        loss, gradient = nn.value_and_grad(wide, step_loss)(wide, pairs, loss_type, smoothing, cpo_alpha)
        wide.update(gradient)
        return loss.item(), parameters(wide)


CASES = [
    (loss_type, smoothing, cpo_alpha)
    for loss_type in ("sigmoid", "hinge", "ipo", "dpop", "simpo", "alphapo")
    for smoothing in ((0.0, 0.1) if loss_type in ("sigmoid", "simpo", "alphapo") else (0.0,))
    for cpo_alpha in ((0.0, 0.7) if loss_type in ("sigmoid", "ipo") and not smoothing else (0.7,))
]


@pytest.mark.parametrize(("loss_type", "smoothing", "cpo_alpha"), CASES)
def test_micro_batches_add_up_to_the_float64_gradient_of_their_step(
    loss_type: str, smoothing: float, cpo_alpha: float, subtests: pytest.Subtests
) -> None:
    pairs = some_pairs()
    loss, gradient = float64_gradient(pairs, loss_type, smoothing, cpo_alpha)
    options = OPTIONS | ({"label_smoothing": smoothing} if smoothing else {})
    objective = objective_for(loss_type, options, cpo_alpha=cpo_alpha)
    model = add_adapter(build_model())
    step = StepTotals.of(pairs)
    for method, method_for in METHODS.items():
        with subtests.test(method):
            compute = method_for(model, objective, pairs)

            parts = [compute(micro_batch, step) for micro_batch in (pairs[:1], pairs[1:4], pairs[4:])]

            added = {name: sum(np.array(part.gradient[name], np.float64) for part in parts) for name in gradient}
            assert_same(added, gradient, tolerance=2e-4)
            contributions = [objective.step_contribution(part.scores, *step)[0].item() for part in parts]
            assert sum(contributions) == pytest.approx(loss, rel=1e-5)


def test_without_the_likelihood_a_step_is_the_mean_over_pairs_to_the_bit() -> None:
    pairs, model = some_pairs(), add_adapter(build_model())
    method = BatchGradients(model, objective_for("sigmoid", {}))

    one, other = method(pairs, StepTotals(7, 1)), method(pairs, StepTotals(7, 10_000))

    left, right = ({name: np.array(value) for name, value in result.gradient.items()} for result in (one, other))
    assert_same(left, right)
    part, losses = objective_for("sigmoid", {}).step_contribution(one.scores, 7, 1)
    assert mx.array_equal(part, losses.sum() / 7)


@pytest.mark.parametrize("scoring", ["plain", "shared"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_validation_takes_the_likelihood_over_all_chosen_tokens(loss_type: str, batch_size: int, scoring: str) -> None:
    pairs, model = some_pairs(), build_model()
    with mx.stream(mx.cpu):
        wide = build_model()
        wide.set_dtype(mx.float64)
        plain, with_nll = (step_loss(wide, pairs, loss_type, 0.0, cpo_alpha).item() for cpo_alpha in (0.0, 0.7))
    options = {"loss_options": {"simpo_gamma": GAMMA} if loss_type == "simpo" else {}, "scoring": scoring}

    without = evaluate_cpo(model, pairs, batch_size, -1, BETA, DELTA, 2048, loss_type, **options)
    loss, _, _, means = evaluate_cpo(
        model, pairs, batch_size, -1, BETA, DELTA, 2048, loss_type, cpo_alpha=0.7, **options
    )

    assert without[0] == pytest.approx(plain, rel=1e-5)
    assert loss == pytest.approx(with_nll, rel=1e-5)
    assert means["nll_loss"] == without[3]["nll_loss"] == pytest.approx((with_nll - plain) / 0.7, rel=1e-5)


def test_the_likelihood_needs_no_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = some_pairs(), add_adapter(build_model())
    calls = []
    forward = type(model).__call__
    monkeypatch.setattr(type(model), "__call__", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))

    for cpo_alpha in (0.0, 1.0):
        BatchGradients(model, objective_for("sigmoid", {}, cpo_alpha=cpo_alpha))(pairs, StepTotals.of(pairs))

    assert len(calls) == 2


def test_a_negative_weight_is_one_sentence() -> None:
    with refused(ConfigError, key="cpo_alpha", place="in the call", allowed="a number >= 0"):
        objective_for("sigmoid", {}, cpo_alpha=-1)


def test_every_parameter_of_the_reference_is_compared() -> None:
    names = {name for name, _ in tree_flatten(add_adapter(build_model()).trainable_parameters())}

    assert float64_gradient(some_pairs()[:1], "sigmoid", 0.0, 0.0)[1].keys() == names


def test_a_pair_that_is_learned_long_since_has_no_gradient_and_the_others_have_theirs() -> None:
    goal = objective_for("sigmoid", {"beta": 1.0})
    margins = mx.array([60.0, 3.0, -60.0])

    def part(chosen_logps: mx.array) -> mx.array:
        rest = mx.zeros(3)
        return goal.step_contribution(AnswerScores(chosen_logps, *[rest] * 5), 3, 1)[0]

    slopes = mx.grad(part)(margins)

    assert slopes[0].item() == 0
    np.testing.assert_allclose(np.array(slopes[1:]), [-1 / (1 + np.exp(3.0)) / 3, -1 / 3], rtol=1e-5)
