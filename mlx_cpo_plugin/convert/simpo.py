"""A configuration of the SimPO authors' own trainer: TRL's keys, but another loss and other defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cpo_plugin.convert import trl
from mlx_cpo_plugin.convert.conversion import Conversion, Source
from mlx_cpo_plugin.convert.model_and_data import put_loss
from mlx_cpo_plugin.convert.training_arguments import convert_training_arguments

MARKS = ("gamma_beta_ratio", "sft_weight")


def recognises(values: Mapping[str, Any]) -> bool:
    """Whether a file is one of the SimPO authors."""
    return any(mark in values for mark in MARKS) or is_of_first_versions(values)


def is_of_first_versions(values: Mapping[str, Any]) -> bool:
    """Whether a file has the margin itself, which is a discount factor in those of other trainers."""
    others = trl.is_surely_cpo(values) or trl.names_another_trainer(values) or values.get("lam") is not None
    return all(values.get(key) is not None for key in ("gamma", "beta")) and not others


def convert_simpo(source: Source, rows: int | None, drop_reference: bool) -> Conversion:
    """Convert a SimPOConfig of the repository princeton-nlp/SimPO.

    Raises:
        ConfigError: it is of another trainer, or its loss is hinge, for which there is no counterpart.
    """
    conversion = Conversion("SimPO")
    trl.refuse_other_trainers(source)
    trl.convert_scripts(source, conversion, rows)
    _convert_loss(source, conversion)
    conversion.put("max_seq_length", source.count("max_length", 512), source.gives("max_length"))
    convert_training_arguments(
        source,
        conversion,
        rows,
        learning_rate=5e-5,
        logging_steps=500,
        grad_checkpoint=source.flag("gradient_checkpointing"),
        gives_checkpointing=source.gives("gradient_checkpointing"),
    )
    trl.convert_output(source, conversion)
    return conversion


def _convert_loss(source: Source, conversion: Conversion) -> None:
    """Write simpo: the margin, which stands inside beta there, and the likelihood term under another name."""
    if source.raw("loss_type", "sigmoid") not in ("sigmoid", "simpo"):
        raise source.refuse("loss_type", "only sigmoid, there the loss of the paper, can be converted")
    beta, ratio = source.number("beta", 2.0), source.number("gamma_beta_ratio", 0.25)
    gamma = source.number("gamma")  # in its first versions, without beta in it
    if gamma is None or source.gives("gamma_beta_ratio"):
        gamma = beta * ratio
        conversion.tell(f"gamma_beta_ratio {ratio:g} times beta {beta:g} is simpo_gamma {gamma:g}.")
    theirs = {"beta": "beta", "gamma_beta_ratio": "simpo_gamma", "gamma": "simpo_gamma", "sft_weight": "cpo_alpha"}
    given = ["dpo_cpo_loss_type", *(ours for key, ours in theirs.items() if source.gives(key))]
    given += ["label_smoothing"] if source.gives("label_smoothing") else []
    put_loss(
        conversion,
        "simpo",
        beta,
        given,
        cpo_alpha=source.number("sft_weight", 0.0),
        simpo_gamma=gamma,
        label_smoothing=source.number("label_smoothing", 0.0),
    )
