"""A mistake in a setting is told in one sentence: key, value, file, line and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.stranger_plugins import PlainPlugin, RankPlugin, registered

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings import config


def write(folder: Path, content: str | Mapping[str, Any]) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


def from_words(*line: str) -> SimpleNamespace:
    return config.resolve(config.explicit(list(line))).settings


def from_call(**values: Any) -> SimpleNamespace:
    return config.resolve({"train_mode": "cpo", "train": True, **values}).settings


def message(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config.resolve(config.explicit(call))
    return str(caught.value)


def message_for_yaml(folder: Path, content: str) -> str:
    """The error for a YAML file, with the file's name in place of its path."""
    file = write(folder, content)
    return message(["--config", str(file)]).replace(str(file), "my.yaml")


@pytest.fixture
def rank() -> Iterator[None]:
    with registered(RankPlugin()):
        yield


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("beta: -1", "beta is -1 in my.yaml, line 3, but must be a number > 0."),
        ("beta: 0", "beta is 0 in my.yaml, line 3, but must be a number > 0."),
        ("beta: true", "beta is true in my.yaml, line 3, but must be a number > 0."),
        ("beta: .nan", "beta is nan in my.yaml, line 3, but must be a number > 0."),
        ("beta: .inf", "beta is inf in my.yaml, line 3, but must be a number > 0."),
        ("beta: '1e-5'", "beta is '1e-5' in my.yaml, line 3, but must be a number > 0."),
        ("delta: -0.5", "delta is -0.5 in my.yaml, line 3, but must be a number >= 0."),
        ("batch_size: 0", "batch_size is 0 in my.yaml, line 3, but must be a whole number >= 1."),
        ("batch_size: 2.0", "batch_size is 2.0 in my.yaml, line 3, but must be a whole number >= 1."),
        ("batch_size: true", "batch_size is true in my.yaml, line 3, but must be a whole number >= 1."),
        ("iters: 0", "iters is 0 in my.yaml, line 3, but must be a whole number >= 1 or null."),
        ("qat_bits: 17", "qat_bits is 17 in my.yaml, line 3, but must be a whole number from 2 to 16."),
        ("val_batches: -2", "val_batches is -2 in my.yaml, line 3, but must be a whole number >= -1."),
        ("valid_fraction: 1", "valid_fraction is 1 in my.yaml, line 3, but must be a number >= 0 and < 1."),
        ("fuse: 1", "fuse is 1 in my.yaml, line 3, but must be true or false."),
        ("model: 7", "model is 7 in my.yaml, line 3, but must be text."),
        ("train_type: qlora", "train_type is 'qlora' in my.yaml, line 3, but must be one of lora, dora, full."),
        ("optimizer: sgd", "optimizer is 'sgd' in my.yaml, line 3, but must be one of adam, adamw, muon."),
        (
            "dpo_cpo_loss_type: sigmod",
            "dpo_cpo_loss_type is 'sigmod' in my.yaml, line 3, but must be one of "
            "sigmoid, hinge, ipo, dpop, simpo, alphapo.",
        ),
        ("cpo_alpha: -1", "cpo_alpha is -1 in my.yaml, line 3, but must be a number >= 0."),
        ("label_smoothing: 0.5", "label_smoothing is 0.5 in my.yaml, line 3, but must be a number >= 0 and < 0.5."),
        ("simpo_gamma: -1", "simpo_gamma is -1 in my.yaml, line 3, but must be a number >= 0."),
        ("alphapo_alpha: steep", "alphapo_alpha is 'steep' in my.yaml, line 3, but must be a number."),
        (
            "preset: dpo",
            "preset is 'dpo' in my.yaml, line 3, but must be one of cpo-paper, simpo, cpo-simpo, dpop.",
        ),
        (
            "dpo_cpo_loss_type: hinge\nlabel_smoothing: 0.1",
            "label_smoothing is 0.1 in my.yaml, line 4, but dpo_cpo_loss_type is hinge in my.yaml, line 3, which does "
            "not read it; remove it, or use one of sigmoid, simpo, alphapo.",
        ),
        (
            "delta: 5",
            "delta is 5.0 in my.yaml, line 3, but dpo_cpo_loss_type is sigmoid by default, which does not read it; "
            "remove it, or use one of dpop.",
        ),
        (
            "preset: simpo\ndelta: 5",
            "delta is 5.0 in my.yaml, line 4, but dpo_cpo_loss_type is simpo by the preset in my.yaml, line 3, which "
            "does not read it; remove it, or use one of dpop.",
        ),
        (
            "preset: simpo\ndpo_cpo_loss_type: sigmoid",
            "preset is simpo in my.yaml, line 3, whose loss is simpo, but dpo_cpo_loss_type is sigmoid in my.yaml, "
            "line 4; remove one of the two.",
        ),
        ("lora_parameters: 8", "lora_parameters is 8 in my.yaml, line 3, but must be a mapping."),
        (
            "lora_parameters:\n  rank: 0",
            "lora_parameters.rank is 0 in my.yaml, line 4, but must be a whole number >= 1.",
        ),
        (
            "lora_parameters: {dropout: 1.0}",
            "lora_parameters.dropout is 1.0 in my.yaml, line 3, but must be a number >= 0 and < 1.",
        ),
        (
            "lora_parameters:\n  rank: 4\n  scal: 20",
            "Unknown key lora_parameters.scal in my.yaml, line 5; did you mean lora_parameters.scale?",
        ),
        (
            "lora_parameters: {keys: []}",
            "Unknown key lora_parameters.keys in my.yaml, line 3; known are dropout, rank, scale.",
        ),
        (
            "optimizer_config: {adamw: 0.1}",
            "optimizer_config.adamw is 0.1 in my.yaml, line 3, but must be a mapping.",
        ),
        (
            "optimizer_config: {adamW: {}}",
            "Unknown key optimizer_config.adamW in my.yaml, line 3; did you mean optimizer_config.adamw?",
        ),
        (
            "optimizer_config:\n  adamw:\n    weight_decy: 0.1",
            "Unknown key optimizer_config.adamw.weight_decy in my.yaml, line 5; "
            "did you mean optimizer_config.adamw.weight_decay?",
        ),
        (
            "optimizer_config: {adam: {learning_rate: 0.1}}",
            "Unknown key optimizer_config.adam.learning_rate in my.yaml, line 3; "
            "known are betas, bias_correction, eps.",
        ),
        (
            "lr_schedule: {name: cosine, arguments: [1e-5, 9]}",
            "lr_schedule.name is 'cosine' in my.yaml, line 3, but must be one of "
            "cosine_decay, exponential_decay, linear_schedule, step_decay.",
        ),
        (
            "lr_schedule:\n  name: cosine_decay",
            "lr_schedule.arguments is null in my.yaml, line 3, but must be a list.",
        ),
        (
            "lr_schedule: {name: step_decay, arguments: [1e-5]}",
            "lr_schedule.arguments is [1e-05] in my.yaml, line 3, "
            "but step_decay takes the numbers init, decay_rate, step_size.",
        ),
        (
            "lr_schedule: {name: cosine_decay, arguments: [1e-5, x]}",
            "lr_schedule.arguments is [1e-05, 'x'] in my.yaml, line 3, "
            "but cosine_decay takes the numbers init, decay_steps, end.",
        ),
        (
            "lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], warmup: -1}",
            "lr_schedule.warmup is -1 in my.yaml, line 3, but must be a whole number >= 0.",
        ),
        (
            "lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], warm_up: 1}",
            "Unknown key lr_schedule.warm_up in my.yaml, line 3; did you mean lr_schedule.warmup?",
        ),
        (
            "hf_dataset:\n  - path: rows\n  - config: {}",
            "hf_dataset has the entry {'config': {}} in my.yaml, line 5, but each entry must be a mapping with a path.",
        ),
        (
            "hf_dataset:\n  - path: rows\n    trian_split: train",
            "Unknown key hf_dataset.trian_split in my.yaml, line 5; did you mean hf_dataset.train_split?",
        ),
    ],
)
def test_wrong_value_is_told_with_key_value_file_line_and_what_is_allowed(
    line: str, sentence: str, tmp_path: Path
) -> None:
    assert message_for_yaml(tmp_path, f"train_mode: cpo\ntrain: true\n{line}\n") == sentence


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--beta=-1", "beta is -1.0 on the command line, but must be a number > 0."),
        ("--beta=nan", "beta is nan on the command line, but must be a number > 0."),
        ("--iters=1e3", "iters is '1e3' on the command line, but must be a whole number >= 1 or null."),
        ("--lora-parameters={rank", "lora_parameters is '{rank' on the command line, but must be a mapping."),
        ("--optimizer=sgd", "optimizer is 'sgd' on the command line, but must be one of adam, adamw, muon."),
    ],
)
def test_wrong_value_on_the_command_line(flag: str, sentence: str) -> None:
    assert message(["--train-mode=cpo", "--train", flag]) == sentence


@pytest.mark.parametrize(
    ("in_file", "words", "sentence"),
    [
        (
            "preset: simpo",
            ["--dpo-cpo-loss-type", "sigmoid"],
            "preset is simpo in {file}, line 3, whose loss is simpo, but dpo_cpo_loss_type is sigmoid on the command "
            "line; remove one of the two.",
        ),
        (
            "dpo_cpo_loss_type: sigmoid",
            ["--preset", "simpo"],
            "preset is simpo on the command line, whose loss is simpo, but dpo_cpo_loss_type is sigmoid in {file}, "
            "line 3; remove one of the two.",
        ),
        (
            "simpo_gamma: 2",
            ["--dpo-cpo-loss-type", "hinge"],
            "simpo_gamma is 2.0 in {file}, line 3, but dpo_cpo_loss_type is hinge on the command line, which does not "
            "read it; remove it, or use one of simpo, alphapo.",
        ),
        (
            "dpo_cpo_loss_type: hinge",
            ["--delta", "2"],
            "delta is 2.0 on the command line, but dpo_cpo_loss_type is hinge in {file}, line 3, which does not read "
            "it; remove it, or use one of dpop.",
        ),
    ],
)
def test_the_loss_must_read_what_file_and_command_line_set_together(
    in_file: str, words: list[str], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"train_mode: cpo\ntrain: true\n{in_file}\n")

    with pytest.raises(ConfigError) as refused:
        config.resolve(config.explicit(["-c", str(file), *words]))

    assert str(refused.value) == sentence.format(file=file)


def test_a_loss_from_elsewhere_that_does_not_read_beta_refuses_it() -> None:
    with registered(PlainPlugin()), pytest.raises(ConfigError, match=r"^beta is 0\.2 in the call, but .* plain in the"):
        config.resolve({"train_mode": "cpo", "train": True, "beta": 0.2, "dpo_cpo_loss_type": "plain"})


def test_wrong_value_in_a_call() -> None:
    assert message({"train_mode": "cpo", "train": True, "beta": "0.1"}) == (
        "beta is '0.1' in the call, but must be a number > 0."
    )


def test_wrong_part_of_merged_lora_parameters_is_told_where_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nlora_parameters:\n  rank: 0\n")

    in_yaml = message(["-c", str(file), "--lora-parameters={scale: 2}"])
    in_call = message(["-c", str(file), "--lora-parameters={rank: -3}"])

    assert in_yaml == f"lora_parameters.rank is 0 in {file}, line 4, but must be a whole number >= 1."
    assert in_call == "lora_parameters.rank is -3 on the command line, but must be a whole number >= 1."


def test_wrong_value_in_yaml_does_no_harm_when_the_call_overrides_it(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nbeta: -1\n")

    assert from_words("-c", str(file), "--beta", "0.1").beta == 0.1


def test_whole_number_serves_as_a_number() -> None:
    beta = from_call(beta=1).beta

    assert (beta, type(beta)) == (1.0, float)


def test_path_serves_as_text() -> None:
    assert from_call(adapter_path=Path("out")).adapter_path == "out"


def test_optimizer_may_be_written_in_capitals() -> None:
    assert from_call(optimizer="AdamW").optimizer == "adamw"


def test_single_dataset_needs_no_list() -> None:
    assert from_call(hf_dataset={"path": "rows"}).hf_dataset == [{"path": "rows"}]


@pytest.mark.parametrize("huge", [10**400, -(10**400)])
def test_number_beyond_all_floats_is_refused(huge: int) -> None:
    assert message({"train_mode": "cpo", "train": True, "delta": huge}).startswith("delta is ")


def test_unknown_yaml_key_is_told_with_its_line_and_the_nearest_known_key(tmp_path: Path) -> None:
    assert message_for_yaml(tmp_path, "train_mode: cpo\ntrain: true\n\nbeta_: 0.1\n") == (
        "Unknown key beta_ in my.yaml, line 4; did you mean beta?"
    )


def test_unknown_yaml_key_without_a_near_one(tmp_path: Path) -> None:
    assert message_for_yaml(tmp_path, "train_mode: cpo\ntrain: true\nzzzzzz: 1\n") == (
        "Unknown key zzzzzz in my.yaml, line 3; remove it."
    )


def test_unknown_key_in_a_call() -> None:
    assert message({"train_mode": "cpo", "train": True, "batchsize": 2}) == (
        "Unknown key batchsize in the call; did you mean batch_size?"
    )


def test_unknown_option_on_the_command_line() -> None:
    assert message(["--train-mode=cpo", "--train", "--betta=0.1"]) == (
        "Unknown option --betta on the command line; did you mean --beta?"
    )


def test_option_without_its_value_on_the_command_line() -> None:
    assert message(["--train-mode=cpo", "--train", "--beta"]) == (
        "Command line: argument --beta: expected one argument; --help lists what is allowed."
    )


def test_more_than_one_precision(tmp_path: Path) -> None:
    sentence = message_for_yaml(tmp_path, "train_mode: cpo\ntrain: true\nload_in_4bits: true\nload_in_8bits: true\n")

    assert sentence == (
        "load_in_4bits (in my.yaml, line 3) and load_in_8bits (in my.yaml, line 4) are true together, "
        "but a model has one precision; set all but one to false."
    )


def test_neither_train_nor_test() -> None:
    assert message({"train_mode": "cpo"}) == (
        "Neither train nor test is true; set 'train: true' in the YAML file or give --train."
    )


@pytest.mark.parametrize("name", ["sft", "cop", 7])
def test_mode_that_nobody_registers(name: Any) -> None:
    assert (
        message({"train_mode": name, "train": True}) == f"train_mode is {name!r} in the call, but must be one of cpo."
    )
