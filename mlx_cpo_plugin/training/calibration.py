"""What a pass through the model costs beside its tokens, measured on the run's own model and device.

Starting operations and reading weights takes as long for few tokens as for many, so pairs share a pass where that is
faster, see :mod:`mlx_cpo_plugin.model.buckets`. A long run therefore computes gradients of few and of many tokens: of a
time ``a + b * tokens``, ``a / b`` is what a pass costs beside its tokens, in tokens. It is kept for later runs, so that
the same run has the same bits again; one that is too short to measure it takes what is written in ``device.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.atomic_files import cache_folder, replace_whole
from mlx_cpo_plugin.blas import kernel_threads
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import device_name
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.buckets import Grouping
from mlx_cpo_plugin.model.logps import evaluation_mode
from mlx_cpo_plugin.model.memory import tokens_that_fit
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.gradients import SharedPromptGradients
from mlx_cpo_plugin.training.objective import Objective

LEAST_WORK = 1e14
"""Multiplications and additions of a run, below which measuring takes too large a part of it."""
TOKENS = (16, 64, 256, 1024, 4096)
"""Of the passes that are timed, until one takes :data:`LONGER` times as long as the first."""
LONGER = 3
REPEATS = 3
MOST_SECONDS = 1.0
"""A pass that takes longer is not repeated: this is a device, or a model, to which a start costs little."""
FILE = "passes.json"
# A measurement is only so exact: it is rounded to half a power of two, and so most often the same again.
_STEPS_OF_DOUBLE = 2
_LEAST, _MOST = 8, 8192
_ALL_IN_ONE = Grouping(overhead=0, budget=2**30)


def pays(work: float) -> bool:
    """Whether a run of so much ``work``, in floating point operations, is long enough to be measured for."""
    return work >= LEAST_WORK


def known_overhead(model: nn.Module, compiled: bool) -> int | None:
    """Return what was measured for this model on this device, if it was."""
    with suppress(OSError, RuntimeError, ValueError, AttributeError):  # none, or a damaged one
        found = json.loads((cache_folder() / FILE).read_text(encoding="utf-8")).get(_key(model, compiled))
        if isinstance(found, int) and _LEAST <= found <= _MOST:
            return found
    return None


def overhead(
    model: nn.Module,
    objective: Objective,
    scorer: SharedPromptScorer,
    pairs: Sequence[PreferencePair],
    compiled: bool,
    most: float,
    clock: Callable[[], float] = time.perf_counter,
) -> int | None:
    """Return what a pass costs beside its tokens, in tokens, as it is known or else measured now.

    Args:
        pairs: at least one, whose tokens are used; dropout is off meanwhile, so that no random number is drawn.
        compiled: whether steps are.
        most: tokens of a pass; larger ones than the run has are not tried, nor such as do not fit.

    Returns:
        ``None`` where passes take too long to measure it.
    """
    known = known_overhead(model, compiled)
    if known is not None:
        return known
    most = min(most, tokens_that_fit(model))
    samples = {tokens: _pair_of(tokens, pairs[0]) for tokens in TOKENS if tokens <= most}
    grouping, scorer.grouping = scorer.grouping, _ALL_IN_ONE
    try:
        compute = SharedPromptGradients(model, objective, scorer, _ALL_IN_ONE, compiled=compiled)

        def seconds_of(tokens: int) -> float:
            begun, pair = clock(), [samples[tokens]]
            result = compute(pair, StepTotals.of(pair))
            mx.eval(result.losses, result.gradient)
            return clock() - begun

        with evaluation_mode(model):
            found = measured(seconds_of, tuple(samples))
    finally:
        scorer.grouping = grouping
    if found is not None:
        _keep(_key(model, compiled), found)
    return found


def measured(seconds_of: Callable[[int], float], sizes: Sequence[int] = TOKENS) -> int | None:
    """Return the overhead of passes of which each takes ``seconds_of(tokens)``, in tokens, rounded.

    Returns:
        ``None`` where the first takes longer than :data:`MOST_SECONDS`, or there is no second one to compare with.
    """
    shortest = 0.0
    for tokens in sizes:
        seconds_of(tokens)  # which may compile
        seconds = seconds_of(tokens)
        if seconds <= MOST_SECONDS:
            seconds = min(seconds, *(seconds_of(tokens) for _ in range(REPEATS - 1)))
        if tokens == sizes[0]:
            shortest = seconds
            if seconds > MOST_SECONDS:
                return None
        elif seconds >= LONGER * shortest or seconds > MOST_SECONDS or tokens == sizes[-1]:
            by_token = (seconds - shortest) / (tokens - sizes[0])
            return _rounded(shortest / by_token - sizes[0] if by_token > 0 else math.inf)
    return None


def _rounded(tokens: float) -> int:
    bounded = min(max(tokens, _LEAST), _MOST)
    return round(2 ** (round(_STEPS_OF_DOUBLE * math.log2(bounded)) / _STEPS_OF_DOUBLE))


def _pair_of(tokens: int, pair: PreferencePair) -> PreferencePair:
    """Return a pair of so many tokens, half of them prompt, made of those of another one."""
    prompt = np.resize(pair.prompt, tokens // 2)
    chosen, rejected = np.resize(pair.chosen, tokens // 4), np.resize(pair.rejected, tokens // 4)
    rejected[0] = chosen[0] - 1 if chosen[0] else 1  # or it would be a part of what both share
    scored = np.ones(tokens // 4, bool)
    return PreferencePair(prompt, chosen, rejected, scored, scored, "a measurement")


def _key(model: nn.Module, compiled: bool) -> str:
    """Return what a measurement depends on, as a digest."""
    last: Any = model.layers[-1]
    shapes = [(name, array.shape, str(array.dtype)) for name, array in sorted(by_name(last.parameters()).items())]
    trained = len(by_name(model.trainable_parameters()))
    device = device_name(), library.in_use() and kernel_threads(), compiled
    text = repr([*device, version("mlx"), __version__, len(model.layers), trained, shapes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keep(key: str, found: int) -> None:
    """Keep a measurement beside those of other models."""
    with suppress(OSError, RuntimeError):
        file, others = cache_folder() / FILE, {}
        with suppress(OSError, ValueError):
            others = json.loads(file.read_text(encoding="utf-8"))
        values = {**(others if isinstance(others, dict) else {}), key: found}

        def write(path: Path) -> None:
            path.write_text(json.dumps(values, indent=1), encoding="utf-8")

        replace_whole(file, write)
