"""The host's loaders of data sets: for CPO the plugin's reader answers, for every other mode the host itself.

Whoever imports them from mlx-lm-lora, an app or its MCP server, gets the pairs that a run from YAML trains on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ALL_SPLITS = ("train", "valid", "test")
# What the reader looks for in settings, and what it takes where callers of the host's loaders leave it out.
_DEFAULTS: Mapping[str, Any] = {
    "data": "data/",
    "hf_dataset": None,
    "train": True,
    "test": False,
    "seed": 0,
    "valid_fraction": 0.0,
    "max_seq_length": None,
    "overlong": "cut",
    "chat_template": None,
    "chat_template_kwargs": None,
    "chosen_feature": None,
    "rejected_feature": None,
    "prompt_feature": None,
    "system_feature": None,
    "begun": None,
}


def answering_for_cpo(name: str, host_loader: Callable[..., Any]) -> Callable[..., Any]:
    """Return the host's loader ``name``, one of :data:`LOADERS`, which reads for CPO what a run from YAML reads.

    A call for any other train mode reaches the host's own as it came in.
    """
    own = LOADERS[name]

    @functools.wraps(host_loader)
    def loader(*positional: Any, **named: Any) -> Any:
        try:
            arguments = signature(host_loader).bind(*positional, **named).arguments
        except TypeError:
            return host_loader(*positional, **named)  # which says what is wrong with the call
        config = arguments.get("config", arguments.get("args"))
        if getattr(config, "train_mode", None) != "cpo":
            return host_loader(*positional, **named)
        _give_template(arguments["tokenizer"])
        return own(**arguments)

    return loader


def _create_dataset(data: Any, tokenizer: Any, config: Any) -> Any:
    from mlx_cpo_plugin.data import pairs_of_rows

    return pairs_of_rows(data, tokenizer, _settings(config))


def _load_local_dataset(data_path: Path, tokenizer: Any, config: Any) -> Any:
    return _splits(_settings(config, data=str(data_path), hf_dataset=None), tokenizer)


def _load_hf_dataset(data_id: str, tokenizer: Any, config: Any) -> Any:
    return _splits(_settings(config, data=data_id, hf_dataset=None), tokenizer)


def _load_custom_hf_dataset(args: Any, tokenizer: Any) -> Any:
    return _splits(_settings(args), tokenizer)


def _load_dataset(args: Any, tokenizer: Any) -> Any:
    from mlx_cpo_plugin.data.dataset import require_splits

    settings = _settings(args)
    splits = _splits(settings, tokenizer)
    require_splits(settings, splits)
    return splits


def _splits(settings: SimpleNamespace, tokenizer: Any) -> Any:
    """Train, valid and test set: of ``data`` all that there are, of ``hf_dataset`` those that are asked for."""
    from mlx_cpo_plugin.data.dataset import load_splits

    asked_for = (("train", "valid") if settings.train else ()) + (("test",) if settings.test else ())
    return load_splits(settings, tokenizer, asked_for if settings.hf_dataset else ALL_SPLITS)


def _settings(config: Any, **given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(config, name, default) for name, default in _DEFAULTS.items()} | given)


def _give_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the host's, as a run does."""
    from mlx_cpo_plugin.host import give_chat_template

    give_chat_template(tokenizer)


LOADERS: Mapping[str, Callable[..., Any]] = {
    "create_dataset": _create_dataset,
    "load_local_dataset": _load_local_dataset,
    "load_hf_dataset": _load_hf_dataset,
    "load_custom_hf_dataset": _load_custom_hf_dataset,
    "load_dataset": _load_dataset,
}
