"""The settings that every train mode shares, as data: types, ranges, defaults and help.

The defaults are mlx-lm-lora's own; settings that mlx-lm-lora does not have default to its behaviour without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_cpo_plugin.settings.quantisation import AUTO, BITS, HOST, MLX, MODES
from mlx_cpo_plugin.types import Option

MODEL_OPTIONS: tuple[Option, ...] = (
    Option("model", str, "mlx_model", "Local model folder or Hugging Face repository to fine-tune."),
    Option("load_in_4bits", bool, False, "Quantise the base model to 4 bits while loading.", title="Load in 4 bits"),
    Option("load_in_6bits", bool, False, "Quantise the base model to 6 bits while loading.", title="Load in 6 bits"),
    Option("load_in_8bits", bool, False, "Quantise the base model to 8 bits while loading.", title="Load in 8 bits"),
    Option("load_in_mxfp4", bool, False, "Quantise the base model to MXFP4 while loading.", title="Load in MXFP4"),
    Option(
        "train_type",
        str,
        "lora",
        "Which weights are trained: LoRA or DoRA adapters, or the full layers.",
        choices=("lora", "dora", "full"),
    ),
    Option("num_layers", int, -1, "Number of layers to fine-tune, counted from the last; -1 means all.", minimum=-1),
    Option(
        "lora_parameters",
        dict,
        {"rank": 8, "dropout": 0.0, "scale": 10.0},
        "Rank, dropout and scale of the adapters; what is left out keeps its default.",
        title="LoRA parameters",
        shown_when={"train_type": ("lora", "dora")},
    ),
)

LORA_PARAMETERS: tuple[Option, ...] = (
    Option("rank", int, 8, "Rank of the adapter matrices.", minimum=1),
    Option("dropout", float, 0.0, "Probability with which an adapter input is dropped in training.", minimum=0),
    Option("scale", float, 10.0, "Factor on the adapter's output.", above=0),
)

DATA_OPTIONS: tuple[Option, ...] = (
    Option("data", str, "data/", "Folder with train, valid and test files, one file, or a Hugging Face dataset name."),
    Option(
        "hf_dataset",
        list,
        None,
        "One or more Hugging Face datasets, each a mapping with path, splits and columns.",
        title="Hugging Face datasets",
        optional=True,
    ),
    Option(
        "valid_fraction", float, 0.0, "Share of the training rows to validate on when there is no valid set.", minimum=0
    ),
    Option(
        "chosen_feature", str, "auto", "Column of the preferred answer; auto finds the usual names.", title="Chosen"
    ),
    Option(
        "rejected_feature", str, "auto", "Column of the other answer; auto finds the usual names.", title="Rejected"
    ),
    Option("prompt_feature", str, "auto", "Column of the prompt, if there is one; auto finds it.", title="Prompt"),
    Option(
        "system_feature", str, "auto", "Column of the system message, if there is one; auto finds it.", title="System"
    ),
    Option("max_seq_length", int, 2048, "Longest sequence in tokens, prompt and answer together.", minimum=4),
)

TRAINING_OPTIONS: tuple[Option, ...] = (
    Option("train", bool, False, "Train the model."),
    Option("test", bool, False, "Evaluate on the test set, after training if both are asked for."),
    Option("optimizer", str, "adam", "Optimizer.", choices=("adam", "adamw", "muon")),
    Option(
        "optimizer_config",
        dict,
        {"adam": {}, "adamw": {}, "muon": {}},
        "Further arguments of each optimizer, by the optimizer's name.",
    ),
    Option("learning_rate", float, 1e-5, "Learning rate; a schedule takes its place.", above=0),
    Option(
        "lr_schedule",
        dict,
        None,
        "Learning-rate schedule: name and arguments, optionally warmup and warmup_init.",
        title="Learning-rate schedule",
        optional=True,
    ),
    Option("batch_size", int, 1, "Pairs in a micro-batch.", minimum=1),
    Option(
        "gradient_accumulation_steps", int, 1, "Micro-batches whose gradients make up one optimizer step.", minimum=1
    ),
    Option("iters", int, None, "Micro-batches to train for.", title="Iterations", minimum=1, optional=True),
    Option("epochs", int, None, "Passes over the training set, unless iters is set.", minimum=1, optional=True),
    Option("steps_per_report", int, 10, "Iterations between two reports of the training loss.", minimum=1),
    Option("steps_per_eval", int, 200, "Iterations between two validations.", minimum=1),
    Option("val_batches", int, 25, "Batches of a validation; -1 means the whole set, 0 none.", minimum=-1),
    Option("test_batches", int, 500, "Batches of the final test; -1 means the whole set.", minimum=-1),
    Option("seed", int, 0, "Seed of the adapters, the order of the pairs and dropout.", minimum=0, maximum=2**32 - 1),
    Option("grad_checkpoint", bool, False, "Recompute activations in the backward pass to save memory."),
    Option("efficient_long_context", bool, False, "Work through long sequences in pieces to save memory."),
    Option(
        "seq_step_size",
        int,
        None,
        "Tokens in a piece of a long sequence; 512 when left out.",
        title="Sequence step size",
        minimum=2,
        optional=True,
        shown_when={"efficient_long_context": (True,)},
    ),
    Option("recurrence_chunk_size", int, 64, "Tokens that a recurrent layer works through at once.", minimum=1),
)

OUTPUT_OPTIONS: tuple[Option, ...] = (
    Option("adapter_path", str, "adapters", "Folder for adapters, metrics and the fused model."),
    Option(
        "resume_adapter_file", str, None, "Adapter file to go on from.", title="Resume from adapter file", optional=True
    ),
    Option("save_every", int, 100, "Iterations between two saved adapters.", minimum=1),
    Option("fuse", bool, True, "Merge the adapters into the model after training and save it."),
    Option(
        "fuse_bits",
        int,
        None,
        "Bits of the fused model, 16 for none; by default those of a base that is quantised on disk, where they keep "
        "what was learned, else none.",
        choices=(*BITS, 16),
        optional=True,
    ),
    Option(
        "lm_studio_name", str, None, "Name under which LM Studio gets the model.", title="LM Studio name", optional=True
    ),
    Option(
        "wandb", str, None, "Weights & Biases project to report to.", title="Weights & Biases project", optional=True
    ),
    Option(
        "report_to",
        list,
        None,
        "Trackers that get the metrics under TRL's names: wandb, tensorboard, trackio, swanlab, or none.",
        title="Report to",
        optional=True,
    ),
    Option(
        "project",
        str,
        None,
        "Project in the trackers of report_to; by default that of wandb, or else mlx-cpo.",
        optional=True,
    ),
    Option(
        "run_name",
        str,
        None,
        "Name of the run in the trackers of report_to; by default that of the adapter folder.",
        optional=True,
    ),
)

QAT_OPTIONS: tuple[Option, ...] = (
    Option("qat_enable", bool, False, "Train the model to be deployed quantised.", title="QAT"),
    Option(
        "qat_bits",
        int,
        8,
        "Bits of the fake quantisation.",
        title="QAT bits",
        minimum=2,
        maximum=16,
        shown_when={"qat_enable": (True,)},
    ),
    Option(
        "qat_group_size",
        int,
        64,
        "Weights that share one scale; 0 or less means the whole tensor.",
        title="QAT group size",
        shown_when={"qat_enable": (True,)},
    ),
    Option(
        "qat_mode",
        str,
        "affine",
        "Mode of MLX's quantisation; all but affine bring their own bits and group size.",
        title="QAT mode",
        choices=tuple(MODES),
        shown_when={"qat_enable": (True,)},
    ),
    Option(
        "qat_quantizer",
        str,
        AUTO,
        "Whose quantisation to train for: MLX's (mlx) or mlx-lm-lora's symmetric one (host); auto takes MLX's where it "
        "has the bits and group size.",
        title="QAT quantizer",
        choices=(AUTO, MLX, HOST),
        shown_when={"qat_enable": (True,)},
    ),
    Option(
        "qat_start_step",
        int,
        1,
        "First optimizer step with fake quantisation.",
        title="QAT start step",
        minimum=1,
        shown_when={"qat_enable": (True,)},
    ),
    Option(
        "qat_interval",
        int,
        1,
        "Fake quantisation is in effect every this many optimizer steps.",
        title="QAT interval",
        minimum=1,
        shown_when={"qat_enable": (True,)},
    ),
)

SUBSTRATE_OPTIONS: tuple[Option, ...] = MODEL_OPTIONS + DATA_OPTIONS + TRAINING_OPTIONS + OUTPUT_OPTIONS + QAT_OPTIONS

TRACKERS = ("wandb", "tensorboard", "trackio", "swanlab")

PRECISIONS = ("load_in_4bits", "load_in_6bits", "load_in_8bits", "load_in_mxfp4")

LONGEST_PATH, LONGEST_PART = 1000, 255


def is_path(text: str | None) -> bool:
    """Whether every system takes ``text`` as a path; None counts, too."""
    parts = (text or "").replace("\\", "/").split("/")
    return all(len(part.encode()) <= LONGEST_PART for part in parts) and len((text or "").encode()) <= LONGEST_PATH


def is_folder_name(text: str | None) -> bool:
    """Whether ``text`` names a folder inside the one it is looked up in, and nothing elsewhere; None counts, too."""
    return text is None or (not {"/", "\\"} & set(text) and text.strip(". ") != "" and is_path(text))


_PATH_WORDS = f"a path of at most {LONGEST_PATH} bytes, {LONGEST_PART} in each part"

FURTHER_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (is_path, _PATH_WORDS),
    "data": (is_path, _PATH_WORDS),
    "adapter_path": (is_path, _PATH_WORDS),
    "resume_adapter_file": (is_path, f"{_PATH_WORDS}, or null"),
    "lm_studio_name": (is_folder_name, "the name of a folder without / and \\, or null"),
    "run_name": (is_folder_name, "a name without / and \\, or null"),
    "test_batches": (lambda batches: batches != 0, "a whole number >= 1, or -1 for all"),
    "valid_fraction": (lambda fraction: fraction < 1, "a number >= 0 and < 1"),
    "lora_parameters.dropout": (lambda probability: probability < 1, "a number >= 0 and < 1"),
}
"""Limits that an ``Option`` cannot express: key -> (test, the allowed values in words)."""

UNCHECKED_KEYS = (
    "train_mode",
    "config",
    "text_feature",
    "chat_feature",
    "completion_feature",
    "answer_feature",
    "type_feature",
    "preference_score_feature",
    "end_answer_token",
    "top_p",
    "top_k",
    "min_p",
)
"""Keys that mlx-lm-lora reads from YAML for other train modes without listing them among its defaults."""
