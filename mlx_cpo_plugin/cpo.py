"""The built-in plugin: the ``cpo`` train mode, its options and its losses, through the public hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cpo_plugin.hookspecs import hookimpl
from mlx_cpo_plugin.settings.presets import PRESETS
from mlx_cpo_plugin.training.best import MEASURES
from mlx_cpo_plugin.types import LossType, Option, TrainMode

if TYPE_CHECKING:
    from mlx_cpo_plugin.data import PreferenceDataset

LOSS_OPTION = "dpo_cpo_loss_type"

BETA = Option(
    "beta", float, 0.1, "Temperature inside the loss; start lower than with DPO, e.g. 0.05.", title="Beta", above=0
)
DELTA = Option(
    "delta",
    float,
    50.0,
    "Coefficient of the drift penalty; only used with dpop.",
    title="Delta",
    minimum=0,
    shown_when={LOSS_OPTION: ("dpop",)},
)
LABEL_SMOOTHING = Option(
    "label_smoothing",
    float,
    0.0,
    "Probability with which chosen and rejected are taken to be the wrong way round.",
    title="Label smoothing",
    minimum=0,
    below=0.5,
    shown_when={LOSS_OPTION: ("sigmoid", "simpo", "alphapo")},
)
SIMPO_GAMMA = Option(
    "simpo_gamma",
    float,
    0.5,
    "Margin that SimPO and AlphaPO want between the rewards of the two answers.",
    title="SimPO gamma",
    minimum=0,
    shown_when={LOSS_OPTION: ("simpo", "alphapo")},
)
ALPHAPO_ALPHA = Option(
    "alphapo_alpha",
    float,
    0.25,
    "Shape of AlphaPO's rewards (1 - p ** -alphapo_alpha) / alphapo_alpha; 0 makes it SimPO.",
    title="AlphaPO alpha",
    shown_when={LOSS_OPTION: ("alphapo",)},
)
CPO_ALPHA = Option(
    "cpo_alpha",
    float,
    0.0,
    "Weight of the negative log-likelihood of the chosen answers, added to any loss; the CPO paper's is 1.",
    title="CPO alpha",
    minimum=0,
)
PRESET = Option(
    "preset",
    str,
    None,
    "Fill the loss and its options with published values; options set besides win.",
    title="Preset",
    choices=tuple(preset.name for preset in PRESETS),
    optional=True,
)
LOSS = Option(LOSS_OPTION, str, "sigmoid", "Preference loss.", title="Loss")
REFERENCE = Option(
    "reference_model_path", str, None, "Not used: CPO needs no reference model.", title="Reference model", optional=True
)
SCORING = Option(
    "scoring",
    str,
    "auto",
    "Compute a prompt once for both answers (shared) or for each (plain); auto tries whether the model allows it.",
    title="Scoring",
    choices=("auto", "shared", "plain"),
)
BATCH_TOKENS = Option(
    "batch_tokens",
    int,
    None,
    "Tokens, of prompt and both answers, that the pairs of a batch have together at most, instead of batch_size pairs.",
    title="Batch tokens",
    minimum=1,
    optional=True,
)
RESUME = Option(
    "resume",
    str,
    None,
    "Go on from the last whole checkpoint: 'auto' for that of adapter_path, or a folder.",
    title="Resume",
    optional=True,
)
KEEP_CHECKPOINTS = Option(
    "keep_checkpoints",
    int,
    2,
    "How many checkpoints to keep; each holds what resuming needs.",
    title="Checkpoints",
    minimum=1,
)
SAVE_BEST = Option(
    "save_best",
    str,
    None,
    "Keep the adapter of the best validation, too, by margin, accuracy or loss.",
    title="Save best",
    choices=tuple(MEASURES),
    optional=True,
)
EARLY_STOPPING_PATIENCE = Option(
    "early_stopping_patience",
    int,
    None,
    "Stop after so many validations in a row without a better one, by save_best or else by loss.",
    title="Early stopping patience",
    minimum=1,
    optional=True,
)
MAX_GRAD_NORM = Option(
    "max_grad_norm",
    float,
    None,
    "Scale gradients down to this norm.",
    title="Maximal gradient norm",
    above=0,
    optional=True,
)

OVERLONG = Option(
    "overlong",
    str,
    "cut",
    "What becomes of rows longer than max_seq_length: cut (oldest turns of the prompt first), drop, or error.",
    title="Overlong rows",
    choices=("cut", "drop", "error"),
)
CHAT_TEMPLATE = Option(
    "chat_template",
    str,
    None,
    "Chat template in place of the tokenizer's own: Jinja text, or a file that holds it.",
    title="Chat template",
    optional=True,
)
CHAT_TEMPLATE_KWARGS = Option(
    "chat_template_kwargs",
    dict,
    None,
    "Arguments of the chat template, such as enable_thinking; a row's own go before them.",
    title="Chat template arguments",
    optional=True,
)


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
            options=(
                BETA,
                DELTA,
                LOSS,
                CPO_ALPHA,
                LABEL_SMOOTHING,
                SIMPO_GAMMA,
                ALPHAPO_ALPHA,
                PRESET,
                REFERENCE,
                OVERLONG,
                CHAT_TEMPLATE,
                CHAT_TEMPLATE_KWARGS,
                SCORING,
                BATCH_TOKENS,
                MAX_GRAD_NORM,
                RESUME,
                KEEP_CHECKPOINTS,
                SAVE_BEST,
                EARLY_STOPPING_PATIENCE,
            ),
            loss_option=LOSS_OPTION,
            supports_qat=True,
            presets=PRESETS,
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


def load_dataset(args: Any, tokenizer: Any) -> tuple[PreferenceDataset, PreferenceDataset, PreferenceDataset]:
    """Read and tokenise the preference rows that ``args`` names: train, valid and test."""
    from mlx_cpo_plugin import data

    return data.load_dataset(args, tokenizer)


def train(
    model: Any,
    optimizer: Any,
    train_dataset: Sequence[Any],
    val_dataset: Sequence[Any],
    args: Any,
    adapter_file: Path,
    training_callback: Any = None,
) -> None:
    """Run CPO with the resolved settings ``args``; see :func:`mlx_cpo_plugin.training.trainer.train_cpo`."""
    from mlx_cpo_plugin.settings.run_settings import recorded_settings
    from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

    training_args = CPOTrainingArgs.from_settings(args, adapter_file)
    training_args.run_settings = recorded_settings(args)
    train_cpo(
        model=model,
        optimizer=optimizer,
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        args=training_args,
        training_callback=training_callback,
    )


def evaluate(model: Any, dataset: Sequence[Any], args: Any) -> Mapping[str, float]:
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
    )
    return {"loss": loss, "chosen_reward": rewards[0], "rejected_reward": rewards[1], **means}
