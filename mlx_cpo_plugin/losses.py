"""The four built-in CPO losses.

Each takes the log-probs of the chosen and of the rejected answers (float32, [B]) and returns one loss a pair
(float32, [B]). With ``logits = chosen_logps - rejected_logps`` there is no reference model in any of them: the gap
is held against an absolute target. Reference: Xu et al. 2024, "Contrastive Preference Optimization", arXiv 2401.08417.
"""

from __future__ import annotations

import mlx.core as mx


def sigmoid_loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
    """Return ``-log sigmoid(beta * logits)``.

    Source: Xu et al. 2024, arXiv 2401.08417, the preference term of the CPO loss.

    With beta 0.1, chosen -10 and rejected -12: logits 2, -log sigmoid(0.2) = 0.598139.
    """
    return softplus(-beta * (chosen_logps - rejected_logps))


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


def softplus(x: mx.array) -> mx.array:
    """Return ``log(1 + exp(x))``, which is ``-log sigmoid(-x)``, without overflow for any finite x."""
    return mx.logaddexp(x, mx.zeros_like(x))
