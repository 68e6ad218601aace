"""A CPOConfig of TRL, together with the arguments of its scripts: YAML as its command line reads it, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cpo_plugin.convert.conversion import Conversion, Source, given_keys, is_off
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
)
from mlx_cpo_plugin.convert.training_arguments import (
    convert_tracking,
    convert_training_arguments,
)
from mlx_cpo_plugin.errors import ConfigError, named

ONLY_CPO = ("cpo_alpha", "simpo_gamma")
ONLY_CPO_LOSSES = ("simpo", "alphapo")
MARKS = (
    "cpo_alpha",
    "simpo_gamma",
    "loss_type",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_prompt_length",
    "output_dir",
    "dataset_mixer",
    "dataset_mixture",
)
CHANGES_LOSS = ("ld_alpha", "use_weighting", "loss_weights")
"""Keys of DPO that ask for another loss, which is lost without the reference."""
DIVERGENCE, USUAL_DIVERGENCE = "f_divergence_type", "reverse_kl"
REFERENCE_KEYS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    DIVERGENCE,
    "f_alpha_divergence_coef",
    "force_use_ref_model",
    "ref_model_init_kwargs",
    "ref_adapter_name",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "rpo_alpha",
    "discopop_tau",
    *CHANGES_LOSS,
)
OTHER_TRAINERS = {
    "num_generations": "GRPO",
    "num_iterations": "GRPO",
    "reward_funcs": "GRPO",
    "rloo_k": "RLOO",
    "desirable_weight": "KTO",
    "undesirable_weight": "KTO",
    "center_rewards_coefficient": "reward modelling",
    "dataset_text_field": "SFT",
    "packing": "SFT",
    "completion_only_loss": "SFT",
    "assistant_only_loss": "SFT",
}
LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
_ADAPTER_KEYS = ("lora_r", "lora_alpha", "lora_dropout")
_TARGET_KEYS = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")


def is_surely_cpo(values: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a CPOConfig and of no other trainer's."""
    loss = values.get("loss_type")
    loss = loss[0] if isinstance(loss, list) and loss else loss
    return any(key in values for key in ONLY_CPO) or loss in ONLY_CPO_LOSSES


def names_another_trainer(values: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a trainer without pairs, or with a reference model, which is told of by name."""
    return any(values.get(key) is not None for key in (*OTHER_TRAINERS, *REFERENCE_KEYS))


def convert_trl(source: Source, rows: int | None, drop_reference: bool) -> Conversion:
    """Convert a CPOConfig.

    Raises:
        ConfigError: it is the configuration of another trainer, or has a loss that CPO does not have.
    """
    conversion = Conversion("TRL")
    refuse_other_trainers(source)
    convert_scripts(source, conversion, rows)
    _convert_loss(source, conversion, drop_reference)
    length = 512 if source.is_null("max_length") else 1024  # its trainer's default, and its configuration's
    conversion.put("max_seq_length", source.count("max_length", length), source.gives("max_length"))
    checkpointing = "gradient_checkpointing"
    convert_training_arguments(
        source,
        conversion,
        rows,
        learning_rate=1e-6,
        logging_steps=10,
        grad_checkpoint=source.flag(checkpointing, True),
        gives_checkpointing=source.gives(checkpointing),
    )
    convert_output(source, conversion)
    return conversion


def refuse_other_trainers(source: Source) -> None:
    """Refuse a file with a key of a trainer that takes no pairs.

    Raises:
        ConfigError: there is one.
    """
    for key, trainer in OTHER_TRAINERS.items():
        if key in source.values:
            raise ConfigError(
                f"{key} {source.settings.place(key)} belongs to TRL's {trainer}, which trains on no pairs of chosen "
                "and rejected answers; give a CPOConfig.",
                key=key,
                place=source.settings.place(key),
            )


def convert_output(source: Source, conversion: Conversion) -> None:
    """Convert where the run writes to and reports."""
    convert_tracking(source, conversion)
    if source.text("output_dir") is not None:
        conversion.settings["adapter_path"] = source.text("output_dir")
    for key in ("do_train", "do_eval", "do_predict"):
        source.raw(key)


def convert_scripts(source: Source, conversion: Conversion, rows: int | None) -> None:
    """Convert what TRL's scripts, and those built like them, take beside the training arguments: model and data."""
    _convert_model(source, conversion)
    _convert_data(source, conversion, rows)


def _convert_model(source: Source, conversion: Conversion) -> None:
    uses_adapter = source.flag("use_peft")
    dropout_works = not source.flag("disable_dropout", True)
    adapter = Adapter(
        rank=source.count("lora_r", 16, least=1 if uses_adapter else None),
        alpha=source.number("lora_alpha", 32.0),
        dropout=source.number("lora_dropout", 0.05),
        targets=source.raw("lora_target_modules"),
        dora=source.flag("use_dora"),
        rank_stabilised=source.flag("use_rslora"),
        dropout_works=dropout_works,
        given=bool(given_keys(source, _ADAPTER_KEYS)),
    )
    bits = bits_of(source)
    names_model = convert_model(source, "model_name_or_path", conversion)
    if uses_adapter:
        convert_adapter(adapter, conversion)
    elif names_model:
        conversion.put("train_type", "full", given=False)
        ignored = given_keys(source, (*_ADAPTER_KEYS, *_TARGET_KEYS))
        if ignored:
            conversion.tell(f"{', '.join(ignored)} had no effect, since use_peft is not true: train_type is full.")
    else:
        conversion.tell("The file says nothing of adapters: LoRA with its defaults, unless you set train_type: full.")
    convert_precision(bits, conversion)
    convert_template(source, "chat_template", conversion)


def _convert_data(source: Source, conversion: Conversion, rows: int | None) -> None:
    validates = not is_off(source.values.get("eval_strategy", source.values.get("evaluation_strategy")))
    share = source.number("test_split_size", 0.0)
    valid = str(source.raw("dataset_test_split", "test")) if validates and not share else None
    train = str(source.raw("dataset_train_split", "train"))
    entries = []
    name, config = source.text("dataset_name"), source.text("dataset_config")
    if name is not None:
        entries.append(DataEntry(name, {"name": config} if config else {}, train, valid))
    entries += [_mixture_entry(entry) for entry in source.entries("datasets")]
    entries += _handbook_mixer(source, conversion, validates)
    mixture = source.inside("dataset_mixture")
    entries += [_mixture_entry(entry) for entry in mixture.entries("datasets", ("id", "path"))]
    convert_data(entries, conversion)
    convert_valid_share(share or mixture.number("test_split_size", 0.0), "test_split_size", conversion, rows)


def _mixture_entry(entry: Source) -> DataEntry:
    options = {key: entry.raw(key) for key in ("name", "data_dir", "data_files") if entry.gives(key)}
    if entry.text("config") is not None:
        options["name"] = entry.text("config")
    weight = entry.number("weight")
    return DataEntry(entry.text("path") or entry.text("id"), options, str(entry.raw("split", "train")), weight=weight)


def _handbook_mixer(source: Source, conversion: Conversion, validates: bool) -> list[DataEntry]:
    """Read alignment-handbook's ``dataset_mixer``: hub name -> share of its training rows."""
    mixer = source.inside("dataset_mixer")
    splits = source.raw("dataset_splits", ["train", "test"])
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise source.refuse("dataset_splits", "it must be a list of names")
    valid = next((split for split in splits if "test" in split), None) if validates else None
    entries = []
    for name in mixer.values:
        share = mixer.number(name, 1.0)
        if not 0 < share <= 1:
            raise mixer.refuse(name, "it must be the share of its rows to take, above 0 and at most 1")
        percent = max(1, round(100 * share))
        part = "" if share == 1 else f"[:{percent}%]"
        if part:
            conversion.tell(f"dataset_mixer takes {share:g} of {named(name, 60)}, here its first {percent} %.")
        entries += [DataEntry(name, {}, split + part, valid) for split in splits if "train" in split]
    return entries


def _convert_loss(source: Source, conversion: Conversion, drop_reference: bool) -> None:
    loss = source.raw("loss_type", "sigmoid")
    if isinstance(loss, list) and len(loss) == 1:
        loss = loss[0]
    if not isinstance(loss, str) or loss not in LOSSES:
        raise source.refuse("loss_type", f"CPO has {', '.join(LOSSES)}")
    reference = given_keys(source, REFERENCE_KEYS)
    if (reference and not source.flag("reference_free")) or (drop_reference and not is_surely_cpo(source.values)):
        reference = reference or ["loss_type"]
        require_no_reference(source, reference, loss, drop_reference, conversion)
        lost = {*CHANGES_LOSS, *(() if source.values.get(DIVERGENCE) == USUAL_DIVERGENCE else (DIVERGENCE,))}
        for key in set(reference) - lost:
            source.raw(key)
    beta, smoothing = source.number("beta", 0.1), source.number("label_smoothing", 0.0)
    # A DPOConfig whose reference is dropped has TRL's likelihood term by another name, and none by default.
    weight = source.number("cpo_alpha", source.number("rpo_alpha", 0.0) if reference else 1.0)
    gamma, alpha = source.number("simpo_gamma", 0.5), source.number("alpha", 0.0)
    if loss == "alphapo":
        loss, weight = "simpo", 0.0
    if alpha and loss != "simpo":
        raise source.refuse("alpha", f"only simpo and alphapo have it here, not {loss}")
    options = {"cpo_alpha": weight}
    if loss in ("sigmoid", "simpo"):
        options["label_smoothing"] = smoothing
    elif smoothing:
        conversion.tell(f"label_smoothing {smoothing:g} had no effect with {loss}, and is left out.")
    if loss == "simpo":
        options["simpo_gamma"] = gamma
    if alpha:
        loss = "alphapo"
        options["alphapo_alpha"] = alpha
    ours = {"loss_type": "dpo_cpo_loss_type", "alpha": "alphapo_alpha", "rpo_alpha": "cpo_alpha"}
    keys = ("loss_type", "beta", "cpo_alpha", "rpo_alpha", "label_smoothing", "simpo_gamma", "alpha")
    given = [ours.get(key, key) for key in keys if source.gives(key)]
    put_loss(conversion, loss, beta, given, **options)
