"""A finished conversion as text: YAML with what there is to tell in its head."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.convert.conversion import Account, Conversion, Source
from mlx_cpo_plugin.errors import named, printable
from mlx_cpo_plugin.settings.yaml_settings import dump_settings

WIDTH = 110
ORDER = (
    "model",
    "load_in_4bits",
    "load_in_8bits",
    "train",
    "train_mode",
    "data",
    "hf_dataset",
    "valid_fraction",
    "dpo_cpo_loss_type",
    "beta",
    "cpo_alpha",
    "label_smoothing",
    "simpo_gamma",
    "alphapo_alpha",
    "train_type",
    "lora_parameters",
)


def told_lines(conversion: Conversion, source: Source, account: Account) -> list[str]:
    """Return what there is to tell of a conversion, in lines that fit a screen."""
    name = conversion.source_name
    return [
        f"Converted by mlx-cpo-plugin {__version__} from {named(source.settings.file)}, a configuration of {name}.",
        *_section("Changed in meaning, or worth a look:", conversion.changed),
        *_section(f"Defaults of {name} that differ here, so written out:", [", ".join(conversion.defaulted)]),
        *_section("No counterpart, left out:", [", ".join(map(named, account.dropped))]),
        *_section("As by default, or without effect:", [", ".join(map(named, account.ineffective))]),
        *_section("Empty or switched off, left out:", [", ".join(map(named, account.off))]),
    ]


def _section(title: str, items: Iterable[str]) -> list[str]:
    lines = []
    for item in filter(None, items):
        lines += textwrap.wrap(printable(item), WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return ["", title, *lines] if lines else []


def as_yaml(conversion: Conversion, told: Iterable[str]) -> str:
    """Return the configuration file, with what :func:`told_lines` returned in its head."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in told)
    ordered = {key: conversion.settings[key] for key in ORDER if key in conversion.settings}
    return f"{head}\n{dump_settings(ordered | conversion.settings, width=WIDTH)}"
