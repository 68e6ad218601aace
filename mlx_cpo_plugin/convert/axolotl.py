"""A configuration of Axolotl with ``rl: simpo``, or with DPO or IPO whose reference is to be dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from mlx_cpo_plugin.convert.conversion import Conversion, Source, is_off
from mlx_cpo_plugin.convert.model_and_data import (
    Adapter,
    DataEntry,
    bits_of,
    convert_adapter,
    convert_data,
    convert_model,
    convert_precision,
    convert_template,
    convert_valid_share,
    put_loss,
    require_no_reference,
    tell_of_messages,
)
from mlx_cpo_plugin.convert.training_arguments import (
    EACH_EPOCH,
    Length,
    ScheduleRequest,
    convert_checkpoints,
    convert_hub,
    convert_length,
    convert_optimizer,
    convert_rest,
    convert_schedule,
    put_interval,
    put_trackers,
    tell_of_intervals,
    warmup_of,
)
from mlx_cpo_plugin.errors import ConfigError, named

MARKS = ("base_model", "rl", "sequence_len")
CUSTOM_COLUMNS = {
    "field_messages": "prompt_feature",
    "field_prompt": "prompt_feature",
    "field_chosen": "chosen_feature",
    "field_rejected": "rejected_feature",
    "field_system": "system_feature",
}
OVERLONG = {"drop": "drop", "truncate": "cut", "raise": "error"}
FORMATS = ("chatml", "llama3", "zephyr", "user_defined", "passthrough")
"""Prompt strategies that write prompts in another way than the model's template."""
LONGEST_DEFAULT_WARMUP, DEFAULT_WARMUP_SHARE = 100, 0.03


TRACKED_AS = {
    "wandb": ("wandb_project", "wandb_name"),
    "trackio": ("trackio_project_name", "trackio_run_name"),
    "swanlab": ("swanlab_project", "swanlab_experiment_name"),
}
"""Tracker -> Axolotl's keys for the project and the name of the run."""


def convert_axolotl(source: Source, rows: int | None, drop_reference: bool) -> Conversion:
    """Convert an Axolotl configuration.

    Raises:
        ConfigError: it trains no preferences, or has a loss that CPO does not have.
    """
    conversion = Conversion("Axolotl")
    _convert_loss(source, conversion, drop_reference)
    _convert_model(source, conversion)
    _convert_data(source, conversion, rows)
    conversion.put("max_seq_length", source.count("sequence_len", 512), source.gives("sequence_len"))
    too_long = str(source.raw("excess_length_strategy", "drop"))
    if too_long not in OVERLONG:
        raise source.refuse("excess_length_strategy", f"only {', '.join(OVERLONG)} can be converted")
    conversion.put("overlong", OVERLONG[too_long], source.gives("excess_length_strategy"))
    length = convert_length(source, conversion, rows, ("micro_batch_size", 1), ("num_epochs", 1.0))
    rate = source.number("learning_rate")
    if rate is None:
        raise ConfigError(
            f"{named(source.settings.file)} gives no learning_rate, without which Axolotl does not train; add it.",
            key="learning_rate",
            place=source.settings.place("learning_rate"),
        )
    conversion.put("learning_rate", rate, given=True)
    convert_schedule(_schedule(source, rate, length), conversion, length)
    convert_optimizer(source, conversion, "optimizer", str(source.raw("optimizer", "adamw_torch_fused")))
    checkpointing = source.raw("gradient_checkpointing", False)
    convert_rest(source, conversion, not is_off(checkpointing), source.gives("gradient_checkpointing"))
    _convert_intervals(source, conversion, length)
    convert_checkpoints(source, conversion)
    if source.flag("auto_resume_from_checkpoints"):
        conversion.settings["resume"] = "auto"
    if source.count("early_stopping_patience") is not None:
        conversion.put("early_stopping_patience", source.count("early_stopping_patience"), given=True)
    _convert_tracking(source, conversion)
    conversion.put("adapter_path", source.text("output_dir", "./model-out"), source.gives("output_dir"))
    return conversion


def _convert_loss(source: Source, conversion: Conversion, drop_reference: bool) -> None:
    rl = source.raw("rl")
    if is_off(rl):
        raise ConfigError(
            f"{named(source.settings.file)} has no rl, so Axolotl would train on no preferences with it; give one with "
            "rl: simpo.",
            key="rl",
            place=source.settings.place("rl"),
        )
    if rl not in ("simpo", "dpo", "ipo"):
        raise source.refuse("rl", "only simpo can be converted, or dpo and ipo with --drop-reference")
    in_trl = source.inside("trl").number("beta")
    beta = source.number("rl_beta", 0.1) if in_trl is None else in_trl
    given = ["dpo_cpo_loss_type", *(["beta"] if source.gives("rl_beta") or in_trl is not None else [])]
    if rl == "simpo":
        given += [key for key in ("cpo_alpha", "simpo_gamma") if source.gives(key)]
        weight, gamma = source.number("cpo_alpha", 1.0), source.number("simpo_gamma", 0.5)
        put_loss(conversion, "simpo", beta, given, cpo_alpha=weight, simpo_gamma=gamma)
        return
    losses = source.raw("dpo_loss_type", ["ipo" if rl == "ipo" else "sigmoid"])
    loss = losses[0] if isinstance(losses, list) and len(losses) == 1 else losses
    if loss not in ("sigmoid", "hinge", "ipo"):
        raise source.refuse("dpo_loss_type", "CPO has sigmoid, hinge and ipo")
    require_no_reference(source, ["rl"], loss, drop_reference, conversion)
    smoothing = source.number("dpo_label_smoothing", 0.0) if loss == "sigmoid" else 0.0
    if smoothing:
        given.append("label_smoothing")
    given += ["cpo_alpha"] if source.gives("rpo_alpha") else []
    weight = source.number("rpo_alpha", 0.0)
    put_loss(conversion, loss, beta, given, cpo_alpha=weight, label_smoothing=smoothing)


def _convert_model(source: Source, conversion: Conversion) -> None:
    convert_model(source, "base_model", conversion)
    convert_template(source, "chat_template_jinja", conversion)
    adapter = source.raw("adapter")
    if is_off(adapter):
        conversion.put("train_type", "full", given=False)
    elif adapter not in ("lora", "qlora"):
        raise source.refuse("adapter", "only lora and qlora can be converted")
    else:
        rank, alpha = source.count("lora_r", least=1), source.number("lora_alpha")
        if rank is None or alpha is None:
            raise ConfigError(
                f"{named(source.settings.file)} has an adapter without lora_r or lora_alpha; give both.",
                key="lora_r" if rank is None else "lora_alpha",
                place=source.settings.place("adapter"),
            )
        targets = "all-linear" if source.flag("lora_target_linear") else source.raw("lora_target_modules")
        dropout, dora, stabilised = source.number("lora_dropout", 0.0), "peft_use_dora", "peft_use_rslora"
        convert_adapter(
            # The trainer is TRL's, whose dropout is off.
            Adapter(rank, alpha, dropout, targets, source.flag(dora), source.flag(stabilised), False, given=True),
            conversion,
        )
    convert_precision(bits_of(source), conversion)


def _convert_data(source: Source, conversion: Conversion, rows: int | None) -> None:
    train = [_entry(entry, conversion) for entry in source.entries("datasets")]
    tests = [(str(entry.text("path")), str(entry.raw("split", "train"))) for entry in source.entries("test_datasets")]
    entries = list(train)
    if tests and len(train) == 1 and [path for path, _ in tests] == [train[0].path]:
        entries = [replace(train[0], valid_split=tests[0][1])]
    elif tests:
        conversion.tell("test_datasets are other data sets than datasets and have no counterpart: set valid_split.")
    convert_data(entries, conversion)
    convert_valid_share(source.number("val_set_size", 0.0), "val_set_size", conversion, rows)


def _entry(entry: Source, conversion: Conversion) -> DataEntry:
    path, kind = str(entry.text("path")), entry.raw("type")
    columns: dict[str, str] = {}
    for place in (entry, entry.inside("type")) if isinstance(kind, Mapping) else (entry,):
        columns |= {ours: place.text(theirs) for theirs, ours in CUSTOM_COLUMNS.items() if place.gives(theirs)}
    options = {key: entry.raw(key) for key in ("name", "data_files", "revision") if entry.gives(key)}
    entry.raw("ds_type")
    if isinstance(kind, str):
        what = "is not needed: rows are told apart by their keys."
        if kind.partition(".")[0] in FORMATS:
            what = "does not use the model's chat template; here prompts are in its format: set chat_template where "
            what += "they differ."
        conversion.tell(f"datasets: type {named(kind, 60)} of {named(path, 60)} {what}")
    _check_messages(entry, path, conversion)
    return DataEntry(path, options, str(entry.raw("split", "train")), None, columns)


def _check_messages(entry: Source, path: str, conversion: Conversion) -> None:
    """Say where messages have keys or roles that are not read: their rows would be left out."""
    keys = entry.inside("message_property_mappings")
    role = keys.text("role") or entry.text("message_field_role", "role")
    content = keys.text("content") or entry.text("message_field_content", "content")
    roles = entry.inside("roles")
    tell_of_messages(path, (role, content), {target: roles.raw(target) for target in roles.values}, conversion)


def _schedule(source: Source, peak: float, length: Length) -> ScheduleRequest:
    name = str(source.raw("lr_scheduler", "cosine"))
    steps, share = warmup_of(source)
    if steps is not None or share is not None:
        warmup = steps if steps is not None else share or 0.0
    elif length.steps is not None:
        warmup = min(int(DEFAULT_WARMUP_SHARE * length.steps), LONGEST_DEFAULT_WARMUP)
    else:
        warmup = DEFAULT_WARMUP_SHARE
    ratio = source.number("cosine_min_lr_ratio", 0.0)
    if ratio and name == "cosine":
        name = "cosine_with_min_lr"
    return ScheduleRequest(name, peak, warmup, end=ratio * peak)


def _convert_intervals(source: Source, conversion: Conversion, length: Length) -> None:
    reports = source.number("logging_steps")
    if reports is None and length.steps is not None:
        reports = max(min(int(0.005 * length.steps), 10), 1)
    put_interval(conversion, "steps_per_report", length.iterations(reports or 10), source.gives("logging_steps"))
    _convert_interval(source, conversion, length, "save", "save_every")
    validates = source.gives("test_datasets") or source.number("val_set_size", 0.0) > 0
    if validates:
        _convert_interval(source, conversion, length, "eval", "steps_per_eval")
        conversion.put("val_batches", -1, given=False)
    tell_of_intervals(conversion, length)


def _convert_interval(source: Source, conversion: Conversion, length: Length, what: str, ours: str) -> None:
    """Convert ``eval_steps`` or ``evals_per_epoch`` and the like; without either, or with one, it is an epoch."""
    steps, each_epoch = source.number(f"{what}_steps"), source.number(f"{what}s_per_epoch")
    strategy = source.raw(f"{what}_strategy")
    if source.gives(f"{what}_strategy") and is_off(strategy):
        conversion.tell(f"{what}_strategy {strategy} has no counterpart: {ours} keeps its default.")
        return
    epoch = strategy == "epoch" or (steps is None and (each_epoch or 1) == 1)
    given = any(source.gives(f"{what}{key}") for key in ("_steps", "s_per_epoch", "_strategy"))
    if epoch:
        conversion.put(EACH_EPOCH[ours], True, given)
    elif steps is not None:
        put_interval(conversion, ours, length.iterations(steps), given)
    else:
        put_interval(conversion, ours, length.epoch and max(1, math.ceil(length.epoch / each_epoch)), given)


def _convert_tracking(source: Source, conversion: Conversion) -> None:
    names = ("wandb", "tensorboard", "trackio", "swanlab", "mlflow", "comet")
    wanted = [name for name in names if source.flag(f"use_{name}")]
    if source.gives("wandb_project") and "use_wandb" not in source.values:
        wanted.insert(0, "wandb")
    put_trackers(conversion, wanted)
    convert_hub(source, conversion, not is_off(source.raw("hub_model_id")))
    for name, (project_key, name_key) in TRACKED_AS.items():
        project, run_name = source.raw(project_key), source.raw(name_key)
        if name in wanted:
            for key, value in (("project", project), ("run_name", run_name)):
                if not is_off(value):
                    conversion.settings.setdefault(key, str(value).replace("/", "-"))
