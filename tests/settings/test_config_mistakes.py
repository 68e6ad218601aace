"""A mistake in a setting is told with its key, file and line, and what is allowed, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.stranger_plugins import PlainPlugin, registered

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.nested import DATASET_KEYS, LORA_PARAMETERS
from mlx_cpo_plugin.settings.validation import KEYS_OF_OTHERS
from mlx_cpo_plugin.training.arguments import check_loss_options


def write(folder: Path, content: str | Mapping[str, Any]) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


def from_words(*line: str) -> SimpleNamespace:
    return config.resolve(list(line)).settings


def from_call(**values: Any) -> SimpleNamespace:
    return config.resolve({"train_mode": "cpo", "train": True, **values}).settings


def refusal(call: Any) -> ConfigError:
    """The error for a call."""
    with pytest.raises(ConfigError) as caught:
        config.resolve(call)
    return caught.value


def fields_of(error: ConfigError) -> tuple[str, str, str]:
    return error.key, error.place, error.allowed


def refusal_of_yaml(file: Path, content: str) -> ConfigError:
    file.write_text(f"train_mode: cpo\ntrain: true\n{content}\n", encoding="utf-8")
    return refusal(["--config", str(file)])


# Lines of a file after the first two, the key that is refused, its line, and what would be allowed.
MISTAKES = [
    ("beta: -1", "beta", 3, "a number > 0"),
    ("beta: 0", "beta", 3, "a number > 0"),
    ("beta: true", "beta", 3, "a number > 0"),
    ("beta: .nan", "beta", 3, "a number > 0"),
    ("beta: .inf", "beta", 3, "a number > 0"),
    ("beta: '1e-5'", "beta", 3, "a number > 0"),
    ("delta: -0.5", "delta", 3, "a number >= 0"),
    ("batch_size: 0", "batch_size", 3, "a whole number >= 1"),
    ("batch_size: 2.0", "batch_size", 3, "a whole number >= 1"),
    ("batch_size: true", "batch_size", 3, "a whole number >= 1"),
    ("iters: 0", "iters", 3, "a whole number >= 1 or null"),
    ("iters: 99999999999999999999", "iters", 3, "a whole number up to 2147483647"),
    ("qat_group_size: -3000000000", "qat_group_size", 3, "a whole number up to 2147483647"),
    ("qat_bits: 17", "qat_bits", 3, "a whole number from 2 to 16"),
    ("val_batches: -2", "val_batches", 3, "a whole number >= -1"),
    ("valid_fraction: 1", "valid_fraction", 3, "a number >= 0 and < 1"),
    ("fuse: 1", "fuse", 3, "true or false"),
    ("model: 7", "model", 3, "text"),
    ("train_type: qlora", "train_type", 3, "one of lora, dora, full"),
    ("optimizer_config: {adafactor: {beta_1: abc}}", "optimizer_config.adafactor.beta_1", 3, "a number"),
    ("optimizer: adamax", "optimizer", 3, "one of adam, adamw, muon, sgd, adafactor, lion"),
    ("dpo_cpo_loss_type: sigmod", "dpo_cpo_loss_type", 3, "one of sigmoid, hinge, ipo, dpop, simpo, alphapo"),
    ("cpo_alpha: -1", "cpo_alpha", 3, "a number >= 0"),
    ("label_smoothing: 0.5", "label_smoothing", 3, "a number >= 0 and < 0.5"),
    ("simpo_gamma: -1", "simpo_gamma", 3, "a number >= 0"),
    ("alphapo_alpha: steep", "alphapo_alpha", 3, "a number"),
    ("preset: dpo", "preset", 3, "one of cpo-paper, simpo, cpo-simpo, dpop"),
    ("dpo_cpo_loss_type: hinge\nlabel_smoothing: 0.1", "label_smoothing", 4, "sigmoid, simpo, alphapo"),
    ("delta: 5", "delta", 3, "dpop"),
    ("preset: simpo\ndelta: 5", "delta", 4, "dpop"),
    ("preset: simpo\ndpo_cpo_loss_type: sigmoid", "dpo_cpo_loss_type", 4, "simpo"),
    ("lora_parameters: 8", "lora_parameters", 3, "a mapping"),
    ("lora_parameters:\n  rank: 0", "lora_parameters.rank", 4, "a whole number >= 1"),
    ("lora_parameters: {dropout: 1.0}", "lora_parameters.dropout", 3, "a number >= 0 and < 1"),
    ("lora_parameters:\n  rank: 4\n  scal: 20", "lora_parameters.scal", 5, "lora_parameters.scale"),
    ("lora_parameters: {alfa: 16}", "lora_parameters.alfa", 3, "dropout, keys, rank, scale"),
    (
        "lora_parameters: {keys: []}",
        "lora_parameters.keys",
        3,
        "a list of modules, e.g. [self_attn.q_proj, self_attn.v_proj]",
    ),
    ("optimizer_config: {adamw: 0.1}", "optimizer_config.adamw", 3, "a mapping"),
    ("optimizer_config: {adamW: {}}", "optimizer_config.adamW", 3, "optimizer_config.adamw"),
    (
        "optimizer_config:\n  adamw:\n    weight_decy: 0.1",
        "optimizer_config.adamw.weight_decy",
        5,
        "optimizer_config.adamw.weight_decay",
    ),
    (
        "optimizer_config: {adam: {learning_rate: 0.1}}",
        "optimizer_config.adam.learning_rate",
        3,
        "betas, bias_correction, eps",
    ),
    (
        "lr_schedule: {name: cosin, arguments: [1e-5, 9]}",
        "lr_schedule.name",
        3,
        "one of linear, cosine, constant, cosine_decay, exponential_decay, linear_schedule, step_decay",
    ),
    ("lr_schedule:\n  name: cosine_decay", "lr_schedule.arguments", 3, "a list"),
    (
        "lr_schedule: {name: step_decay, arguments: [1e-5]}",
        "lr_schedule.arguments",
        3,
        "a list of step_decay's numbers init, decay_rate, step_size",
    ),
    (
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, x]}",
        "lr_schedule.arguments",
        3,
        "a list of cosine_decay's numbers init, decay_steps, end",
    ),
    (
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], warmup: -1}",
        "lr_schedule.warmup",
        3,
        "a whole number >= 0",
    ),
    (
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], warm_up: 1}",
        "lr_schedule.warm_up",
        3,
        "lr_schedule.warmup",
    ),
    ("hf_dataset:\n  - path: rows\n  - config: {}", "hf_dataset.1", 5, "a mapping with a path"),
    ("hf_dataset:\n  - path: rows\n    trian_split: train", "hf_dataset.trian_split", 5, "hf_dataset.train_split"),
]
# The same on a command line.
MISTAKEN_WORDS = [
    ("--beta=-1", "beta", "a number > 0"),
    ("--beta=nan", "beta", "a number > 0"),
    ("--iters=1e3", "iters", "a whole number >= 1 or null"),
    ("--lora-parameters={rank", "lora_parameters", "a mapping"),
    ("--optimizer=adamax", "optimizer", "one of adam, adamw, muon, sgd, adafactor, lion"),
    ("--betta=0.1", "--betta", "--beta"),
]


@pytest.mark.parametrize(("content", "key", "line", "allowed"), MISTAKES)
def test_a_wrong_value_is_told_with_its_key_file_and_line_and_what_is_allowed(
    content: str, key: str, line: int, allowed: str, tmp_path: Path
) -> None:
    file = tmp_path / "my.yaml"
    error = refusal_of_yaml(file, content)

    assert fields_of(error) == (key, f"in {file}, line {line}", allowed)
    assert all(field in str(error) for field in fields_of(error)), "the sentence says all of it"


@pytest.mark.parametrize(("word", "key", "allowed"), MISTAKEN_WORDS)
def test_a_wrong_value_on_the_command_line(word: str, key: str, allowed: str) -> None:
    error = refusal(["--train-mode=cpo", "--train", word])

    assert fields_of(error) == (key, "on the command line", allowed)
    assert all(field in str(error) for field in fields_of(error)), "the sentence says all of it"


@pytest.mark.parametrize(
    ("in_file", "words", "key", "place", "allowed"),
    [
        ("preset: simpo", ["--dpo-cpo-loss-type", "sigmoid"], LOSS_OPTION, "on the command line", "simpo"),
        (f"{LOSS_OPTION}: sigmoid", ["--preset", "simpo"], LOSS_OPTION, "in {file}, line 3", "simpo"),
        ("simpo_gamma: 2", ["--dpo-cpo-loss-type", "hinge"], "simpo_gamma", "in {file}, line 3", "simpo, alphapo"),
        (f"{LOSS_OPTION}: hinge", ["--delta", "2"], "delta", "on the command line", "dpop"),
    ],
)
def test_the_loss_must_read_what_file_and_command_line_set_together(
    in_file: str, words: list[str], key: str, place: str, allowed: str, tmp_path: Path
) -> None:
    file = write(tmp_path, f"train_mode: cpo\ntrain: true\n{in_file}\n")

    error = refusal(["-c", str(file), *words])

    assert fields_of(error) == (key, place.format(file=file), allowed)
    other = "on the command line" if "line 3" in place else f"in {file}, line 3"
    assert other in str(error)


def test_a_loss_from_elsewhere_that_does_not_read_beta_refuses_it() -> None:
    with registered(PlainPlugin()):
        error = refusal({"train_mode": "cpo", "train": True, "beta": 0.2, "dpo_cpo_loss_type": "plain"})

    assert fields_of(error) == ("beta", "in the call", "sigmoid, hinge, ipo, dpop, simpo, alphapo")
    assert "the loss plain" in str(error)


def test_wrong_value_in_a_call() -> None:
    error = refusal({"train_mode": "cpo", "train": True, "beta": "0.1"})

    assert fields_of(error) == ("beta", "in the call", "a number > 0")


def test_wrong_part_of_merged_lora_parameters_is_told_where_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nlora_parameters:\n  rank: 0\n")

    in_yaml = refusal(["-c", str(file), "--lora-parameters={scale: 2}"])
    in_call = refusal(["-c", str(file), "--lora-parameters={rank: -3}"])

    assert fields_of(in_yaml) == ("lora_parameters.rank", f"in {file}, line 4", "a whole number >= 1")
    assert fields_of(in_call) == ("lora_parameters.rank", "on the command line", "a whole number >= 1")


def test_wrong_value_in_yaml_does_no_harm_when_the_call_overrides_it(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nbeta: -1\n")

    assert from_words("-c", str(file), "--beta", "0.1").beta == 0.1


def test_whole_number_serves_as_a_number() -> None:
    beta = from_call(beta=1).beta

    assert (beta, type(beta)) == (1.0, float)


def test_path_serves_as_text() -> None:
    assert from_call(adapter_path=Path("out")).adapter_path == "out"


def test_choices_may_be_written_in_capitals() -> None:
    resolved = from_call(optimizer="AdamW", train_type="LoRA")

    assert (resolved.optimizer, resolved.train_type) == ("adamw", "lora")


def test_single_dataset_needs_no_list() -> None:
    assert from_call(hf_dataset={"path": "rows"}).hf_dataset == [{"path": "rows"}]


@pytest.mark.parametrize("huge", [10**400, -(10**400)])
def test_number_beyond_all_floats_is_refused(huge: int) -> None:
    assert refusal({"train_mode": "cpo", "train": True, "delta": huge}).key == "delta"


def test_unknown_yaml_key_is_told_with_its_line_and_the_nearest_known_key(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"

    assert fields_of(refusal_of_yaml(file, "\nbeta_: 0.1")) == ("beta_", f"in {file}, line 4", "beta")


@pytest.mark.parametrize("key", ["zzzzzz", "temperture"], ids=["none is near", "one that only other modes read"])
def test_unknown_yaml_key_without_a_near_one(tmp_path: Path, key: str) -> None:
    error = refusal_of_yaml(tmp_path / "my.yaml", f"{key}: 1")

    assert (error.key, error.allowed) == (key, "")
    assert str(error).endswith("remove it.")


def test_unknown_key_in_a_call() -> None:
    error = refusal({"train_mode": "cpo", "train": True, "batchsize": 2})

    assert fields_of(error) == ("batchsize", "in the call", "batch_size")


def test_option_without_its_value_on_the_command_line() -> None:
    error = refusal(["--train-mode=cpo", "--train", "--beta"])

    assert error.place == "on the command line"
    assert "--beta: expected one argument" in str(error)


def test_more_than_one_precision(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"

    error = refusal_of_yaml(file, "load_in_4bits: true\nload_in_8bits: true")

    assert fields_of(error)[:2] == ("load_in_8bits", f"in {file}, line 4")
    assert f"load_in_4bits (in {file}, line 3)" in str(error)


def test_neither_train_nor_test() -> None:
    assert refusal({"train_mode": "cpo"}).key == "train"


@pytest.mark.parametrize("name", ["sft", "cop", 7])
def test_mode_that_nobody_registers(name: Any) -> None:
    assert fields_of(refusal({"train_mode": name, "train": True})) == ("train_mode", "in the call", "one of cpo")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"qat_quantizer": "mlx", "qat_bits": 7}, "qat_bits"),
        ({"qat_quantizer": "mlx", "qat_group_size": 0}, "qat_group_size"),
        ({"qat_quantizer": "host", "qat_mode": "mxfp4"}, "qat_mode"),
    ],
)
def test_a_quantiser_that_lacks_what_is_asked_of_it(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"train_mode": "cpo", "train": True, "qat_enable": True, **changes})
    line = file.read_text().splitlines().index(f"{key}: {changes[key]}") + 1

    error = refusal(["-c", str(file)])

    assert (error.key, error.place) == (key, f"in {file}, line {line}")


@pytest.mark.parametrize(
    ("written", "key", "meant"),
    [
        ("lr: 1e-5", "lr", "learning_rate"),
        ("per_device_train_batch_size: 2", "per_device_train_batch_size", "batch_size"),
        ("fine_tune_type: lora", "fine_tune_type", "train_type"),
        ("lora_layers: 8", "lora_layers", "num_layers"),
        ("lora-layers: 8", "lora-layers", "num_layers"),
        ("hf_dataset: {path: a/b, prompt_column: q}", "hf_dataset.prompt_column", "hf_dataset.prompt_feature"),
        ("lr_schedule: {name: cosine, warmup_steps: 2}", "lr_schedule.warmup_steps", "lr_schedule.warmup"),
        ("num_train_epochs: 3", "num_train_epochs", "epochs"),
        ("lora_r: 8", "lora_r", "lora_parameters.rank"),
        ("lora_alpha: 16", "lora_alpha", "lora_parameters.scale, which is alpha over the rank"),
        (
            "lora_parameters: {alpha: 16}",
            "lora_parameters.alpha",
            "lora_parameters.scale, which is alpha over the rank",
        ),
    ],
)
def test_a_key_of_another_trainer_is_told_by_its_meaning(tmp_path: Path, written: str, key: str, meant: str) -> None:
    error = refusal_of_yaml(tmp_path / "my.yaml", written)

    told = f"{key} is not a key of this plugin (in {tmp_path / 'my.yaml'}, line 3); did you mean {meant}?"
    assert str(error) == told
    assert fields_of(error) == (key, f"in {tmp_path / 'my.yaml'}, line 3", meant.partition(",")[0])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lora-alpha", "--lora-parameters '{scale: ...}', which is alpha over the rank"),
        ("--eval-strategy", "--eval-per-epoch, or --steps-per-eval"),
        ("--num-train-epochs", "--epochs"),
        ("--max-steps", "--iters, which counts micro-batches"),
        ("--lr", "--learning-rate"),  # and no abbreviation of --lr-schedule
        ("--dpo-loss-type", "--dpo-cpo-loss-type"),
    ],
)
def test_an_option_of_another_trainer_is_told_by_its_meaning(option: str, meant: str) -> None:
    error = refusal(["--train-mode", "cpo", option, "3"])

    assert str(error) == f"{option} is not an option of this plugin (on the command line); did you mean {meant}?"


def test_a_loss_option_of_another_trainer_is_told_by_its_meaning() -> None:
    with pytest.raises(ConfigError) as raised:
        check_loss_options("sigmoid", {"rpo_alpha": 1.0})

    told = "rpo_alpha is not a loss option of this plugin (in the call); did you mean cpo_alpha?"
    assert str(raised.value) == told


def test_an_abbreviation_with_the_same_meaning_is_one() -> None:
    words = ["--train-mode", "cpo", "--train", "--optim", "lion", "--learning", "0.5"]

    assert config.resolve(words).settings.optimizer == "lion"


def test_an_alpha_beside_the_scale_that_counts_is_to_be_removed() -> None:
    error = refusal({"train_mode": "cpo", "lora_parameters": {"rank": 8, "alpha": 16.0, "scale": 20.0}})

    assert str(error).endswith("beside scale, which alone counts; remove alpha.")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"adamw": {"weight_decay": 0.1}}, 1),
        ({"adamw": {"weight_decay": 0.1}, "adam": {"eps": 1e-6}}, 0),
        ({"adamw": {}}, 0),
    ],
    ids=str,
)
def test_arguments_of_an_optimizer_that_is_not_chosen_are_noted(arguments: Any, told: int) -> None:
    resolved = config.resolve({"train_mode": "cpo", "train": True, "optimizer_config": arguments})

    assert resolved.notes.count("optimizer_config.adamw has no effect: optimizer is adam.") == told


def test_what_keys_of_other_trainers_mean_here_exists() -> None:
    known = {*vars(from_call()), *(f"lora_parameters.{part.name}" for part in LORA_PARAMETERS)}
    known |= {f"hf_dataset.{key}" for key in DATASET_KEYS} | {"lr_schedule.warmup"}

    assert {meant.partition(",")[0] for meant in KEYS_OF_OTHERS.values()} <= known
    assert not set(KEYS_OF_OTHERS) & known
