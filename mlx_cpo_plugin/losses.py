"""The built-in CPO losses.

Each takes the log-probs of the chosen and of the rejected answers (float32, [B]) and returns one loss a pair
(float32, [B]). With ``logits = chosen_logps - rejected_logps`` there is no reference model in any of them: the gap
is compared with an absolute target. Reference: Xu et al. 2024, "Contrastive Preference Optimization", arXiv 2401.08417.

The paper's second term, the negative log-likelihood of the chosen answers, is no part of a loss: ``cpo_alpha`` adds it
to any of them, see :class:`mlx_cpo_plugin.training.objective.Objective`.
"""

from __future__ import annotations

import mlx.core as mx


def sigmoid_loss(
    chosen_logps: mx.array, rejected_logps: mx.array, beta: float, label_smoothing: float = 0.0
) -> mx.array:
    """Return ``-log sigmoid(beta * logits)``, with smoothed labels as :func:`smoothed` says.

    Source: Xu et al. 2024, arXiv 2401.08417, the preference term of the CPO loss.

    With beta 0.1, chosen -10 and rejected -12: logits 2, -log sigmoid(0.2) = 0.598139; with label_smoothing 0.1:
    0.9 * 0.598139 + 0.1 * 0.798139 = 0.618139.
    """
    return smoothed(beta * (chosen_logps - rejected_logps), label_smoothing)


def hinge_loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
    """Return ``max(0, 1 - beta * logits)``.

    Source: Zhao et al. 2023, "SLiC-HF", arXiv 2305.10425, the rank calibration loss with a margin of 1 / beta.

    With beta 0.1, chosen -10 and rejected -12: 1 - 0.2 = 0.8.
    """
    return mx.maximum(1 - beta * (chosen_logps - rejected_logps), 0)


def ipo_loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
    """Return ``(logits - 1 / (2 * beta)) ** 2`` of log-probs that are means over the answer's tokens.

    Source: Azar et al. 2023, "A General Theoretical Paradigm", arXiv 2310.12036, eq. 17.

    With beta 0.1, chosen -1.0 and rejected -1.5: (0.5 - 5) ** 2 = 20.25.
    """
    return mx.square((chosen_logps - rejected_logps) - 1 / (2 * beta))


def dpop_loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float, delta: float) -> mx.array:
    """Return ``-log sigmoid(beta * logits) + delta * max(0, rejected_logps - chosen_logps)``.

    Without a reference model the policy's own log-probs stand in the penalty.
    Source: Pal et al. 2024, "Smaug", arXiv 2402.13228, the DPO-Positive loss with the reference terms dropped.

    With beta 0.1, delta 50, chosen -12 and rejected -10: -log sigmoid(-0.2) + 50 * 2 = 100.798139.
    """
    penalty = mx.maximum(rejected_logps - chosen_logps, 0)
    return sigmoid_loss(chosen_logps, rejected_logps, beta) + delta * penalty


def simpo_loss(
    chosen_logps: mx.array, rejected_logps: mx.array, beta: float, simpo_gamma: float, label_smoothing: float = 0.0
) -> mx.array:
    """Return ``-log sigmoid(beta * logits - simpo_gamma)`` of log-probs that are means over the answer's tokens.

    The default of simpo_gamma is 0.5; labels are smoothed as :func:`smoothed` says.
    Source: Meng et al. 2024, "SimPO", arXiv 2405.14734, eq. 6.

    With beta 2, simpo_gamma 0.5, chosen -1.0 and rejected -1.5: -log sigmoid(1.0 - 0.5) = 0.474077.
    """
    return smoothed(beta * (chosen_logps - rejected_logps) - simpo_gamma, label_smoothing)


def alphapo_loss(
    chosen_logps: mx.array,
    rejected_logps: mx.array,
    beta: float,
    simpo_gamma: float,
    alphapo_alpha: float,
    label_smoothing: float = 0.0,
) -> mx.array:
    """Return ``-log sigmoid(chosen reward - rejected reward - simpo_gamma)`` with the rewards of AlphaPO.

    The log-probs are means over the answer's tokens; for their rewards see :func:`alphapo_rewards`. The default of
    alphapo_alpha is 0.25; labels are smoothed as :func:`smoothed` says.
    Source: Gupta et al. 2025, "AlphaPO", arXiv 2501.03884.

    With beta 2, simpo_gamma 0.5, alphapo_alpha 0.25, chosen -1.0 and rejected -1.5: rewards -2.272203 and -3.639931,
    -log sigmoid(1.367728 - 0.5) = 0.350590.
    """
    chosen, rejected = (alphapo_rewards(logps, beta, alphapo_alpha) for logps in (chosen_logps, rejected_logps))
    return smoothed(chosen - rejected - simpo_gamma, label_smoothing)


def alphapo_rewards(logps: mx.array, beta: float, alphapo_alpha: float, **_: float) -> mx.array:
    """Return ``beta * (1 - p ** -alphapo_alpha) / alphapo_alpha`` with ``p = exp(logps)``, float32 [B].

    Where alphapo_alpha is 0 this is the limit ``beta * logps``, the reward of SimPO. The other options of the loss are
    not read.
    Source: Gupta et al. 2025, "AlphaPO", arXiv 2501.03884.
    """
    if alphapo_alpha == 0:
        return beta * logps
    # 1 - exp(x) as one function, which for a small alphapo_alpha loses no digits
    return -beta * mx.expm1(-alphapo_alpha * logps) / alphapo_alpha


def smoothed(margins: mx.array, label_smoothing: float) -> mx.array:
    """Return ``(1 - label_smoothing) * -log sigmoid(margins) + label_smoothing * -log sigmoid(-margins)``.

    That is the expected loss if labels are swapped with this probability.
    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", conservative DPO.
    """
    # -log sigmoid(-x) is x more than -log sigmoid(x)
    return softplus(-margins) + label_smoothing * margins


def softplus(x: mx.array) -> mx.array:
    """Return ``log(1 + exp(x))``, which is ``-log sigmoid(-x)``, without overflow for any finite x."""
    return mx.logaddexp(x, mx.zeros_like(x))
