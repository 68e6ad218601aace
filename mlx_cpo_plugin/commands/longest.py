"""The table of ``mlx-cpo check --longest``: the longest pair that a run has memory for, by the model's shapes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from mlx_lm.utils import load_config

from mlx_cpo_plugin import cpo
from mlx_cpo_plugin.commands.check import memory_estimate
from mlx_cpo_plugin.data.dataset import load_splits
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import device_memory
from mlx_cpo_plugin.errors import ConfigError, DataError, UserError, first_line
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import model_folder, positions_of, quantised_load, unevaluated_model
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.memory_estimate import MemoryEstimate
from mlx_cpo_plugin.types import TrainMode

SAVINGS = ("grad_checkpoint", "efficient_long_context", "load_in_4bits")
# The longest pair that is tried has two to this power tokens.
_MOST_BITS = 22


def run_longest(settings: RunSettings, mode: TrainMode, stream: TextIO | None = None) -> None:
    """Print the longest pair that fits the device: with the settings, with each of :data:`SAVINGS`, and with all.

    Pairs are split into prompt and answers like the one of the training data that takes most memory.

    Raises:
        ConfigError: the mode estimates no memory, or the tokenizer or the model's files cannot be used.
        DataError: no data is found, it is unusable, or there is no training pair.
    """
    stream = sys.stdout if stream is None else stream
    if mode.load_dataset is not cpo.load_dataset:
        raise ConfigError(
            f"--longest has no estimate for train_mode {settings.train_mode}; leave it out.", key="train_mode"
        )
    pairs, *_ = load_splits(settings, load_chat_tokenizer(settings.model), ("train",))
    if not pairs:
        raise DataError(
            "--longest needs a training pair, and the data holds none: check data or hf_dataset.",
            key="data",
        )
    device = device_memory()
    given = estimate(settings, pairs)
    shares = shares_of(given.largest)
    named = ", ".join(
        f"{part} {share:.0%}" for part, share in zip(("prompt", "chosen", "rejected"), shares, strict=True)
    )
    print(f"Longest pair by an estimate for the {device / 1e9:.1f} GB of this device, split like", file=stream)
    print(f"{given.largest.source or 'the largest pair'} ({named}):\n", file=stream)
    print(f"  {'settings':<34}{'tokens':>12}{'prompt':>12}{'chosen':>12}{'rejected':>12}", file=stream)
    for title, found in [("as given", given), *_savings(settings, pairs)]:
        print(f"  {title:<34}{_lengths(longest_pair(found, shares, device))}", file=stream)
    print(f"\nA run cuts pairs to max_seq_length, here {settings.max_seq_length}.", file=stream)
    positions = positions_of(settings.model)
    if positions is not None:
        print(f"The model knows {positions:,} positions.", file=stream)


def estimate(settings: RunSettings, pairs: Sequence[PreferencePair]) -> MemoryEstimate:
    """Return what a run with these settings takes; no array of the model is evaluated.

    Raises:
        ConfigError: the model cannot be built from its files, or a setting does not fit it.
    """
    try:
        model = unevaluated_model(settings)
    except UserError:
        raise
    except Exception as error:  # an unknown architecture may fail in any way
        raise ConfigError(
            f"--longest needs the shapes of model {settings.model!r}, which cannot be built ({first_line(error)}); "
            "check its files or leave --longest out.",
            key="model",
        ) from error
    return memory_estimate(model, settings, pairs)


def _savings(settings: RunSettings, pairs: Sequence[PreferencePair]) -> list[tuple[str, MemoryEstimate]]:
    """Return the estimate with each saving that the settings do not make yet, and with all of them."""
    packed = settings.train_type == "full" or "quantization" in load_config(model_folder(settings.model))
    open_to = [key for key in SAVINGS if not getattr(settings, key)]
    if packed or quantised_load(settings):  # quantised already, or never
        open_to = [key for key in open_to if key != "load_in_4bits"]
    tried = [[key] for key in open_to] + ([open_to] if len(open_to) > 1 else [])
    return [
        (
            f"with {keys[0]}" if len(keys) == 1 else "with all of these",
            estimate(RunSettings.of({**vars(settings), **dict.fromkeys(keys, True)}), pairs),
        )
        for keys in tried
    ]


def shares_of(pair: PreferencePair) -> tuple[float, float, float]:
    """Return which part of a pair's tokens prompt, chosen and rejected answer are."""
    prompt, chosen, rejected = (len(part) / pair.tokens for part in (pair.prompt, pair.chosen, pair.rejected))
    return prompt, chosen, rejected


def pair_of(tokens: int, shares: Sequence[float]) -> PreferencePair:
    """Return a pair of about as many tokens, at least one in each part, split by ``shares``."""
    prompt, chosen, rejected = (np.zeros(max(1, round(tokens * share)), np.int32) for share in shares)
    return PreferencePair(prompt, chosen, rejected, chosen == 0, rejected == 0)


def longest_pair(found: MemoryEstimate, shares: Sequence[float], device: int) -> PreferencePair | None:
    """Return the longest pair that fits ``device`` bytes; ``None`` where not even the shortest does."""

    def fits(tokens: int) -> bool:
        return found.total_with(pair_of(tokens, shares)) <= device

    # From above: short answers, which are computed together, can take more than longer ones.
    fitting = next((size for power in range(_MOST_BITS, -1, -1) if fits(size := 2**power)), 0)
    step = fitting
    while step := step // 2:
        fitting += step * fits(fitting + step)
    return pair_of(fitting, shares) if fitting else None


def _lengths(pair: PreferencePair | None) -> str:
    if pair is None:
        return f"{'none':>12}"
    return "".join(f"{length:>12,}" for length in (pair.tokens, len(pair.prompt), len(pair.chosen), len(pair.rejected)))
