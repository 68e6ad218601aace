"""The options that all train modes share; each field states type, default, range and help once.

Defaults are mlx-lm-lora's. An option that mlx-lm-lora lacks defaults to mlx-lm-lora's behaviour.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from mlx_cpo_plugin.settings import nested
from mlx_cpo_plugin.settings.validation import Place, refused
from mlx_cpo_plugin.types import Option, Values

AUTO, MLX, HOST = "auto", "mlx", "host"

# Tokens in a segment of a long sequence.
DEFAULT_SEQ_STEP_SIZE = 512

# What MLX's quantiser takes.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Mode of mx.quantize -> its fixed bits and group size.
MODES: dict[str, dict[str, int]] = {
    "affine": {},
    "mxfp4": {"group_size": 32, "bits": 4},
    "nvfp4": {"group_size": 16, "bits": 4},
    "mxfp8": {"group_size": 32, "bits": 8},
}


LOSS, MODEL, DATA, TRAINING = "preference loss", "model and adapter", "data", "training"
MEMORY, REPORTS, SAVING = "memory and speed", "validation, test and reports", "saving and resuming"
QAT = "quantisation-aware training (QAT)"
GROUPS = (LOSS, MODEL, DATA, TRAINING, MEMORY, REPORTS, SAVING, QAT)
"""Headings of the help, in its order."""


def option(default: object, help: str, **limits: object) -> Any:
    """Return a dataclass field that describes an option; its annotation is the type, ``| None`` makes it optional."""
    return field(default_factory=lambda: deepcopy(default), metadata={"default": default, "help": help, **limits})


def options_of(settings: type, group: str = "") -> tuple[Option, ...]:
    """Return the fields of a dataclass as options; ``group`` is that of those that state none."""
    options = []
    hints = get_type_hints(settings)
    for own in fields(settings):
        hint = hints[own.name]
        optional = NoneType in get_args(hint)
        kind = get_args(hint)[0] if optional or "listed" in own.metadata else hint
        options.append(
            Option(own.name, get_origin(kind) or kind, optional=optional, **{"group": group, **own.metadata})
        )
    return tuple(options)


@dataclass
class ModelSettings:
    """The model, and which of its weights are trained."""

    model: str = option(
        "mlx_model", "Local model folder or Hugging Face repository to fine-tune.", inside=nested.home_expanded
    )
    load_in_4bits: bool = option(False, "Quantise the base model to 4 bits while loading.", title="Load in 4 bits")
    load_in_6bits: bool = option(False, "Quantise the base model to 6 bits while loading.", title="Load in 6 bits")
    load_in_8bits: bool = option(False, "Quantise the base model to 8 bits while loading.", title="Load in 8 bits")
    load_in_mxfp4: bool = option(False, "Quantise the base model to MXFP4 while loading.")
    train_type: str = option(
        "lora",
        "Which weights are trained: LoRA or DoRA adapters, or the full layers.",
        choices=("lora", "dora", "full"),
    )
    num_layers: int = option(
        -1,
        "Number of layers to fine-tune, counted from the last; -1 means all.",
        minimum=-1,
        inside=nested.number_of_layers,
    )
    lora_parameters: Values = option(
        {own.name: own.default for own in nested.LORA_PARAMETERS if not own.optional},
        "Rank, dropout and scale of the adapters, and keys, the modules that get one; the rest keeps its default.",
        shown_when={"train_type": ("lora", "dora")},
        inside=nested.lora_parameters,
    )


@dataclass
class DataSettings:
    """The rows, and which of their columns are read."""

    data: str | list[Values] = option(
        "data/",
        "Folder with train, valid and test files, one file, or a Hugging Face dataset name; or a list of such, each a "
        "mapping with path and weight.",
        inside=nested.home_expanded,
        listed=nested.sets_of_rows,
    )
    hf_dataset: list[Values] | None = option(
        None,
        "One or more Hugging Face datasets, each a mapping with path, splits and columns.",
        title="Hugging Face datasets",
        inside=nested.hf_dataset,
    )
    valid_fraction: float = option(
        0.0, "Share of the training rows to validate on when there is no valid set.", minimum=0, below=1
    )
    chosen_feature: str = option("auto", "Column of the preferred answer; auto finds the usual names.", title="Chosen")
    rejected_feature: str = option("auto", "Column of the other answer; auto finds the usual names.", title="Rejected")
    prompt_feature: str = option("auto", "Column of the prompt, if there is one; auto finds it.", title="Prompt")
    system_feature: str = option(
        "auto", "Column of the system message, if there is one; auto finds it.", title="System"
    )
    completion_pairs: str = option(
        "best_worst",
        "Pairs of a row with several completions: the best against the worst, or each against every worse one (all).",
        choices=("best_worst", "all"),
    )
    min_gap: float | None = option(
        None,
        "Leave out pairs whose scores differ by less; rows have them as score_chosen and score_rejected, or as scores "
        "or ranks of completions.",
        title="Minimal gap",
        minimum=0,
    )
    max_seq_length: int = option(
        2048, "Longest sequence in tokens, prompt and answer together.", minimum=4, free_on_resume=True
    )


@dataclass
class TrainingSettings:
    """What training, validation and the final test do."""

    train: bool = option(False, "Train the model.")
    test: bool = option(False, "Evaluate on the test set, after training if both are asked for.", group=REPORTS)
    optimizer: str = option("adam", "Optimizer.", choices=tuple(nested.OPTIMIZERS))
    optimizer_config: Values = option(
        {name: {} for name in nested.OPTIMIZERS},
        "Further arguments of each optimizer, by the optimizer's name.",
        inside=nested.optimizer_config,
    )
    learning_rate: float = option(1e-5, "Learning rate; a schedule takes its place.", above=0)
    lr_schedule: Values | None = option(
        None,
        "Learning-rate schedule: linear, cosine or constant over the run, or name and arguments of one of MLX's, "
        "optionally warmup and warmup_init.",
        title="Learning-rate schedule",
        spelled=nested.named_schedule,
        inside=nested.lr_schedule,
    )
    warmup_ratio: float = option(0.0, "Share of the run in which the learning rate rises from 0.", minimum=0, below=1)
    batch_size: int = option(1, "Pairs in a micro-batch.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches whose gradients make up one optimizer step.", minimum=1)
    iters: int | None = option(
        None, "Iterations to train for, each of one micro-batch.", title="Iterations", minimum=1, free_on_resume=True
    )
    epochs: int | None = option(None, "Passes over the training set, unless iters is set.", minimum=1)
    steps_per_report: int = option(
        10, "Iterations between two reports of the training loss.", minimum=1, free_on_resume=True, group=REPORTS
    )
    steps_per_eval: int = option(
        200, "Iterations between two validations.", minimum=1, free_on_resume=True, group=REPORTS
    )
    val_batches: int = option(
        25, "Batches of a validation; -1 means the whole set, 0 none.", minimum=-1, free_on_resume=True, group=REPORTS
    )
    test_batches: int = option(
        500,
        "Batches of the final test; -1 means the whole set.",
        minimum=-1,
        inside=nested.count_or_all,
        shown_when={"test": (True,)},
        group=REPORTS,
    )
    seed: int = option(0, "Seed of the adapters, the order of the pairs and dropout.", minimum=0, maximum=2**32 - 1)
    grad_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.", group=MEMORY)
    efficient_long_context: bool = option(False, "Process long sequences in chunks to save memory.", group=MEMORY)
    seq_step_size: int | None = option(
        None,
        f"Tokens in a chunk of a long sequence; {DEFAULT_SEQ_STEP_SIZE} when left out.",
        title="Sequence step size",
        minimum=2,
        shown_when={"efficient_long_context": (True,)},
        group=MEMORY,
    )
    recurrence_chunk_size: int = option(64, "Tokens that a recurrent layer processes at once.", minimum=1, group=MEMORY)

    @property
    def step_size(self) -> int | None:
        """Tokens of a segment of a long pair; ``None``: no pair is split."""
        return (self.seq_step_size or DEFAULT_SEQ_STEP_SIZE) if self.efficient_long_context else None


@dataclass
class OutputSettings:
    """What a run writes, and whom it reports to."""

    adapter_path: str = option(
        "adapters", "Folder for adapters, metrics and the fused model.", inside=nested.home_expanded
    )
    resume_adapter_file: str | None = option(
        None, "Adapter file to start from.", title="Resume from adapter file", inside=nested.home_expanded
    )
    save_every: int = option(100, "Iterations between two saved adapters.", minimum=1, free_on_resume=True)
    fuse: bool = option(True, "Merge the adapters into the model after training and save it.")
    fuse_bits: int | None = option(
        None,
        "Bits of the fused model, 16 for none; by default those of a base that is quantised on disk, where they keep "
        "what was learned, else none.",
        choices=(*BITS, 16),
        shown_when={"fuse": (True,)},
    )
    push_to_hub: str | None = option(
        None,
        "Repository on the Hugging Face hub that gets the adapter when the run is complete: name or account/name.",
        inside=nested.repository,
    )
    hub_private_repo: bool = option(True, "Keep the repository of push_to_hub private.", title="Private repository")
    lm_studio_name: str | None = option(
        None,
        "Name under which LM Studio gets the model.",
        title="LM Studio name",
        inside=nested.folder_name,
        shown_when={"fuse": (True,)},
    )
    wandb: str | None = option(
        None, "Weights & Biases project to report to.", title="Weights & Biases project", group=REPORTS
    )
    report_to: list[str] | None = option(
        None,
        "Trackers that get the metrics under TRL's names: wandb, tensorboard, trackio, swanlab, or none.",
        inside=nested.report_to,
        group=REPORTS,
    )
    project: str | None = option(
        None, "Project in the trackers of report_to; by default that of wandb, or else mlx-cpo.", group=REPORTS
    )
    run_name: str | None = option(
        None,
        "Name of the run in the trackers of report_to; by default that of the adapter folder.",
        inside=nested.folder_name,
        group=REPORTS,
    )


_IF_QAT = {"qat_enable": (True,)}


@dataclass
class QatSettings:
    """Quantisation-aware training."""

    qat_enable: bool = option(False, "Train the model to be deployed quantised.", title="QAT")
    qat_bits: int = option(8, "Bits of the fake quantisation.", minimum=2, maximum=16, shown_when=_IF_QAT)
    qat_group_size: int = option(
        64, "Weights that share one scale; 0 or less means the whole tensor.", shown_when=_IF_QAT
    )
    qat_mode: str = option(
        "affine",
        "Mode of MLX's quantisation; all but affine have fixed bits and group size.",
        choices=tuple(MODES),
        shown_when=_IF_QAT,
    )
    qat_quantizer: str = option(
        AUTO,
        "Whose quantisation to train for: MLX's (mlx) or mlx-lm-lora's symmetric one (host); auto takes MLX's where it "
        "has the bits and group size.",
        choices=(AUTO, MLX, HOST),
        shown_when=_IF_QAT,
    )
    qat_start_step: int = option(1, "First optimizer step with fake quantisation.", minimum=1, shown_when=_IF_QAT)
    qat_interval: int = option(1, "Apply fake quantisation every N optimizer steps.", minimum=1, shown_when=_IF_QAT)


MODEL_OPTIONS, DATA_OPTIONS, TRAINING_OPTIONS, OUTPUT_OPTIONS, QAT_OPTIONS = (
    options_of(settings, group)
    for settings, group in (
        (ModelSettings, MODEL),
        (DataSettings, DATA),
        (TrainingSettings, TRAINING),
        (OutputSettings, SAVING),
        (QatSettings, QAT),
    )
)
COMMON_OPTIONS: tuple[Option, ...] = MODEL_OPTIONS + DATA_OPTIONS + TRAINING_OPTIONS + OUTPUT_OPTIONS + QAT_OPTIONS

PRECISIONS = ("load_in_4bits", "load_in_6bits", "load_in_8bits", "load_in_mxfp4")

UNCHECKED_KEYS = (
    *("train_mode", "config", "text_feature", "chat_feature", "completion_feature", "answer_feature", "type_feature"),
    *("preference_score_feature", "end_answer_token", "top_p", "top_k", "min_p"),
)
"""Keys that mlx-lm-lora reads from YAML for other train modes without listing them among its defaults."""


def mlx_quantises(bits: int, group_size: int, mode: str = "affine") -> bool:
    """Whether ``mx.quantize`` supports this combination."""
    return mode != "affine" or (bits in BITS and group_size in GROUP_SIZES)


def check_quantizer(quantizer: str, bits: int, group_size: int, mode: str, place: Place) -> None:
    """Raise ``ConfigError`` for a combination that the quantiser of ``qat_quantizer`` does not support."""
    if quantizer == MLX and mode == "affine":
        for key, value, supported in (("qat_bits", bits, BITS), ("qat_group_size", group_size, GROUP_SIZES)):
            if value not in supported:
                listed = ", ".join(map(str, supported))
                raise refused(key, value, place(key), f"one of {listed} with qat_quantizer: mlx")
    if quantizer == HOST and mode != "affine":
        raise refused("qat_mode", mode, place("qat_mode"), "affine with qat_quantizer: host")
