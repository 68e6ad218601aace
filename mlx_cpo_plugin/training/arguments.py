"""The settings of a training run, as callers of :func:`mlx_cpo_plugin.training.trainer.train_cpo` give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import SFTTrainingArgs
from mlx_cpo_plugin.settings.cpo_options import MEASURES, SCORING
from mlx_cpo_plugin.settings.quantisation import AUTO, HOST, MLX, MODES, check_quantizer

DEFAULT_SEQ_STEP_SIZE = 512


@dataclass
class CPOTrainingArgs(SFTTrainingArgs):
    """The settings of :func:`train_cpo`: those of the host's SFT training, and CPO's own."""

    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss, e.g. sigmoid, hinge, ipo or dpop."})
    beta: float = field(default=0.1, metadata={"help": "Temperature inside the loss."})
    delta: float = field(default=50.0, metadata={"help": "Coefficient of the drift penalty of dpop."})
    cpo_alpha: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of the chosen answers."}
    )
    reference_model_path: str | None = field(default=None, metadata={"help": "Not used: CPO has no reference model."})
    loss_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the loss beside beta and delta, e.g. simpo_gamma or label_smoothing."},
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of the pairs; by default that which the caller has set."}
    )
    scoring: str = field(
        default="auto", metadata={"help": "Share the prompt of a pair's answers (shared), or not (plain); auto tries."}
    )
    qat_quantizer: str = field(
        default=AUTO, metadata={"help": "Quantiser that QAT trains for: mlx's own, the host's, or auto."}
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that the pairs of a batch have at most, instead of batch_size."},
    )
    max_grad_norm: float | None = field(default=None, metadata={"help": "Scale gradients down to this norm."})
    resume: str | None = field(
        default=None, metadata={"help": "Go on from the last whole checkpoint: 'auto', or a folder."}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    save_best: str | None = field(
        default=None, metadata={"help": "Keep the best validated adapter by margin, accuracy or loss."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many validations in a row without a better one."}
    )
    run_settings: dict[str, Any] | None = field(
        default=None, metadata={"help": "What is written to run_settings.yaml; by default these arguments."}
    )
    run_identity: RunIdentity | None = field(
        default=None, metadata={"help": "Which run this is, where it was decided before; by default here."}
    )
    compile: bool | None = field(default=None, metadata={"help": "Compile the step; by default on a GPU only."})

    @classmethod
    def from_settings(cls, settings: Any, adapter_file: Path) -> CPOTrainingArgs:
        """Take the arguments from a namespace of resolved settings, named as in YAML."""
        step_size = settings.seq_step_size or DEFAULT_SEQ_STEP_SIZE
        return cls(
            loss_type=settings.dpo_cpo_loss_type,
            beta=settings.beta,
            delta=settings.delta,
            cpo_alpha=settings.cpo_alpha,
            loss_options=dict(settings.loss_options),
            batch_size=settings.batch_size,
            iters=settings.iters,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            val_batches=settings.val_batches,
            steps_per_report=settings.steps_per_report,
            steps_per_eval=settings.steps_per_eval,
            steps_per_save=settings.save_every,
            max_seq_length=settings.max_seq_length,
            adapter_file=str(adapter_file),
            grad_checkpoint=settings.grad_checkpoint,
            seq_step_size=step_size if settings.efficient_long_context else None,
            recurrence_chunk_size=settings.recurrence_chunk_size,
            qat_enable=settings.qat_enable,
            qat_bits=settings.qat_bits,
            qat_group_size=settings.qat_group_size,
            qat_mode=settings.qat_mode,
            qat_quantizer=settings.qat_quantizer,
            qat_start_step=settings.qat_start_step,
            qat_interval=settings.qat_interval,
            seed=settings.seed,
            scoring=settings.scoring,
            batch_tokens=settings.batch_tokens,
            max_grad_norm=settings.max_grad_norm,
            resume=settings.resume,
            keep_checkpoints=settings.keep_checkpoints,
            save_best=settings.save_best,
            early_stopping_patience=settings.early_stopping_patience,
            run_identity=getattr(settings, "run_identity", None),
        )

    def loss_settings(self) -> Mapping[str, Any]:
        """Return the values of the losses' options by name."""
        return {"beta": self.beta, "delta": self.delta, **self.loss_options}


def check_training_args(args: CPOTrainingArgs) -> None:
    """Check what a direct caller gave; runs that come from YAML were checked with file and line before.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    rules: list[tuple[str, bool, str]] = [
        (name, getattr(args, name) >= 1, "at least 1")
        for name in (
            "batch_size",
            "iters",
            "gradient_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "steps_per_save",
            "qat_start_step",
            "qat_interval",
            "keep_checkpoints",
        )
    ]
    rules.append(("beta", args.beta > 0, "above 0"))
    rules.append(("delta", args.delta >= 0, "at least 0"))
    rules.append(("cpo_alpha", args.cpo_alpha >= 0, "at least 0"))
    rules.append(("qat_bits", 2 <= args.qat_bits <= 16, "from 2 to 16"))
    rules.append(("val_batches", args.val_batches >= -1, "at least 0, or -1 for all"))
    rules.append(("max_seq_length", args.max_seq_length >= 4, "at least 4"))
    rules.append(("batch_tokens", args.batch_tokens is None or args.batch_tokens >= 1, "at least 1, or None"))
    patience, best = args.early_stopping_patience, args.save_best
    rules.append(("max_grad_norm", args.max_grad_norm is None or args.max_grad_norm > 0, "above 0, or None"))
    rules.append(("early_stopping_patience", patience is None or patience >= 1, "at least 1, or None"))
    rules.append(("save_best", best is None or best in MEASURES, f"one of {', '.join(MEASURES)}, or None"))
    rules.append(("scoring", args.scoring in SCORING.choices, SCORING.allowed()))
    rules.append(("qat_mode", args.qat_mode in MODES, f"one of {', '.join(MODES)}"))
    rules.append(("qat_quantizer", args.qat_quantizer in (AUTO, MLX, HOST), f"one of {AUTO}, {MLX}, {HOST}"))
    for name, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"{name} is {getattr(args, name)!r}, but must be {allowed}.")
    if args.qat_enable:
        check_quantizer(args.qat_quantizer, args.qat_bits, args.qat_group_size, args.qat_mode)
