"""The settings of a run: command line > YAML file > preset > default, each one known and within its range."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings.command_line import (
    HOST_DEFAULT_MODE,
    Given,
    build_parser,
    explicit,
    host_defaults,
    known_options,
    requested_mode,
)
from mlx_cpo_plugin.settings.options import PRECISIONS, SUBSTRATE_OPTIONS, UNCHECKED_KEYS
from mlx_cpo_plugin.settings.paths import PATHS, expanded
from mlx_cpo_plugin.settings.quantisation import check_quantizer
from mlx_cpo_plugin.settings.validation import check, not_read, unknown
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings, read_yaml
from mlx_cpo_plugin.types import LossType, Option, Preset, TrainMode
from mlx_cpo_plugin.wording import shown

__all__ = [
    "Given",
    "Resolved",
    "YamlSettings",
    "build_parser",
    "explicit",
    "read_yaml",
    "requested_mode",
    "resolve",
]

LARGE_BETA = 0.1


@dataclass(frozen=True)
class Resolved:
    """The settings of a run.

    Attributes:
        settings: every known setting as an attribute; besides, ``loss_options`` (the options of the chosen loss, by
            keyword), ``config_file`` (the YAML file or None) and ``plugin_resolved`` (True). ``config`` is None.
        notes: advice, one sentence each.
    """

    settings: SimpleNamespace
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Sources:
    """What the call, the YAML file and a preset give, and where each key stands."""

    call: dict[str, Any]
    call_name: str
    yaml: YamlSettings | None
    preset: Mapping[str, Any] = field(default_factory=dict)

    def gives(self, key: str) -> bool:
        """Whether the user set a key; an empty value in the YAML file leaves it at its default."""
        return key in self.call or self._in_yaml(key) is not None

    def value(self, option: Option) -> Any:
        key = option.name
        if key == "lora_parameters" and isinstance(self.call.get(key), Mapping):
            in_yaml = self._in_yaml(key)
            return {**(in_yaml if isinstance(in_yaml, Mapping) else {}), **self.call[key]}
        if key in self.call:
            return self.call[key]
        if self.gives(key) or (option.optional and self.yaml is not None and key in self.yaml.values):
            return self._in_yaml(key)
        return self.preset.get(key, option.default)

    def place(self, key: str) -> str:
        """Return where a key, or one inside it such as ``lora_parameters.rank``, was given, in words."""
        name, _, inner = key.partition(".")
        in_yaml = self._in_yaml(name)
        if name in self.call:
            merged = name == "lora_parameters" and isinstance(in_yaml, Mapping) and inner in in_yaml
            if not merged or not isinstance(self.call[name], Mapping) or inner in self.call[name]:
                return self.call_name
        if self.yaml is not None and name in self.yaml.values:
            return self.yaml.place(key)
        return "by default"

    def _in_yaml(self, key: str) -> Any:
        return None if self.yaml is None else self.yaml.values.get(key)


def resolve(command_line: Mapping[str, Any], config_file: str | Path | YamlSettings | None = None) -> Resolved:
    """Return the settings of a run in a registered train mode.

    Args:
        command_line: what the call gave, e.g. from :func:`explicit`; None means not given.
        config_file: the YAML file, or what was read from it; that of ``command_line`` when it is None.

    Raises:
        ConfigError: a key is unknown, or its value has the wrong type, is out of range or contradicts another.
        PluginError: two plugins claim one name.
    """
    call = {key: value for key, value in command_line.items() if value is not None}
    file = config_file or call.get("config")
    source = command_line.source if isinstance(command_line, Given) else "in the call"
    in_file = file if isinstance(file, YamlSettings) else read_yaml(file) if file else None
    sources = _Sources(call, source, in_file)
    mode = _mode(sources)
    losses = loss_types()
    options = known_options([mode], losses.values())
    defaults = host_defaults()
    _refuse_unknown(sources, {*options, *defaults, *UNCHECKED_KEYS})

    preset = _preset(mode, options, sources)
    if preset:
        sources = replace(sources, preset=preset.values)
    loss = losses[_checked(options[mode.loss_option], sources)] if mode.loss_option else None
    options = _with_options_of(loss, options)
    values = _unchecked(sources, defaults)
    values |= {name: _checked(option, sources) for name, option in options.items()}
    values |= {name: expanded(path) for name in PATHS if isinstance(path := values.get(name), str)}
    _refuse_contradictions(values, sources)
    if loss:
        _refuse_overridden(preset, mode.loss_option, loss, sources)
        _refuse_unread(mode.loss_option, loss, losses, options, values, sources)
    values |= {
        "train_mode": mode.name,
        "config": None,
        "config_file": in_file.file if in_file else None,
        "loss_options": {option.name: values[option.name] for option in loss.options} if loss else {},
        "plugin_resolved": True,
    }
    notes = [*_preset_notes(preset, sources), *_notes(mode, loss, options, values, sources)]
    return Resolved(SimpleNamespace(**values), tuple(notes))


def _mode(sources: _Sources) -> TrainMode:
    modes = train_modes()
    named = sources.call.get("train_mode") or (sources.yaml and sources.yaml.values.get("train_mode"))
    name = named or HOST_DEFAULT_MODE
    if not isinstance(name, str) or name not in modes:
        raise ConfigError(
            f"train_mode is {shown(name)} {sources.place('train_mode')}, but must be one of {', '.join(modes)}."
        )
    return modes[name]


def _preset(mode: TrainMode, options: Mapping[str, Option], sources: _Sources) -> Preset | None:
    if not mode.presets:
        return None
    name = _checked(options["preset"], sources)
    return next((preset for preset in mode.presets if preset.name == name), None)


def _refuse_unknown(sources: _Sources, known: set[str]) -> None:
    given = [*sources.call, *(sources.yaml.values if sources.yaml else ())]
    for key in given:
        if key not in known:
            raise unknown("key", key, known, sources.place(key) if isinstance(key, str) else sources.call_name)


def _with_options_of(loss: LossType | None, options: dict[str, Option]) -> dict[str, Option]:
    """Let the chosen loss have its own default and range for an option that other losses have, too."""
    shared = {option.name for option in SUBSTRATE_OPTIONS}
    own = {option.name: option for option in loss.options if option.name not in shared} if loss else {}
    return options | own


def _checked(option: Option, sources: _Sources) -> Any:
    value = sources.value(option)
    if value is None and not sources.gives(option.name):
        return None
    if option.name == "optimizer" and isinstance(value, str):
        value = value.lower()
    if option.name == "report_to" and isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    return check(option, value, sources.place)


def _unchecked(sources: _Sources, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that only other train modes read, as they were given."""
    in_yaml = sources.yaml.values if sources.yaml else {}
    given = {key: value for key, value in in_yaml.items() if value is not None} | sources.call
    return deepcopy(dict(defaults)) | given


def _refuse_contradictions(values: Mapping[str, Any], sources: _Sources) -> None:
    precisions = [name for name in PRECISIONS if values[name]]
    if len(precisions) > 1:
        given = " and ".join(f"{name} ({sources.place(name)})" for name in precisions)
        raise ConfigError(f"{given} are true together, but a model has one precision; set all but one to false.")
    if values["qat_enable"]:
        check_quantizer(*(values[f"qat_{key}"] for key in ("quantizer", "bits", "group_size", "mode")))
    if not values["train"] and not values["test"]:
        raise ConfigError("Neither train nor test is true; set 'train: true' in the YAML file or give --train.")


def _refuse_overridden(preset: Preset | None, loss_option: str, loss: LossType, sources: _Sources) -> None:
    """Refuse another loss than the preset's: its other values, such as beta, belong to that one."""
    meant = preset.values.get(loss_option, loss.name) if preset else loss.name
    if preset and meant != loss.name:
        raise ConfigError(
            f"preset is {preset.name} {sources.place('preset')}, whose loss is {meant}, but {loss_option} is "
            f"{loss.name} {sources.place(loss_option)}; remove one of the two."
        )


def _refuse_unread(
    loss_option: str,
    loss: LossType,
    losses: Mapping[str, LossType],
    options: Mapping[str, Option],
    values: Mapping[str, Any],
    sources: _Sources,
) -> None:
    """Refuse a setting that only other losses read, unless it is at its default and so means nothing."""
    where = sources.place(loss_option)
    if not sources.gives(loss_option) and loss_option in sources.preset:
        where = f"by the preset {sources.place('preset')}"
    for name in {option.name: None for other in losses.values() for option in other.options}:
        if sources.gives(name) and not loss.reads(name) and values[name] != options[name].default:
            chosen = f"{loss_option} is {loss.name} {where}, which"
            raise not_read(name, values[name], sources.place(name), loss, losses.values(), chosen)


def _preset_notes(preset: Preset | None, sources: _Sources) -> list[str]:
    if preset is None:
        return []
    filled = [f"{key}: {value}" for key, value in preset.values.items() if not sources.gives(key)]
    if not filled:
        return [f"preset {preset.name} has no effect: all that it sets is set besides."]
    return [f"preset {preset.name} sets {', '.join(filled)}."]


def _notes(
    mode: TrainMode,
    loss: LossType | None,
    options: Mapping[str, Option],
    values: Mapping[str, Any],
    sources: _Sources,
) -> list[str]:
    notes = []
    read_by_loss = {option.name for option in loss.options} if loss else set()
    given = {name for name in options if sources.gives(name) or name in sources.preset}
    changed = {name for name in given if values[name] != options[name].default}
    # Means of log-probs are as much smaller than their sums as answers have tokens.
    takes_sums = loss is not None and not loss.length_normalised
    if takes_sums and "beta" in changed & read_by_loss and values["beta"] > LARGE_BETA and not mode.needs_reference:
        notes.append(f"beta is {values['beta']:g}: without a reference model a large beta overshoots; start with 0.05.")
    if "reference_model_path" in changed and not mode.needs_reference:
        notes.append(f"reference_model_path has no effect: {mode.name} uses no reference model.")
    if values["iters"] is not None and values["epochs"] is not None:
        notes.append(f"epochs has no effect: iters is set, too, to {values['iters']}.")
    if values.get("batch_tokens") is not None and sources.gives("batch_size"):
        notes.append("batch_size has no effect on training: batch_tokens is set, too.")
    if values["qat_enable"] and not mode.supports_qat:
        notes.append(f"qat_enable has no effect: {mode.name} does not support QAT.")
    return notes
