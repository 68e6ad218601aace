"""Other behaviour for single modules of a model, undone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]


@contextmanager
def overridden_calls(
    replacements: Sequence[tuple[nn.Module, Call]], method: str = "__call__", row_by_row: bool = False
) -> Iterator[None]:
    """Let ``call(module, *args, **kwargs)`` answer each module's call until the context ends, normally or not.

    Only the modules given are touched, not their classes: another model in the same process keeps its behaviour.

    Args:
        method: the method to answer in place of the call.
        row_by_row: what the new classes say of themselves: that each output depends on its own row of the weight alone.
    """
    originals = [(module, type(module)) for module, _ in replacements]
    try:
        for module, call in replacements:
            original = type(module)
            # The name stays, since mlx_lm and error messages tell layers by it.
            body = {method: call, "__module__": original.__module__, "row_by_row": row_by_row}
            module.__class__ = type(original.__name__, (original,), body)
        yield
    finally:
        for module, original in reversed(originals):
            module.__class__ = original
