"""Arguments and data sets of a call of train_cpo or evaluate_cpo, converted for the trainer.

Apps and scripts call both like mlx-lm-lora's own, with its arguments, data sets and defaults.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields

import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data import PreferenceDataset, PreferencePair, as_pairs
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.host import parts_of
from mlx_cpo_plugin.settings.command_line import IN_THE_CALL
from mlx_cpo_plugin.settings.cpo_options import SAMPLE_PROMPTS
from mlx_cpo_plugin.settings.validation import check, refused
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs, check_training_args
from mlx_cpo_plugin.training.state import random_seed
from mlx_cpo_plugin.types import Tokenizer


def training_arguments(args: object) -> CPOTrainingArgs:
    """Return the arguments of a call, complete and checked.

    Args:
        args: CPOTrainingArgs, the host's own, or another object with attributes of the same names; ``None``: the
            defaults. Without an ``adapter_file`` the default one is written; without a ``seed`` it is that of
            :func:`caller_seed`.

    Raises:
        ConfigError: a value is out of range, or none is given by its name.
    """
    given = {own.name: getattr(args, own.name) for own in fields(CPOTrainingArgs) if hasattr(args, own.name)}
    if args is not None and not given:
        raise refused("args", args, IN_THE_CALL, "CPOTrainingArgs, or an object with attributes of the same names")
    args = CPOTrainingArgs(**given)
    args.adapter_file = os.path.expanduser(args.adapter_file or CPOTrainingArgs.adapter_file)
    if not args.adapter_file.endswith(".safetensors"):
        raise refused("adapter_file", args.adapter_file, IN_THE_CALL, "a name that ends in .safetensors")
    args.resume = None if args.resume is None else os.path.expanduser(args.resume)
    args.sample_prompts = check(SAMPLE_PROMPTS, args.sample_prompts, lambda key: IN_THE_CALL)
    args.seed = caller_seed() if args.seed is None else args.seed
    check_training_args(args)
    return args


def caller_seed() -> int:
    """Return the seed that NumPy or MLX was given last, if nothing has been drawn from it since; otherwise 0.

    The host's trainers take the order of rows from NumPy's global generator, so callers who want to choose it seed
    this one, and MLX's for adapters and dropout.
    """
    _, keys, position, *_ = np.random.get_state(legacy=True)
    seed = int(keys[0])
    _, seeded, start, *_ = np.random.RandomState(seed).get_state(legacy=True)
    if position == start and np.array_equal(keys, seeded):
        return seed
    of_mlx = random_seed()  # drawing turns it into a 64-bit number; so does MLX with the time, if nobody has seeded it
    return of_mlx if of_mlx < 2**32 else 0


def pairs_of(
    dataset: Sequence[object] | None,
    max_seq_length: int,
    tokenizer: Tokenizer | None = None,
    split: str = "train",
    model: nn.Module | None = None,
) -> PreferenceDataset:
    """Return the pairs of a caller's data set, truncated to ``max_seq_length``.

    Args:
        dataset: as :func:`mlx_cpo_plugin.data.as_pairs` takes it, also inside the host's ``CacheDataset`` and
            ``ConcatenatedDataset``; ``None`` is an empty one.
        model: the one whose vocabulary the token ids must be of.

    Raises:
        DataError: raw rows come without a tokenizer, rows are not preferences, or a token is not in the vocabulary.
    """
    parts = parts_of(dataset) or [None]
    pairs = PreferenceDataset.joined(
        [as_pairs(part, max_seq_length, tokenizer=tokenizer, split=split) for part in parts]
    )
    check_vocabulary(model, pairs, split)
    return pairs


def check_vocabulary(model: nn.Module | None, pairs: Sequence[PreferencePair], split: str) -> None:
    """Raise DataError where a token is not in the vocabulary of the model."""
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    if not isinstance(size, int):
        return
    for pair in pairs:
        largest = max(int(ids.max(initial=0)) for ids in (pair.prompt, pair.chosen, pair.rejected))
        if largest >= size:
            raise DataError(
                f"{pair.source or f'a row of the {split} data set'} has the token id {largest}, but the model's "
                f"vocabulary ends at {size - 1}: tokenise the rows with the model's own tokenizer.",
                key="data",
                place=pair.source,
                allowed=f"0 to {size - 1}",
            )


def check_callback(callback: object, validates: bool = True) -> None:
    """Raise ``ConfigError`` where a callback lacks one of the host's two methods that is going to be called."""
    methods = ("on_train_loss_report", "on_val_loss_report")[: 1 + validates]
    if callback is not None and not all(callable(getattr(callback, method, None)) for method in methods):
        allowed = f"an object with the methods {' and '.join(methods)}, as mlx_lm.tuner.callbacks.TrainingCallback has"
        raise refused("training_callback", callback, IN_THE_CALL, allowed)
