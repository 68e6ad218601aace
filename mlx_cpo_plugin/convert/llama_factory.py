"""A configuration of LLaMA-Factory with ``stage: dpo``: SimPO, or a loss whose reference is to be dropped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.convert.conversion import Conversion, Source, in_words, is_off, merged
from mlx_cpo_plugin.convert.model_and_data import (
    Adapter,
    DataEntry,
    convert_adapter,
    convert_data,
    convert_model,
    convert_precision,
    convert_valid_share,
    put_loss,
    require_no_reference,
    tell_of_messages,
)
from mlx_cpo_plugin.convert.training_arguments import (
    convert_tracking,
    convert_training_arguments,
)
from mlx_cpo_plugin.errors import ConfigError, named, shown
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings

MARKS = ("stage", "finetuning_type", "pref_loss", "pref_beta", "cutoff_len", "dataset_dir")
INFO_FILE = "dataset_info.json"
TAGGED_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
    "function_call": "function",
    "system": "system",
}
"""Role as it is read -> what stands before ``_tag`` in dataset_info.json."""
FORMATTINGS = ("alpaca", "sharegpt", "openai")
WITH_REFERENCE = ("sigmoid", "hinge", "ipo")
COLUMNS = {"chosen": "chosen_feature", "rejected": "rejected_feature", "system": "system_feature"}


def convert_llama_factory(source: Source, rows: int | None, drop_reference: bool) -> Conversion:
    """Convert a LLaMA-Factory configuration.

    Raises:
        ConfigError: it trains no preferences, or has a loss that CPO does not have.
    """
    conversion = Conversion("LLaMA-Factory")
    stage = source.raw("stage", "sft")
    if stage != "dpo":
        raise source.refuse("stage", "only dpo trains on pairs of chosen and rejected answers", default=stage)
    source.raw("do_train")
    _convert_loss(source, conversion, drop_reference)
    _convert_model(source, conversion)
    most = source.count("max_samples", least=1)
    if rows and most is not None:
        rows = min(rows, most * len(_names(source.raw("dataset", []))))
    _convert_data(source, conversion, rows, most)
    conversion.put("max_seq_length", source.count("cutoff_len", 2048), source.gives("cutoff_len"))
    checkpointing = "disable_gradient_checkpointing"
    convert_training_arguments(
        source,
        conversion,
        rows,
        learning_rate=5e-5,
        logging_steps=500,
        optimizer="muon" if source.flag("use_muon") else None,
        grad_checkpoint=not source.flag(checkpointing),
        gives_checkpointing=source.gives(checkpointing),
    )
    if source.count("early_stopping_steps") is not None:
        conversion.put("early_stopping_patience", source.count("early_stopping_steps"), given=True)
    _convert_tracking(source, conversion)
    if source.text("output_dir") is not None:
        conversion.settings["adapter_path"] = source.text("output_dir")
    return conversion


def _convert_loss(source: Source, conversion: Conversion, drop_reference: bool) -> None:
    key = "dpo_loss" if source.gives("dpo_loss") and not source.gives("pref_loss") else "pref_loss"
    loss = source.raw(key, "sigmoid")
    if loss not in (*WITH_REFERENCE, "simpo"):
        raise source.refuse(key, "CPO has simpo, and sigmoid, hinge and ipo with --drop-reference")
    # The second names are those of its first versions.
    beta = source.number("pref_beta", source.number("dpo_beta", 0.1))
    weight = source.number("pref_ftx", source.number("dpo_ftx", 0.0))
    theirs = {
        **dict.fromkeys(("pref_beta", "dpo_beta"), "beta"),
        **dict.fromkeys(("pref_ftx", "dpo_ftx"), "cpo_alpha"),
        "simpo_gamma": "simpo_gamma",
    }
    given = ["dpo_cpo_loss_type", *(ours for key, ours in theirs.items() if source.gives(key))]
    options = {"cpo_alpha": weight}
    if loss == "simpo":
        options["simpo_gamma"] = source.number("simpo_gamma", 0.5)
    else:
        require_no_reference(source, [key], loss, drop_reference, conversion)
    if loss == "sigmoid" and source.number("dpo_label_smoothing", 0.0):
        options["label_smoothing"] = source.number("dpo_label_smoothing")
        given.append("label_smoothing")
    put_loss(conversion, loss, beta, given, **options)
    if weight:
        theirs_weight = "pref_ftx" if source.gives("pref_ftx") else "dpo_ftx"
        conversion.tell(
            f"{theirs_weight} weighs the mean over answers of their mean over tokens, cpo_alpha one over all tokens."
        )


def _convert_model(source: Source, conversion: Conversion) -> None:
    convert_model(source, "model_name_or_path", conversion)
    kind = source.raw("finetuning_type", "lora")
    if kind == "lora":
        rank = source.count("lora_rank", 8, least=1)
        adapter = Adapter(
            rank=rank,
            alpha=source.number("lora_alpha", 2.0 * rank),
            dropout=source.number("lora_dropout", 0.0),
            targets=source.raw("lora_target", "all"),
            dora=source.flag("use_dora"),
            rank_stabilised=source.flag("use_rslora"),
            dropout_works=False,
            given=any(map(source.gives, ("lora_rank", "lora_alpha", "lora_dropout"))),
        )
        convert_adapter(adapter, conversion)
    elif kind in ("full", "freeze"):
        conversion.put("train_type", "full", given=True)
        layers = source.count("freeze_trainable_layers", 2)
        if kind == "freeze":
            conversion.put("num_layers", layers, source.gives("freeze_trainable_layers"))
    else:
        raise source.refuse("finetuning_type", "only lora, freeze and full can be converted")
    bits = source.count("quantization_bit")
    if bits not in (None, 4, 8):
        raise source.refuse("quantization_bit", "only 4 and 8 bits can be converted")
    convert_precision(bits, conversion)
    template = source.raw("template")
    if template is not None:
        conversion.tell(f"template {named(template, 60)} has no counterpart: the model's own chat template is used.")


def _convert_data(source: Source, conversion: Conversion, rows: int | None, most: int | None) -> None:
    names = _names(source.raw("dataset", []))
    folder = str(source.raw("dataset_dir", "data"))
    entries = (
        [DataEntry(name) for name in names] if folder == "ONLINE" else _described(source, folder, names, conversion)
    )
    if most is not None:
        entries = [
            entry if "[" in entry.train_split else replace(entry, train_split=f"{entry.train_split}[:{most}]")
            for entry in entries
        ]
        conversion.tell(f"max_samples takes the first {most} rows of each set; of one with fewer, take out [:{most}].")
    convert_data(entries, conversion)
    convert_valid_share(source.number("val_size", 0.0), "val_size", conversion, rows)


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names]


def _described(source: Source, folder: str, names: list[str], conversion: Conversion) -> list[DataEntry]:
    """Return the data sets as ``dataset_info.json`` describes them; none where it is not there."""
    beside = Path(source.settings.file).parent / folder
    for place in (Path(folder), beside):
        try:
            described = json.loads((place / INFO_FILE).read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            file = str(place / INFO_FILE)
            raise ConfigError(f"{named(file)} is not valid JSON; correct it.", place=file) from error
        return [_entry(name, described, place, conversion) for name in names]
    if names:
        conversion.tell(
            f"dataset {', '.join(names)} is described in {INFO_FILE} of dataset_dir {named(folder, 60)}, which is not "
            "here."
        )
    return []


def _entry(name: str, described: Any, place: Path, conversion: Conversion) -> DataEntry:
    file = str(place / INFO_FILE)
    info = described.get(name) if isinstance(described, dict) else None
    if not isinstance(info, dict):
        raise ConfigError(
            f"dataset {named(name)} is not described in {named(file)}; correct the name.", key="dataset", place=file
        )
    entry = Source(YamlSettings(file, info, {}))
    if not entry.flag("ranking"):
        conversion.tell(f"dataset {named(name, 60)} has no ranking: true in {INFO_FILE}: are its rows pairs?")
    formatting = entry.raw("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        raise ConfigError(
            f"dataset {named(name)} has the formatting {shown(formatting)} in {named(file)}, but only "
            f"{', '.join(FORMATTINGS)} can be converted.",
            key="formatting",
            place=file,
            allowed=", ".join(FORMATTINGS),
        )
    alpaca = formatting == "alpaca"
    features = _columns(entry.inside("columns"), alpaca, conversion)
    if not alpaca or entry.gives("tags"):
        _check_tags(name, entry, conversion)
    hub, local = entry.text("hf_hub_url"), entry.text("file_name")
    split, options = "train", {}
    if hub is not None:
        split = str(entry.raw("split", "train"))
        options = merged({"name": entry.raw("subset"), "data_dir": entry.raw("folder")})
    elif local is None:
        raise ConfigError(
            f"dataset {named(name)} has neither file_name nor hf_hub_url in {named(file)}; give one.",
            key="file_name",
            place=file,
        )
    left_out = [path for path in entry.unread() if not is_off(entry.value_at(path))]
    conversion.left_out += [f"{INFO_FILE}: {in_words((name, *path))}" for path in left_out]
    return DataEntry(hub or str(place / local), options, split, None, features)


def _columns(columns: Source, alpaca: bool, conversion: Conversion) -> dict[str, str]:
    """Return our column settings; a ``query`` joins the prompt, which the reader does, too."""
    features = {ours: columns.text(theirs) for theirs, ours in COLUMNS.items() if columns.text(theirs)}
    prompts = ("prompt", "query") if alpaca else ("messages",)
    names = [name for key in prompts if (name := columns.text(key))]
    if names == ["instruction", "input"] and columns.values.get("history") == "history":
        conversion.tell(f"The columns instruction, input and {columns.raw('history')} are found by their names.")
    elif names:
        features["prompt_feature"] = "+".join(names)
    if columns.values.get("tools") == "tools":  # as the reader calls them
        columns.raw("tools")
    return features


def _check_tags(name: str, entry: Source, conversion: Conversion) -> None:
    """Say where messages have keys or roles that are not read; those of ShareGPT and OpenAI are."""
    tags = entry.inside("tags")
    openai = entry.raw("formatting") == "openai"
    role = tags.text("role_tag", "role" if openai else "from")
    content = tags.text("content_tag", "content" if openai else "value")
    roles = {our: tags.text(f"{their}_tag") for our, their in TAGGED_ROLES.items()}
    tell_of_messages(name, (role, content), roles, conversion)


def _convert_tracking(source: Source, conversion: Conversion) -> None:
    convert_tracking(source, conversion)
    project, run_name = source.raw("swanlab_project", "llamafactory"), source.raw("swanlab_run_name")
    if source.flag("use_swanlab"):
        conversion.settings.setdefault("report_to", []).append("swanlab")
        conversion.settings.setdefault("project", project)
        if run_name is not None:
            conversion.settings.setdefault("run_name", str(run_name).replace("/", "-"))
