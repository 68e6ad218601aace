"""Parameters and gradients of a model by name."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten


def by_name(tree: object) -> dict[str, mx.array]:
    """Return the arrays of a parameter tree by their names; trees of one model can differ in empty branches."""
    return dict(tree_flatten(tree))
