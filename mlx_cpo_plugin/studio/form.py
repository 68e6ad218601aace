"""The form as data: its fields come from the registered options and are validated like every other setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION, PRESETS
from mlx_cpo_plugin.settings.nested import LORA_PARAMETERS, OPTIMIZERS
from mlx_cpo_plugin.settings.options import (
    DATA_OPTIONS,
    LOSS,
    MODEL_OPTIONS,
    OUTPUT_OPTIONS,
    PRECISIONS,
    QAT_OPTIONS,
    TRAINING_OPTIONS,
)
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.settings.yaml_settings import dump_settings, parse_value
from mlx_cpo_plugin.types import Option

MODE, LOSS_KEY, PRESET_KEY = "cpo", LOSS_OPTION, "preset"
PREFERENCE, TRAINING = "Preference And Judge", "Training Settings"
MODEL_AND_DATA, FINE_TUNE, MORE_TRAINING = "Model & Data", "Fine-tune", "More Training Settings"
COLUMNS, OUTPUT, QAT = "Dataset Columns", "Output", "QAT"
BLOCKS = (PREFERENCE, TRAINING, MODEL_AND_DATA, FINE_TUNE, MORE_TRAINING, COLUMNS, OUTPUT, QAT)

# What everybody looks for, in the order in which it leads its block.
LEADING = (
    LOSS_KEY,
    "beta",
    "delta",
    PRESET_KEY,
    "cpo_alpha",
    "iters",
    "epochs",
    "batch_size",
    "learning_rate",
    "model",
)
QUANTISATION = Option(
    "quantisation", str, None, "Quantise the base model while loading.", choices=PRECISIONS, optional=True
)
"""One control for all keys of ``PRECISIONS``, of which a run takes one."""

CHOICE_TITLES = {"lora": "LoRA", "dora": "DoRA", "full": "Full", **OPTIMIZERS}
# The page decides these: a run of the form always trains, and resuming is a button.
NO_FIELD = ("train", "resume", "reference_model_path", *PRECISIONS)

Content = str | bool
"""What a control holds: text, a choice or a tick. No text means that the setting is left at its default."""


@dataclass(frozen=True)
class Field:
    """One control of the form.

    Attributes:
        key: the setting; those inside a mapping are joined by a dot, as in ``lora_parameters.rank``.
        option: what it may be.
        block: the part of the form that it stands in.
        read_by: the losses that read it, of an option of losses.
    """

    key: str
    option: Option
    block: str
    read_by: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """Return the help of the option and its default."""
        default = self.option.default
        if default is None or default == "":
            return self.option.help
        words = ("on" if default else "off") if isinstance(default, bool) else str(default)
        return f"{self.option.help} Default: {words}."

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Return (label, value) of each choice; where nothing may be chosen, too, that comes first."""
        losses = loss_types() if self.key == LOSS_KEY else {}
        titles = CHOICE_TITLES | {name: loss.title for name, loss in losses.items()}
        if self.option is QUANTISATION:
            titles = {option.name: option.label.removeprefix("Load in ") for option in MODEL_OPTIONS}
        named = [(titles.get(str(choice), str(choice)), str(choice)) for choice in self.option.choices]
        return [("none", ""), *named] if self.option.optional else named

    @property
    def default(self) -> Content:
        """Return what the control holds while nothing is set."""
        if self.is_tick:
            return bool(self.option.default)
        return str(self.option.default or "") if self.option.choices else ""

    @property
    def is_tick(self) -> bool:
        """Whether the control is a box to tick."""
        return self.option.type is bool

    def content_of(self, value: Any) -> Content:
        """Return what the control holds for a value from a file; a choice in its own spelling."""
        if value is None:
            return self.default
        if isinstance(value, str) and value not in self.option.choices and value.lower() in self.option.choices:
            return value.lower()
        if self.is_tick and isinstance(value, bool):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, dict | list):
            return dump_settings(value, flow=True, width=4096).strip()
        return str(value)

    def value_of(self, content: Content | None) -> Any:
        """Return the value for a file; ``None`` where the setting is left at its default."""
        if content is None or isinstance(content, bool):
            return content
        if not content.strip():
            return None
        is_list = self.option.listed is not None and content.strip().startswith("[")
        return content.strip() if self.option.type is str and not is_list else parse_value(content)

    def error_of(self, content: Content | None) -> str:
        """Return what is wrong with the content, as the command line would say it; nothing where it is right."""
        value = self.value_of(content)
        if value is None:
            return ""
        try:
            check(self.option, value, lambda key: "in the form", self.key)
        except ConfigError as error:
            return str(error)
        return ""


def form_fields() -> list[Field]:
    """Return every field, block by block; a registered option that nobody placed stands with the training settings."""
    losses = loss_types()
    blocks: dict[str, str] = {}
    for title, options in (
        (FINE_TUNE, MODEL_OPTIONS),
        (MODEL_AND_DATA, DATA_OPTIONS),
        (MORE_TRAINING, TRAINING_OPTIONS),
        (OUTPUT, OUTPUT_OPTIONS),
        (QAT, QAT_OPTIONS),
    ):
        blocks |= {option.name: title for option in options}
    blocks["model"] = MODEL_AND_DATA
    blocks |= dict.fromkeys(("iters", "epochs", "batch_size", "learning_rate"), TRAINING)
    blocks |= {option.name: COLUMNS for option in DATA_OPTIONS if option.name.endswith("_feature")}

    fields = [Field(QUANTISATION.name, QUANTISATION, FINE_TUNE)]
    for name, option in known_options([train_modes()[MODE]], losses.values()).items():
        readers = tuple(loss.name for loss in losses.values() if loss.reads(name))
        block = PREFERENCE if readers or option.group == LOSS else blocks.get(name, MORE_TRAINING)
        if name == "lora_parameters":
            parts = [replace(part, shown_when=option.shown_when) for part in LORA_PARAMETERS]
            fields += [Field(f"{name}.{part.name}", part, block) for part in parts]
        elif name not in NO_FIELD:
            fields.append(Field(name, option, block, readers))
    return sorted(fields, key=lambda field: (BLOCKS.index(field.block), _rank(field.key)))


def _rank(key: str) -> int:
    return LEADING.index(key) if key in LEADING else len(LEADING)


def loss_of_preset(name: Content | None) -> str | None:
    """Return the loss that a preset sets; ``None`` where there is no such preset."""
    return next((preset.values[LOSS_KEY] for preset in PRESETS if preset.name == name), None)


def left_empty(field: Field, preset: Content | None) -> str:
    """Return the value that a run has where the field is left empty: that of a preset, or else the default."""
    values = next((each.values for each in PRESETS if each.name == preset), {})
    value = values.get(field.key, field.option.default)
    return "" if value is None else str(value)


def has_effect(field: Field, contents: Mapping[str, Content], fields: Mapping[str, Field]) -> bool:
    """Whether the field's setting does something beside what the others hold."""
    if field.read_by:
        return contents[LOSS_KEY] in field.read_by
    for name, values in field.option.shown_when.items():
        if name in contents and (fields[name].value_of(contents[name]) or fields[name].option.default) not in values:
            return False
    return True
