"""The settings of a training run, as callers of :func:`mlx_cpo_plugin.training.trainer.train_cpo` give them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.optimizers as optimizers

from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.host import SFTTrainingArgs
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings.command_line import IN_THE_CALL
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.cpo_options import CPO_OPTIONS, LOSS_OPTION
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS, check_quantizer
from mlx_cpo_plugin.settings.run_settings import plain_settings
from mlx_cpo_plugin.settings.validation import check, not_read, refused, unknown
from mlx_cpo_plugin.types import Option, Values

# Arguments that mlx-lm-lora and its callers call otherwise than YAML files do.
_YAML_NAMES = {"loss_type": LOSS_OPTION, "steps_per_save": "save_every"}
_OPTIONS = {option.name: option for option in (*COMMON_OPTIONS, *CPO_OPTIONS)}


def option_of(argument: str) -> Option | None:
    """Return the option that an argument of :class:`CPOTrainingArgs` is; None for one that only a call has."""
    return _OPTIONS.get(_YAML_NAMES.get(argument, argument))


def _option(name: str) -> Any:
    """Return a dataclass field with the default and the help of an option."""
    return field(default=_OPTIONS[name].default, metadata={"help": _OPTIONS[name].help})


@dataclass
class CPOTrainingArgs(SFTTrainingArgs):
    """The settings of :func:`train_cpo`: those of the host's SFT training, and CPO's own."""

    loss_type: str = _option(LOSS_OPTION)
    beta: float = _option("beta")
    delta: float = _option("delta")
    cpo_alpha: float = _option("cpo_alpha")
    reference_model_path: str | None = _option("reference_model_path")
    loss_options: Values = field(
        default_factory=dict,
        metadata={"help": "Options of the loss beside beta and delta, e.g. simpo_gamma or label_smoothing."},
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of the pairs; by default that which the caller has set."}
    )
    scoring: str = _option("scoring")
    pass_overhead: int | None = _option("pass_overhead")
    qat_quantizer: str = _option("qat_quantizer")
    batch_tokens: int | None = _option("batch_tokens")
    max_grad_norm: float | None = _option("max_grad_norm")
    resume: str | None = _option("resume")
    keep_checkpoints: int = _option("keep_checkpoints")
    save_best: str | None = _option("save_best")
    load_best: bool = _option("load_best")
    sample_prompts: list[str | Values] | None = _option("sample_prompts")
    steps_per_sample: int | None = _option("steps_per_sample")
    early_stopping_patience: int | None = _option("early_stopping_patience")
    eval_per_epoch: bool = _option("eval_per_epoch")
    save_per_epoch: bool = _option("save_per_epoch")
    run_settings: Values | None = field(
        default=None, metadata={"help": "What is written to run_settings.yaml; by default these arguments."}
    )
    run_identity: RunIdentity | None = field(
        default=None, metadata={"help": "Which run this is, where it was decided before; by default here."}
    )
    compile: bool | None = field(default=None, metadata={"help": "Compile the step; by default on Metal only."})

    @classmethod
    def from_settings(cls, settings: RunSettings, adapter_file: Path) -> CPOTrainingArgs:
        """Return the arguments that the resolved settings of a run are."""
        values = {own.name: getattr(settings, option.name) for own in fields(cls) if (option := option_of(own.name))}
        values["seq_step_size"] = settings.step_size
        return cls(
            **values,
            adapter_file=str(adapter_file),
            loss_options=dict(settings.loss_options),
            run_identity=getattr(settings, "run_identity", None),  # a check or a comparison is no run
        )

    def loss_settings(self) -> Values:
        """Return the values of the losses' options by name."""
        return {"beta": self.beta, "delta": self.delta, **self.loss_options}

    def as_settings(self, optimizer: optimizers.Optimizer, adapter: Values) -> Values:
        """Return the settings of a run that was started by a call, by YAML key, as far as the trainer knows them.

        Args:
            adapter: see :func:`mlx_cpo_plugin.checkpoints.adapter.describe_adapter`.
        """
        values = {option.name: getattr(self, own.name) for own in fields(self) if (option := option_of(own.name))}
        return plain_settings(
            {
                "train_mode": "cpo",
                "train_type": adapter["fine_tune_type"],
                "num_layers": adapter["num_layers"],
                "lora_parameters": adapter["lora_parameters"],
                "optimizer": type(optimizer).__name__.lower(),
                "learning_rate": float(f"{float(optimizer.learning_rate):.7g}"),  # the optimizer's is a float32
                **values,
                "efficient_long_context": self.seq_step_size is not None,
                **self.loss_options,
                "adapter_path": os.path.abspath(Path(self.adapter_file).parent),
            }
        )


FREE_TO_CHANGE = frozenset(
    own.name
    for own in fields(CPOTrainingArgs)
    if ((option := option_of(own.name)) is not None and option.free_on_resume)
    # loss_options are compared one by one
    or own.name in ("adapter_file", "loss_options", "run_settings", "run_identity")
)
"""The arguments that a resumed run may change: none of them has a part in the trained weights."""


def check_training_args(args: CPOTrainingArgs) -> None:
    """Check what a direct caller gave; runs that come from YAML were checked with file and line before.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    for own in fields(args):
        option, value = option_of(own.name), getattr(args, own.name)
        if option is None or option.type is bool or (value is None and own.default is None):
            continue
        check(replace(option, optional=False, spelled=None), value, lambda key: IN_THE_CALL, own.name)
    check_loss_options(args.loss_type, args.loss_options)
    if args.qat_enable:
        check_quantizer(args.qat_quantizer, args.qat_bits, args.qat_group_size, args.qat_mode, lambda key: IN_THE_CALL)


def check_loss_options(loss_type: str, given: Mapping[str, object]) -> None:
    """Refuse options that no loss has, or that this one does not use, unless they have their default.

    Raises:
        ConfigError: names the option, and what is known or uses it.
    """
    if not isinstance(given, Mapping):
        raise refused("loss_options", given, IN_THE_CALL, "a mapping from names to values")
    losses = loss_types()
    if loss_type not in losses:  # which is told by itself
        return
    loss = losses[loss_type]
    defaults = {option.name: option.default for other in losses.values() for option in other.options}
    for name, value in given.items():
        if name not in defaults:
            raise unknown("loss option", name, defaults, IN_THE_CALL)
        if not loss.reads(name) and value != defaults[name]:
            raise not_read(name, value, IN_THE_CALL, loss, losses.values())
