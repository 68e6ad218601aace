"""Adapters, quantised loading, losses and data sets, in terms that the sources share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_cpo_plugin.convert.conversion import Conversion, Source, merged
from mlx_cpo_plugin.data.chat_template import is_jinja
from mlx_cpo_plugin.data.dataset import rows_held_out
from mlx_cpo_plugin.data.files import SUFFIXES, kind_of
from mlx_cpo_plugin.data.messages import ROLES
from mlx_cpo_plugin.errors import named

MESSAGE_KEYS = (("role", "content"), ("from", "value"))
ALL_LINEAR = ("all", "all-linear", ["all"], ["all-linear"])
MODULE_PATHS = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")},
}
"""Module as PEFT names it -> its path inside a layer, in models built as Llama is."""
OUTSIDE_LAYERS = ("lm_head", "embed_tokens")
_NAMES = re.compile(r"[\w.]+(-linear)?(\s*,\s*[\w.]+)*")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT describes it.

    Attributes:
        rank, alpha, dropout: as in PEFT; the rank is at least 1.
        targets: the modules that are adapted, as the file gives them; ``None`` leaves them to PEFT.
        dora, rank_stabilised: whether it is DoRA, and whether alpha is divided by the rank's square root.
        dropout_works: whether the trainer leaves dropout on; TRL's switches all dropout off by default.
        given: whether the file gives rank, alpha or dropout.
    """

    rank: int
    alpha: float
    dropout: float
    targets: Any
    dora: bool
    rank_stabilised: bool
    dropout_works: bool
    given: bool


@dataclass(frozen=True)
class DataEntry:
    """One data set of a file.

    Attributes:
        path: hub name, folder or file.
        options: what else loading it needs: ``name``, ``data_files``, ``revision``, ...
        train_split, valid_split: splits; ``None``: no validation on it.
        columns: ``chosen_feature`` and the like -> column.
        weight: how often an epoch has each of its rows; ``None``: once.
    """

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    valid_split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None

    @property
    def is_local(self) -> bool:
        """Whether the path is a file or folder on this machine and needs nothing else to be read."""
        looks_local = self.path.startswith((".", "/", "~")) or self.path.endswith("/") or kind_of(self.path) in SUFFIXES
        return looks_local and not self.options and "[" not in self.train_split


def convert_model(source: Source, key: str, conversion: Conversion) -> bool:
    """Write ``model``, or say that the file names none under ``key``; return whether it does."""
    model = source.text(key)
    if model is None:
        conversion.tell("The file names no model: set model.")
        return False
    conversion.settings["model"] = model
    return True


def convert_template(source: Source, key: str, conversion: Conversion) -> None:
    """Write a chat template that is given as text; a name of one has no counterpart."""
    template = source.values.get(key)
    if isinstance(template, str) and is_jinja(template):
        conversion.settings["chat_template"] = source.as_it_is(key)


def convert_adapter(adapter: Adapter, conversion: Conversion) -> None:
    """Write ``train_type`` and ``lora_parameters``: our scale is alpha over the rank, or over its square root."""
    divisor = math.sqrt(adapter.rank) if adapter.rank_stabilised else adapter.rank
    scale = adapter.alpha / divisor
    dropout = adapter.dropout if adapter.dropout_works else 0.0
    conversion.put("train_type", "dora" if adapter.dora else "lora", given=adapter.dora)
    keys = _keys(adapter.targets, conversion)
    parameters = merged({"rank": adapter.rank, "dropout": dropout, "scale": scale, "keys": keys})
    conversion.put("lora_parameters", parameters, adapter.given or keys is not None)
    rank = "the square root of rank" if adapter.rank_stabilised else "rank"
    conversion.tell(f"lora_alpha {adapter.alpha:g} over {rank} {adapter.rank} is scale {scale:g}.")
    if adapter.dropout and not adapter.dropout_works:
        conversion.tell(
            f"lora_dropout {adapter.dropout:g} is 0 here, as it was there: the trainer switches dropout off."
        )


def _keys(targets: Any, conversion: Conversion) -> list[str] | None:
    """Return the paths inside a layer of the modules that PEFT would adapt; ``None``: all linear ones."""
    names = targets.split(",") if isinstance(targets, str) and _NAMES.fullmatch(targets) else targets
    if names in ALL_LINEAR:
        return None
    names = list(dict.fromkeys(str(name).strip() for name in names)) if isinstance(names, list) else []
    inside = [name for name in names if name not in OUTSIDE_LAYERS]
    if not inside:
        which = "those that PEFT picks" if targets is None else str(targets)
        conversion.tell(f"The adapted modules, {which}, have no counterpart: every linear layer is adapted.")
        return None
    if outside := [name for name in names if name in OUTSIDE_LAYERS]:
        conversion.tell(
            f"Of the adapted modules {', '.join(outside)} stay without an adapter: add whole paths, such as "
            "model.embed_tokens, to lora_parameters.keys."
        )
    if unknown := [name for name in inside if name not in MODULE_PATHS and "." not in name]:
        conversion.tell(
            f"lora_parameters.keys has {', '.join(unknown)} as it stands: put the path inside a layer in front."
        )
    return [MODULE_PATHS.get(name, name) for name in inside]


def bits_of(source: Source) -> int | None:
    """Return the bits that transformers' keys ask the base model to be loaded in."""
    return 4 if source.flag("load_in_4bit") else 8 if source.flag("load_in_8bit") else None


def convert_precision(bits: int | None, conversion: Conversion) -> None:
    """Write that the base model is loaded in 4 or 8 bits."""
    if bits is None:
        return
    conversion.settings[f"load_in_{bits}bits"] = True
    conversion.tell(
        f"{bits} bits are MLX's affine quantisation in groups of up to 128 weights, not bitsandbytes'; remove the "
        "key for a model that is already quantised."
    )


def convert_data(entries: Sequence[DataEntry], conversion: Conversion) -> None:
    """Write ``data`` for one local set, or ``hf_dataset``."""
    if not entries:
        conversion.tell("The file names no data set that can be read here: set data or hf_dataset.")
        return
    if len(entries) == 1 and entries[0].is_local and entries[0].weight is None:
        conversion.settings |= {"data": entries[0].path, **entries[0].columns}
        if entries[0].valid_split is not None:
            conversion.tell("Of local data the validation rows are those in a file called valid, or valid_fraction.")
        return
    conversion.settings["hf_dataset"] = [_entry(entry) for entry in entries]


def _entry(entry: DataEntry) -> dict[str, Any]:
    path, options = entry.path, entry.options
    if kind_of(path) in SUFFIXES and not options:
        builder = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}.get(kind_of(path), "json")
        path, options = builder, {"data_files": path}
    names_config = set(options) == {"name"}
    settings = merged(
        {"path": path, "config": options["name"] if names_config else options or None},
        {"train_split": entry.train_split},
        entry.columns,
        {"weight": entry.weight},
    )
    # Null, and not left out: otherwise a part of the training rows would be validated on.
    return {**settings, "valid_split": entry.valid_split}


def tell_of_messages(path: str, keys: tuple[str, str], roles: Mapping[str, Any], conversion: Conversion) -> None:
    """Say where messages of a data set have keys or roles that are not read, and so their rows would be left out.

    Args:
        keys: of the role and of the content.
        roles: role -> the name, or names, that messages have for it.
    """
    if keys not in MESSAGE_KEYS:
        conversion.tell(
            f"Messages of {named(path, 60)} have the keys {named(', '.join(keys), 60)}, and rows with them are left "
            "out: rename them to role and content."
        )
    for role, names in roles.items():
        for name in names if isinstance(names, list) else [names]:
            if name is not None and ROLES.get(str(name).lower()) != ROLES.get(role, role):
                conversion.tell(
                    f"Messages of {named(path, 60)} call the role {named(role, 60)} {named(str(name), 60)}, and rows "
                    "with it are left out or misread: rename it."
                )


def convert_valid_share(size: float, key: str, conversion: Conversion, rows: int | None) -> None:
    """Write ``valid_fraction`` from a share of the training rows or a number of them."""
    if size <= 0:
        return
    if size >= 1 and not rows:
        conversion.tell(f"{key} {size:g} is a number of rows, valid_fraction a share of them: give --rows, or set it.")
        return
    share = size if size < 1 else min(0.5, size / (rows or 1))
    conversion.settings["valid_fraction"] = share
    conversion.held_out = rows_held_out(share, rows or 0)
    for entry in conversion.settings.get("hf_dataset", []):
        entry.pop("valid_split")


def put_loss(conversion: Conversion, loss: str, beta: float, given: Sequence[str], **options: float) -> None:
    """Write the loss, its beta and its options, each explicitly: their defaults differ from loss to loss.

    Args:
        given: those of our keys that the file gives.
        options: further options of the loss by our names; none is written that is 0 by default and 0 here.
    """
    zero_by_default = ("cpo_alpha", "label_smoothing")
    written = {"dpo_cpo_loss_type": loss, "beta": beta}
    written |= {name: value for name, value in options.items() if value or name not in zero_by_default}
    for key, value in written.items():
        conversion.settings[key] = value
        if key not in given:
            conversion.defaulted.append(key)
    if options.get("cpo_alpha"):
        conversion.tell(
            "cpo_alpha weighs the mean over the chosen tokens of a whole optimizer step, on all devices; "
            f"{conversion.source_name} takes it over each micro-batch."
        )


def require_no_reference(source: Source, keys: Sequence[str], loss: str, drop: bool, conversion: Conversion) -> None:
    """Refuse a configuration that compares log-probs with a reference model, or say that it is dropped.

    Args:
        keys: those that ask for a reference.
        loss: the loss, which the first key names where it is left out.
        drop: whether the reference is to be dropped.

    Raises:
        ConfigError: the reference is not to be dropped.
    """
    if not drop:
        raise source.refuse(
            keys[0],
            f"DPO with the loss {loss} needs a reference model, and CPO has none: use mlx-lm-lora's train_mode: dpo, "
            "or convert with --drop-reference",
            default=loss,
        )
    conversion.tell(
        "The reference model is dropped: log-probs are only compared with each other, and beta usually has to be "
        "smaller, e.g. 0.05."
    )
