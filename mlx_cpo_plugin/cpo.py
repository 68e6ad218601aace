"""The built-in plugin: the ``cpo`` train mode, its options and its losses, through the public hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.hookspecs import hookimpl
from mlx_cpo_plugin.settings.cpo_options import (
    ALPHAPO_ALPHA,
    BETA,
    CPO_OPTIONS,
    DELTA,
    LABEL_SMOOTHING,
    SIMPO_GAMMA,
)
from mlx_cpo_plugin.types import LossType, Tokenizer, TrainMode

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx.optimizers import Optimizer

    from mlx_cpo_plugin.data import PreferenceDataset
    from mlx_cpo_plugin.host import TrainingCallback
    from mlx_cpo_plugin.settings.config import RunSettings
    from mlx_cpo_plugin.training.arguments import CPOTrainingArgs


@hookimpl
def register_train_modes() -> list[TrainMode]:
    return [
        TrainMode(
            name="cpo",
            title="CPO",
            help="Contrastive Preference Optimisation: DPO without a reference model.",
            load_dataset=load_dataset,
            train=train,
            evaluate=evaluate,
            options=CPO_OPTIONS,
        )
    ]


@hookimpl
def register_loss_types() -> list[LossType]:
    from mlx_cpo_plugin import losses

    return [
        LossType(
            name="sigmoid",
            title="Sigmoid",
            fn=losses.sigmoid_loss,
            formula="-log sigmoid(beta * logits)",
            source="Xu et al. 2024, arXiv 2401.08417",
            options=(BETA, LABEL_SMOOTHING),
        ),
        LossType(
            name="hinge",
            title="Hinge",
            fn=losses.hinge_loss,
            formula="max(0, 1 - beta * logits)",
            source="Zhao et al. 2023, arXiv 2305.10425",
            options=(BETA,),
        ),
        LossType(
            name="ipo",
            title="IPO",
            fn=losses.ipo_loss,
            formula="(logits - 1 / (2 * beta)) ** 2, log-probs averaged over tokens",
            source="Azar et al. 2023, arXiv 2310.12036, eq. 17",
            options=(BETA,),
            length_normalised=True,
        ),
        LossType(
            name="dpop",
            title="DPOP",
            fn=losses.dpop_loss,
            formula="-log sigmoid(beta * logits) + delta * max(0, rejected_logps - chosen_logps)",
            source="Pal et al. 2024, arXiv 2402.13228, without the reference",
            options=(BETA, DELTA),
        ),
        LossType(
            name="simpo",
            title="SimPO",
            fn=losses.simpo_loss,
            formula="-log sigmoid(beta * logits - simpo_gamma), log-probs averaged over tokens",
            source="Meng et al. 2024, arXiv 2405.14734, eq. 6",
            options=(BETA, SIMPO_GAMMA, LABEL_SMOOTHING),
            length_normalised=True,
        ),
        LossType(
            name="alphapo",
            title="AlphaPO",
            fn=losses.alphapo_loss,
            formula="-log sigmoid(beta * (r(chosen_logps) - r(rejected_logps)) - simpo_gamma) with "
            "r(x) = (1 - exp(-alphapo_alpha * x)) / alphapo_alpha, log-probs averaged over tokens",
            source="Gupta et al. 2025, arXiv 2501.03884",
            options=(BETA, SIMPO_GAMMA, ALPHAPO_ALPHA, LABEL_SMOOTHING),
            length_normalised=True,
            rewards=losses.alphapo_rewards,
        ),
    ]


def load_dataset(
    args: RunSettings, tokenizer: Tokenizer
) -> tuple[PreferenceDataset, PreferenceDataset, PreferenceDataset]:
    """Read and tokenise the preference rows that ``args`` names: train, valid and test."""
    from mlx_cpo_plugin import data
    from mlx_cpo_plugin.data.sample_prompts import own_prompts

    train_set, valid_set, test_set = data.load_dataset(args, tokenizer)
    if args.sample_prompts and valid_set.chat_tokenizer is not None:
        # What cannot be asked is refused here.
        own_prompts(args.sample_prompts, valid_set.chat_tokenizer, args.max_seq_length)
    return train_set, valid_set, test_set


def train(
    model: nn.Module,
    optimizer: Optimizer,
    train_dataset: Sequence[object],
    val_dataset: Sequence[object],
    args: RunSettings,
    adapter_file: Path,
    training_callback: TrainingCallback | None = None,
) -> None:
    """Run CPO with the resolved settings ``args``; see :func:`mlx_cpo_plugin.training.trainer.train_cpo`."""
    from mlx_cpo_plugin.training.trainer import train_cpo

    train_cpo(
        model=model,
        optimizer=optimizer,
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        args=arguments(args, adapter_file),
        training_callback=training_callback,
    )


def arguments(settings: RunSettings, adapter_file: Path) -> CPOTrainingArgs:
    """Return what the trainer is called with in a run of these settings."""
    from mlx_cpo_plugin.checkpoints.run_folder import once_begun
    from mlx_cpo_plugin.settings.run_settings import read_run_settings, recorded_settings
    from mlx_cpo_plugin.training.arguments import CPOTrainingArgs

    training_args = CPOTrainingArgs.from_settings(settings, adapter_file)
    training_args.run_settings = recorded_settings(settings)
    key, folder, run = "resume_adapter_file", adapter_file.parent, training_args.run_identity
    origin = training_args.run_settings.get(key)
    if origin is not None and run is not None:
        began_with = None
        with suppress(UserError):  # a damaged file stops no run
            began_with = read_run_settings(folder)[0].get(key)
        training_args.run_settings[key] = once_begun(origin, folder, run, began_with)
    return training_args


def evaluate(model: nn.Module, dataset: Sequence[object], args: RunSettings) -> Mapping[str, float]:
    """Return loss, accuracies, margins and the other means over the pairs of ``dataset``."""
    from mlx_cpo_plugin.training.trainer import evaluate_cpo

    loss, rewards, _, means = evaluate_cpo(
        model=model,
        dataset=dataset,
        batch_size=args.batch_size,
        num_batches=args.test_batches,
        beta=args.beta,
        delta=args.delta,
        max_seq_length=args.max_seq_length,
        loss_type=args.dpo_cpo_loss_type,
        loss_options=args.loss_options,
        cpo_alpha=args.cpo_alpha,
        scoring=args.scoring,
        seq_step_size=args.step_size,
    )
    return {"loss": loss, "chosen_reward": rewards[0], "rejected_reward": rewards[1], **means}
