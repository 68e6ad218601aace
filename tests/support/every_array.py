"""Every array that Python sees in a pass: what each operation returns, and what arrives for it on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

# What takes functions, waits for arrays, or returns what it is given.
_NO_OPERATIONS = {"custom_function", "checkpoint", "compile", "depends", "eval", "async_eval", "stop_gradient"}
_NO_OPERATIONS |= {"grad", "value_and_grad", "vjp", "jvp", "vmap", "save_safetensors", "load", "array"}
_METHODS = [
    f"__{prefix}{name}__" for name in ["add", "sub", "mul", "truediv", "matmul", "pow"] for prefix in ("", "r", "i")
]
_METHODS += ["__neg__", "__getitem__", "astype", "max", "sum", "mean", "square", "reciprocal", "exp", "log", "view"]

Array = np.ndarray[Any, np.dtype[np.float32]]


@contextmanager
def recorded_arrays() -> Iterator[list[tuple[str, mx.array]]]:
    """Yield a list that takes in the names and results of operations and the cotangents of these, as long as it lasts.

    What an operation and its derivative do inside MLX is not seen.
    """
    recorded: list[tuple[str, mx.array]] = []
    with pytest.MonkeyPatch.context() as patch:
        for place in (mx, mx.fast, mx.linalg, mx.random):
            for name in dir(place):
                if name.islower() and not name.startswith("_") and name not in _NO_OPERATIONS:
                    function = getattr(place, name)
                    if callable(function) and not isinstance(function, type):
                        patch.setattr(place, name, _seen(name, function, recorded))
        scattered = type(mx.zeros(1).at[0])
        for owner, methods in ((mx.array, _METHODS), (scattered, ["add", "subtract", "multiply", "maximum"])):
            for name in methods:
                if hasattr(owner, name):
                    patch.setattr(owner, name, _seen(name, getattr(owner, name), recorded))
        yield recorded


def _seen(name: str, function: Callable[..., Any], recorded: list[tuple[str, mx.array]]) -> Callable[..., Any]:
    @mx.custom_function
    def tap(x: mx.array) -> mx.array:
        return x

    @tap.vjp
    def tap_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        recorded.append((f"cotangent of {name}", cotangent))
        return cotangent

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, mx.array) or result.dtype not in (mx.float32, mx.bfloat16):
            return result
        recorded.append((name, result))
        return tap(result)

    return call


def subnormal(recorded: list[tuple[str, mx.array]]) -> list[str]:
    """Return which of the arrays hold numbers that are not zero and less than 2**-126, and how many."""
    found = []
    for name, array in recorded:
        sizes = np.abs(np.array(array.astype(mx.float32)))
        count = int(((sizes > 0) & (sizes < np.finfo(np.float32).tiny)).sum())
        if count:
            found.append(f"{name} {array.shape}: {count} of {array.size}")
    return found
