"""The compiled kernels, built once for all tests of a run and outside the cache of whoever runs them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.kernels import library
from support.fresh_environment import WORKSHOP


def use_kernels(patch: pytest.MonkeyPatch, wanted: str = library.ALWAYS) -> None:
    """Let runs use the kernels as ``wanted``, and load them; skip the test where that is impossible."""
    patch.setenv(library.VARIABLE, wanted)
    patch.setenv("XDG_CACHE_HOME", str(Path(os.environ[WORKSHOP]) / "cache"))
    skip_where_there_are_none()
    said: list[str] = []
    assert library.usable(said.append), said


def skip_where_there_are_none() -> None:
    """Skip the test on a machine that cannot have kernels."""
    if reason := _reason_to_skip():
        pytest.skip(reason)


@cache
def _reason_to_skip() -> str:
    blas.use_fast_blas()
    if blas.product() is None:
        return "needs MLX on a Linux CPU with an OpenBLAS"
    if library.compiler() is None:
        return "needs a C++ compiler"
    return ""
