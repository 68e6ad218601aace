"""How far our run and TRL's are apart, as ``trajectory.py`` says it."""

from __future__ import annotations

import numpy as np
import pytest
import trajectory
from trajectory import METRICS, Trajectory


def invented(seed: int) -> Trajectory:
    """Five steps of random numbers, and two modules of rank 2."""
    drawn = np.random.default_rng(seed)
    shapes = {"q_proj.lora_a": (6, 2), "q_proj.lora_b": (2, 4), "k_proj.lora_a": (3, 2), "k_proj.lora_b": (2, 3)}
    adapter = {name: drawn.standard_normal(shape) for name, shape in shapes.items()}
    return Trajectory({name: drawn.standard_normal(5) for name in METRICS}, adapter)


def added_weights(of: Trajectory) -> np.ndarray:
    return np.concatenate(
        [np.ravel(of.adapter[f"{module}.lora_a"] @ of.adapter[f"{module}.lora_b"]) for module in ("q_proj", "k_proj")]
    )


def test_adapters_are_as_far_apart_as_what_they_add_to_the_weights() -> None:
    ours, theirs = invented(0), invented(1)
    apart = np.linalg.norm(added_weights(ours) - added_weights(theirs))

    assert trajectory.distance(ours, theirs) == pytest.approx(apart / np.linalg.norm(added_weights(theirs)))


def test_the_table_has_the_last_distance_of_the_losses_and_the_greatest_of_each_metric() -> None:
    theirs = invented(1)
    apart = {metric: np.array([0.0, 0.5, 0.0, 0.0, 0.25]) * (1 + i) for i, metric in enumerate(METRICS)}
    ours = Trajectory({metric: theirs.steps[metric] - apart[metric] for metric in METRICS}, theirs.adapter)

    losses, last, *greatest, learned = trajectory.figures(ours, theirs)

    assert losses == f"{theirs.steps['loss'][0]:.4f} → {theirs.steps['loss'][-1]:.4f}"
    assert [float(cell) for cell in (last, *greatest)] == [0.25, 0.5, 1.0, 1.5, 2.0]
    assert learned == "0.00%"
