"""The options that all train modes share: their defaults, and that each describes itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from mlx_lm_lora.train import CONFIG_DEFAULTS
from mlx_lm_lora.train import build_parser as build_host_parser
from support.refusals import refused

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.nested import LORA_PARAMETERS, OPTIMIZERS
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS, PRECISIONS, UNCHECKED_KEYS, option, options_of
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.types import Option

OPTIONS = {option.name: option for option in COMMON_OPTIONS}

# mlx-lm-lora has no default for these: it lacks them, or reads them from the YAML file or the command line only.
WITHOUT_HOST_DEFAULT = {
    "hf_dataset",
    "valid_fraction",
    "warmup_ratio",
    "chosen_feature",
    "rejected_feature",
    "prompt_feature",
    "system_feature",
    "completion_pairs",
    "min_gap",
    "seq_step_size",
    "fuse_bits",
    "push_to_hub",
    "hub_private_repo",
    "qat_quantizer",
    "wandb",
    "report_to",
    "project",
    "run_name",
}

COMMON_KEYS = re.findall(
    r"\w+",
    """
    model data hf_dataset train test train_type lora_parameters num_layers load_in_4bits load_in_6bits load_in_8bits
    load_in_mxfp4 optimizer optimizer_config learning_rate lr_schedule batch_size gradient_accumulation_steps iters
    epochs steps_per_report steps_per_eval val_batches test_batches save_every max_seq_length grad_checkpoint
    efficient_long_context recurrence_chunk_size seed adapter_path resume_adapter_file fuse lm_studio_name wandb
    qat_enable qat_bits qat_group_size qat_mode qat_start_step qat_interval
    """,
)

by_name = pytest.mark.parametrize("option", [pytest.param(option, id=option.name) for option in COMMON_OPTIONS])


def nowhere(key: str) -> str:
    return "here"


@pytest.mark.parametrize("key", COMMON_KEYS)
def test_every_key_of_sft_training_is_an_option(key: str) -> None:
    assert key in OPTIONS


@by_name
def test_default_is_that_of_mlx_lm_lora(option: Option) -> None:
    if option.name in WITHOUT_HOST_DEFAULT:
        assert option.name not in CONFIG_DEFAULTS
    else:
        of_the_host = CONFIG_DEFAULTS[option.name]
        if option.name == "optimizer_config":  # which has fewer optimizers
            of_the_host = {name: {} for name in OPTIMIZERS} | of_the_host
        assert option.default == of_the_host


def test_defaults_of_the_parser_of_mlx_lm_lora_are_the_same() -> None:
    parsed = {key: value for key, value in vars(build_host_parser().parse_args([])).items() if value is not None}

    shared = parsed.keys() & OPTIONS.keys()

    assert shared == {"gradient_accumulation_steps"}
    assert all(parsed[name] == OPTIONS[name].default for name in shared)


def test_limits_are_written_with_all_their_digits() -> None:
    assert OPTIONS["seed"].allowed() == f"a whole number from 0 to {2**32 - 1}"


@by_name
def test_default_is_within_the_limits(option: Option) -> None:
    value = None if option.default is None else check(option, option.default, nowhere)

    assert value == option.default
    assert (option.default is None) == option.optional


@by_name
def test_help_is_one_sentence(option: Option) -> None:
    assert option.help.endswith(".")
    assert ". " not in option.help


@by_name
def test_shown_when_names_another_option_and_its_possible_values(option: Option) -> None:
    for name, values in option.shown_when.items():
        assert name in OPTIONS
        assert all(check(OPTIONS[name], value, nowhere) == value for value in values)


def test_a_field_says_name_type_and_whether_null_is_allowed() -> None:
    @dataclass
    class Group:
        pace: int = option(3, "How fast.", minimum=1)
        place: list[str] | None = option(None, "Where.", title="Place")
        parts: dict[str, Any] = option({"a": 1}, "Of what.")

    pace, place, parts = options_of(Group)

    assert pace == Option("pace", int, 3, "How fast.", minimum=1)
    assert place == Option("place", list, None, "Where.", title="Place", optional=True)
    assert parts == Option("parts", dict, {"a": 1}, "Of what.")
    assert Group().parts is not Group().parts


def test_names_are_unique() -> None:
    assert len(OPTIONS) == len(COMMON_OPTIONS)


def test_lists_of_names_speak_of_options_that_exist() -> None:
    assert set(PRECISIONS) <= set(OPTIONS)
    assert not set(UNCHECKED_KEYS) & set(OPTIONS)


def test_lora_parameters_default_to_those_of_each_part() -> None:
    defaults = {option.name: option.default for option in LORA_PARAMETERS if option.default is not None}

    assert OPTIONS["lora_parameters"].default == defaults


@pytest.mark.parametrize(
    ("name", "allowed", "beyond"),
    [
        ("num_layers", -1, -2),
        ("max_seq_length", 4, 3),
        ("valid_fraction", 0.0, -0.1),
        ("valid_fraction", 0.999, 1),
        ("completion_pairs", "all", "some"),
        ("min_gap", 0.0, -0.1),
        ("learning_rate", 1e-12, 0),
        ("batch_size", 1, 0),
        ("gradient_accumulation_steps", 1, 0),
        ("iters", 1, 0),
        ("epochs", 1, 0),
        ("steps_per_report", 1, 0),
        ("steps_per_eval", 1, 0),
        ("save_every", 1, 0),
        ("val_batches", -1, -2),
        ("val_batches", 0, -3),
        ("test_batches", -1, -2),
        ("test_batches", 1, 0),
        ("seed", 0, -1),
        ("seed", 2**32 - 1, 2**32),
        ("seq_step_size", 2, 1),
        ("recurrence_chunk_size", 1, 0),
        ("qat_bits", 2, 1),
        ("qat_bits", 16, 17),
        ("qat_start_step", 1, 0),
        ("qat_interval", 1, 0),
        ("train_type", "dora", "qlora"),
        ("optimizer", "sgd", "adamax"),
        ("qat_mode", "affine", "symmetric"),
        ("qat_quantizer", "mlx", "torch"),
        ("fuse_bits", 4, 7),
    ],
)
def test_limits(name: str, allowed: object, beyond: object) -> None:
    assert check(OPTIONS[name], allowed, nowhere) == allowed
    with refused(ConfigError, key=name, place="here"):
        check(OPTIONS[name], beyond, nowhere)
