"""The host's loaders of data sets: for CPO the plugin's reader answers, for every other mode the host itself.

Whoever imports them from mlx-lm-lora, an app or its MCP server, gets the pairs that a run from YAML trains on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

LOADERS = ("create_dataset", "load_local_dataset", "load_hf_dataset", "load_custom_hf_dataset", "load_dataset")
ALL_SPLITS = ("train", "valid", "test")


def answering_for_cpo(name: str, host_loader: Callable[..., object]) -> Callable[..., object]:
    """Return the host's loader ``name``, one of :data:`LOADERS`, which reads for CPO what a run from YAML reads.

    A call for any other train mode reaches the host's own as it came in.
    """

    @functools.wraps(host_loader)
    def loader(*positional: object, **named: object) -> object:
        try:
            arguments = signature(host_loader).bind(*positional, **named).arguments
        except TypeError:
            return host_loader(*positional, **named)  # which says what is wrong with the call
        config = arguments.get("config", arguments.get("args"))
        if getattr(config, "train_mode", None) != "cpo":
            return host_loader(*positional, **named)
        return _read(name, arguments, config)

    return loader


def _read(name: str, arguments: Mapping[str, Any], config: object) -> object:
    """Return the pairs of the rows in a call, or the train, valid and test set of what it names."""
    from mlx_cpo_plugin.data import pairs_of_rows
    from mlx_cpo_plugin.data.dataset import load_splits, require_splits
    from mlx_cpo_plugin.host import give_chat_template
    from mlx_cpo_plugin.settings.config import RunSettings

    given = {field.name: getattr(config, field.name) for field in fields(RunSettings) if hasattr(config, field.name)}
    settings = RunSettings.of({"train": True, "max_seq_length": None, **given})
    tokenizer = arguments["tokenizer"]
    give_chat_template(tokenizer)
    if name == "create_dataset":
        return pairs_of_rows(arguments["data"], tokenizer, settings)
    place = arguments.get("data_path", arguments.get("data_id"))
    if place is not None:
        settings.data, settings.hf_dataset = str(place), None
    # Of `data` all splits that there are, of `hf_dataset` those that are asked for.
    asked_for = (("train", "valid") if settings.train else ()) + (("test",) if settings.test else ())
    splits = load_splits(settings, tokenizer, asked_for if settings.hf_dataset else ALL_SPLITS)
    if name == "load_dataset":
        require_splits(settings, splits)
    return splits
