"""Resolve the settings of a run: command line > YAML file > preset > default, each one checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings.command_line import (
    HOST_DEFAULT_MODE,
    IN_THE_CALL,
    ON_THE_COMMAND_LINE,
    Call,
    explicit,
    host_defaults,
    known_options,
)
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION, PRESETS, SIMPO_GAMMA, CPOSettings, Preset
from mlx_cpo_plugin.settings.options import (
    COMMON_OPTIONS,
    PRECISIONS,
    UNCHECKED_KEYS,
    DataSettings,
    ModelSettings,
    OutputSettings,
    QatSettings,
    TrainingSettings,
    check_quantizer,
)
from mlx_cpo_plugin.settings.validation import check, not_read, refused, unknown
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings, read_yaml
from mlx_cpo_plugin.types import LossType, Option, TrainMode, Values

# Keys of which the first has no effect where the second is set, too.
OVERRULED = {
    "data": "hf_dataset",
    "epochs": "iters",
    "steps_per_eval": "eval_per_epoch",
    "save_every": "save_per_epoch",
}
LARGE_BETA = 0.1
# SimPO and AlphaPO are published with 2 and more.
SMALL_BETA = 1.0


@dataclass
class RunSettings(ModelSettings, DataSettings, TrainingSettings, OutputSettings, QatSettings, CPOSettings):
    """Every setting of a run, by key, those of other train modes and losses included.

    Attributes:
        config: always None, so that mlx-lm-lora does not read the YAML file again; ``config_file`` is its path.
        run_identity, begun: set when the run starts.
        plugin_resolved: marks resolved settings when they come back from mlx-lm-lora.
    """

    train_mode: str = ""
    loss_options: Values = field(default_factory=dict)
    config: None = None
    config_file: str | None = None
    run_identity: RunIdentity = field(init=False, repr=False, compare=False)
    begun: datetime | None = None
    plugin_resolved: bool = True

    @classmethod
    def of(cls, values: Mapping[str, object]) -> RunSettings:
        """Return settings with these values, and defaults for all others."""
        settings = cls()
        vars(settings).update(values)
        return settings


class Resolved(NamedTuple):
    """The settings of a run, and advice on them, one sentence each."""

    settings: RunSettings
    notes: tuple[str, ...]


class _Given:
    """The values that the call, the YAML file and a preset give, and where each was given; null means the default."""

    def __init__(self, call: Values, call_place: str, yaml: YamlSettings | None) -> None:
        in_yaml = {key: value for key, value in yaml.values.items() if value is not None} if yaml else {}
        # What the call gives is not overruled by a file.
        rivals = {OVERRULED[key]: key for key, value in call.items() if key in OVERRULED and value is not None}
        self.overruled = [
            f"{key} has no effect ({yaml.place(key)}): {by} is given {call_place}."
            for key, by in rivals.items()
            if yaml and key not in call and in_yaml.pop(key, None)
        ]
        self.values = {key: value for key, value in {**in_yaml, **call}.items() if value is not None}
        self.preset: Preset | None = None
        self._call, self._call_place, self._yaml = call, call_place, yaml
        parts = [source["lora_parameters"] for source in (in_yaml, call) if "lora_parameters" in source]
        if len(parts) == 2 and all(isinstance(part, Mapping) for part in parts):
            self.values["lora_parameters"] = {**parts[0], **parts[1]}

    def checked(self, option: Option) -> Any:
        """Return the value of an option, checked: as given, else of the preset, else the default."""
        preset = self.preset.values if self.preset else {}
        value = self.values.get(option.name, preset.get(option.name, deepcopy(option.default)))
        return None if value is None else check(option, value, self.place)

    def place(self, key: str) -> str:
        """Return where a key, or a nested one such as ``lora_parameters.rank``, was given."""
        name, _, inner = str(key).partition(".")
        in_call = self._call.get(name)
        merged = name == "lora_parameters" and isinstance(in_call, Mapping) and inner and inner not in in_call
        if name in self._call and not merged:
            return self._call_place
        if self._yaml is not None and name in self._yaml.values:
            return self._yaml.place(key)
        return self._call_place if key in self._call else "by default"


def resolve(
    call: Call,
    config_file: str | Path | YamlSettings | None = None,
    *,
    call_place: str = "",
) -> Resolved:
    """Return the settings of a run in a registered train mode.

    Args:
        config_file: the YAML file, or what was read from it; by default the one that the call names.
        call_place: how messages refer to the call; by default by its kind.

    Raises:
        ConfigError: a key is unknown, or its value has the wrong type, is out of range or contradicts another.
        PluginError: two plugins claim one name.
    """
    in_call = explicit(call)
    file = config_file or in_call.get("config")
    in_file = file if isinstance(file, YamlSettings) else read_yaml(file) if file else None
    place = call_place or (ON_THE_COMMAND_LINE if isinstance(call, Sequence) else IN_THE_CALL)
    given = _Given(in_call, place, in_file)

    mode = _mode(given)
    losses = loss_types()
    options = known_options([mode], losses.values())
    defaults = host_defaults()
    if mode.has(LOSS_OPTION) and mode.has("preset"):
        name = given.checked(options["preset"])
        given.preset = next((preset for preset in PRESETS if preset.name == name), None)
    loss = losses[given.checked(options[LOSS_OPTION])] if mode.has(LOSS_OPTION) else None
    known = {*options, *defaults, *UNCHECKED_KEYS}  # of a loss that is not there, it is not its options that are wrong
    for key in [*in_call, *(in_file.values if in_file else ())]:
        if key not in known:
            raise unknown("key", key, known, given.place(key), read={*options, "train_mode", "config"})
    # The chosen loss overrides default and range of an option that other losses share.
    common = {option.name for option in COMMON_OPTIONS}
    options |= {option.name: option for option in (loss.options if loss else ()) if option.name not in common}
    values = deepcopy(defaults) | given.values | {name: given.checked(option) for name, option in options.items()}
    _refuse_contradictions(values, given)
    if loss:
        _refuse_unread(loss, losses, options, values, given)
    values |= {
        "train_mode": mode.name,
        "config": None,
        "config_file": in_file.file if in_file else None,
        "loss_options": {option.name: values[option.name] for option in loss.options} if loss else {},
    }
    settings = RunSettings.of(values)
    return Resolved(settings, (*_preset_notes(given), *_notes(loss, settings, given)))


def _mode(given: _Given) -> TrainMode:
    modes = train_modes()
    name = given.values.get("train_mode") or HOST_DEFAULT_MODE
    if not isinstance(name, str) or name not in modes:
        raise refused("train_mode", name, given.place("train_mode"), f"one of {', '.join(modes)}")
    return modes[name]


def _refuse_contradictions(values: Values, given: _Given) -> None:
    precisions = [name for name in PRECISIONS if values[name]]
    if len(precisions) > 1:
        both = " and ".join(f"{name} ({given.place(name)})" for name in precisions)
        raise ConfigError(
            f"{both} are both true, but a model has one precision; set all but one to false.",
            key=precisions[1],
            place=given.place(precisions[1]),
        )
    if values["warmup_ratio"] and "warmup" in (values["lr_schedule"] or {}):
        raise ConfigError(
            f"warmup_ratio ({given.place('warmup_ratio')}) and lr_schedule.warmup ({given.place('lr_schedule.warmup')})"
            " both say how long the learning rate rises; remove one of them.",
            key="warmup_ratio",
            place=given.place("warmup_ratio"),
        )
    if values["qat_enable"]:
        quantizer, bits, group_size = values["qat_quantizer"], values["qat_bits"], values["qat_group_size"]
        check_quantizer(quantizer, bits, group_size, values["qat_mode"], given.place)
    if not values["train"] and not values["test"]:
        raise ConfigError(
            "Neither train nor test is true; set 'train: true' in the YAML file or give --train.", key="train"
        )


def _refuse_unread(
    loss: LossType,
    losses: Mapping[str, LossType],
    options: Mapping[str, Option],
    values: Values,
    given: _Given,
) -> None:
    """Refuse a loss other than the preset's, and a setting that only other losses use, unless it is the default."""
    where, preset = given.place(LOSS_OPTION), given.preset
    if preset and preset.values[LOSS_OPTION] != loss.name:
        raise ConfigError(
            f"preset is {preset.name} {given.place('preset')}, whose loss is {preset.values[LOSS_OPTION]}, but "
            f"{LOSS_OPTION} is {loss.name} {where}; remove one of the two.",
            key=LOSS_OPTION,
            place=where,
            allowed=preset.values[LOSS_OPTION],
        )
    if preset and LOSS_OPTION not in given.values:
        where = f"by the preset {given.place('preset')}"
    for name in {option.name: None for other in losses.values() for option in other.options}:
        if name in given.values and not loss.reads(name) and values[name] != options[name].default:
            chosen = f"the loss {loss.name} ({LOSS_OPTION}, {where})"
            raise not_read(name, values[name], given.place(name), loss, losses.values(), chosen)


def _preset_notes(given: _Given) -> list[str]:
    if given.preset is None:
        return []
    filled = [f"{key}: {value}" for key, value in given.preset.values.items() if key not in given.values]
    if not filled:
        return [f"preset {given.preset.name} has no effect: everything it sets is set explicitly."]
    return [f"preset {given.preset.name} sets {', '.join(filled)}."]


def _notes(loss: LossType | None, settings: RunSettings, given: _Given) -> list[str]:
    notes = []
    # Means of log-probs are smaller than sums by a factor of the answer's length, and want a larger beta.
    usual = [LARGE_BETA, *(option.default for option in loss.options if option.name == "beta")] if loss else []
    if loss and loss.reads("beta") and not loss.length_normalised and settings.beta > max(usual):
        notes.append(f"beta is {settings.beta:g}: without a reference model a large beta overshoots; start with 0.05.")
    wants_large_beta = loss and loss.length_normalised and loss.reads("beta") and loss.reads(SIMPO_GAMMA.name)
    if loss and wants_large_beta and settings.beta < SMALL_BETA:
        notes.append(
            f"beta is {settings.beta:g}: {loss.name} averages log-probs over an answer's tokens; from 2 to 10 is usual."
        )
    if settings.reference_model_path and loss is not None:
        notes.append(f"reference_model_path has no effect: {settings.train_mode} uses no reference model.")
    if loss is not None:
        notes += _unread_notes(settings, given)
    notes += given.overruled
    for key, by in OVERRULED.items():
        if key in given.values and getattr(settings, by):
            notes.append(f"{key} has no effect: {by} is set, too.")
    arguments = [name for name, values in (given.values.get("optimizer_config") or {}).items() if values]
    if arguments and settings.optimizer not in arguments:
        notes.append(f"optimizer_config.{arguments[0]} has no effect: optimizer is {settings.optimizer}.")
    if settings.batch_tokens is not None and "batch_size" in given.values:
        notes.append("batch_size has no effect on training: batch_tokens is set, too.")
    return notes


def _unread_notes(settings: RunSettings, given: _Given) -> list[str]:
    """Return one sentence on keys that only other train modes of mlx-lm-lora read, if any say something."""
    defaults = host_defaults()
    read = {*known_options([train_modes()[settings.train_mode]], loss_types().values()), "train_mode", "config"}
    others = [key for key in given.values if key not in read and given.values[key] != defaults.get(key)]
    verb = "have" if len(others) > 1 else "has"
    return [f"{' and '.join(others)} {verb} no effect with {settings.train_mode}."] if others else []
