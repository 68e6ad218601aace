"""The arguments of ``train_cpo`` are the options of a configuration file, with the same defaults, help and ranges."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.cpo_options import CPO_OPTIONS
from mlx_cpo_plugin.settings.options import QAT_OPTIONS
from mlx_cpo_plugin.training.arguments import FREE_TO_CHANGE, CPOTrainingArgs, option_of

ARGUMENTS = {own.name: own for own in fields(CPOTrainingArgs)}
# What callers of mlx-lm-lora's trainers get where they say nothing.
OTHER_DEFAULTS = {"batch_size": 4, "iters": 100, "seed": None}
# What has been used before train_cpo is called.
ABOUT_ROWS = {"overlong", "chat_template", "chat_template_kwargs", "preset"}


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if option_of(name)])
def test_an_argument_has_the_default_of_its_option(name: str) -> None:
    assert ARGUMENTS[name].default == OTHER_DEFAULTS.get(name, option_of(name).default)


def test_every_option_of_cpo_and_of_qat_reaches_the_trainer() -> None:
    of_losses = {option.name for loss in loss_types().values() for option in loss.options}
    reached = {option.name for name in ARGUMENTS if (option := option_of(name))}

    assert {option.name for option in (*CPO_OPTIONS, *QAT_OPTIONS)} - of_losses - ABOUT_ROWS <= reached


def test_an_argument_that_is_no_option_says_so_in_its_help() -> None:
    only_arguments = {name for name in ARGUMENTS if option_of(name) is None}

    assert only_arguments == {"adapter_file", "loss_options", "run_settings", "run_identity", "compile"}
    assert all(ARGUMENTS[name].metadata["help"] for name in only_arguments)


def test_what_may_change_at_a_resume_is_what_its_options_say() -> None:
    free = {name for name in ARGUMENTS if (option := option_of(name)) and option.free_on_resume}

    assert free | {"adapter_file", "loss_options", "run_settings", "run_identity"} == FREE_TO_CHANGE
    assert not {"beta", "learning_rate", "seed", "compile", "qat_bits"} & FREE_TO_CHANGE


def test_settings_become_arguments_under_their_own_names() -> None:
    given = {"train": True, "train_mode": "cpo", "dpo_cpo_loss_type": "dpop", "delta": 5.0, "save_every": 7}
    resolved = config.resolve({**given, "efficient_long_context": True, "keep_checkpoints": 3}).settings

    args = CPOTrainingArgs.from_settings(resolved, "adapters/adapters.safetensors")

    assert (args.loss_type, args.delta, args.steps_per_save, args.keep_checkpoints) == ("dpop", 5.0, 7, 3)
    assert args.seq_step_size == 512
    assert args.loss_options == {"beta": 0.1, "delta": 5.0}
