"""Settings of a run: command line > YAML file > default, and the notes on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm_lora.train import build_parser as build_host_parser
from support.refusals import refused

from mlx_cpo_plugin import plugins
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings import command_line, config
from mlx_cpo_plugin.settings.cpo_options import BETA, CPO_ALPHA, DELTA, PRESETS, Preset
from mlx_cpo_plugin.settings.nested import OPTIMIZERS
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS, PRECISIONS
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.types import Option

SCHEDULES = [{"name": "cosine_decay", "arguments": [1e-5, 100]}, {"name": "step_decay", "arguments": [1e-4, 0.5, 10]}]

# Every key with a value for the YAML file and another one for the call, neither of them the default.
VALUES: dict[str, tuple[Any, Any]] = {
    "model": ("yaml-model", "call-model"),
    "load_in_4bits": (True, False),
    "load_in_6bits": (True, False),
    "load_in_8bits": (True, False),
    "load_in_mxfp4": (True, False),
    "train_type": ("dora", "full"),
    "num_layers": (4, 8),
    "lora_parameters": ({"rank": 4, "dropout": 0.5, "scale": 2.0}, {"rank": 2, "dropout": 0.25, "scale": 1.0}),
    "data": ("yaml-data", "call-data"),
    "hf_dataset": ([{"path": "yaml"}], [{"path": "call"}]),
    "valid_fraction": (0.1, 0.2),
    "chosen_feature": ("better", "best"),
    "rejected_feature": ("worse", "worst"),
    "prompt_feature": ("question", "input"),
    "system_feature": ("rules", "role"),
    "completion_pairs": ("all", "best_worst"),
    "min_gap": (1.0, 2.0),
    "max_seq_length": (512, 1024),
    "train": (True, False),
    "test": (True, False),
    "optimizer": ("adamw", "lion"),
    "optimizer_config": (
        {**{name: {} for name in OPTIMIZERS}, "adamw": {"weight_decay": 0.1}},
        {**{name: {} for name in OPTIMIZERS}, "adam": {"eps": 1e-6}},
    ),
    "learning_rate": (1e-4, 2e-4),
    "lr_schedule": (SCHEDULES[0], SCHEDULES[1]),
    "warmup_ratio": (0.1, 0.2),
    "batch_size": (2, 3),
    "gradient_accumulation_steps": (4, 5),
    "iters": (7, 8),
    "epochs": (2, 3),
    "steps_per_report": (1, 2),
    "steps_per_eval": (3, 4),
    "val_batches": (-1, 6),
    "test_batches": (-1, 8),
    "seed": (1, 2),
    "grad_checkpoint": (True, False),
    "efficient_long_context": (True, False),
    "seq_step_size": (64, 128),
    "recurrence_chunk_size": (16, 32),
    "adapter_path": ("yaml-adapters", "call-adapters"),
    "resume_adapter_file": ("yaml.safetensors", "call.safetensors"),
    "save_every": (10, 20),
    "fuse": (False, True),
    "fuse_bits": (4, 8),
    "lm_studio_name": ("yaml-name", "call-name"),
    "push_to_hub": ("yaml/name", "call-name"),
    "hub_private_repo": (False, True),
    "wandb": ("yaml-project", "call-project"),
    "report_to": (["wandb"], ["tensorboard", "trackio"]),
    "project": ("yaml-project", "call-project"),
    "run_name": ("yaml-run", "call-run"),
    "qat_enable": (True, False),
    "qat_bits": (4, 6),
    "qat_group_size": (32, 0),
    "qat_quantizer": ("host", "mlx"),
    "qat_mode": ("mxfp4", "affine"),
    "qat_start_step": (5, 6),
    "qat_interval": (2, 3),
    "beta": (0.05, 0.02),
    "delta": (5.0, 6.0),
    "cpo_alpha": (0.5, 1.0),
    "label_smoothing": (0.1, 0.2),
    "simpo_gamma": (0.3, 0.7),
    "alphapo_alpha": (0.1, -0.5),
    "preset": ("simpo", "dpop"),
    "dpo_cpo_loss_type": ("dpop", "ipo"),
    "reference_model_path": ("yaml-reference", "call-reference"),
    "scoring": ("plain", "shared"),
    "overlong": ("drop", "error"),
    "chat_template": ("{{ messages }}", "template.jinja"),
    "chat_template_kwargs": ({"enable_thinking": False}, {"enable_thinking": True}),
    "pass_overhead": (16, 64),
    "batch_tokens": (500, 600),
    "max_grad_norm": (1.0, 2.0),
    "resume": ("auto", "another-run"),
    "keep_checkpoints": (3, 4),
    "save_best": ("margin", "loss"),
    "load_best": (True, True),
    "eval_per_epoch": (True, True),
    "save_per_epoch": (True, True),
    "sample_prompts": (["How, and why?"], ["Why?", {"prompt": "How?"}]),
    "steps_per_sample": (20, 0),
    "early_stopping_patience": (5, 6),
}

every_key = pytest.mark.parametrize("key", VALUES)


def write(folder: Path, content: str | Mapping[str, Any]) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


LOSS_OF = {"delta": "dpop", "simpo_gamma": "simpo", "alphapo_alpha": "alphapo"}
"""Option that the default loss does not read -> one that does."""


def base(key: str) -> dict[str, Any]:
    """A configuration that is complete, whatever ``key`` is set to."""
    loss = {"dpo_cpo_loss_type": LOSS_OF[key]} if key in LOSS_OF else {}
    return {"train_mode": "cpo", "test": True} if key == "train" else {"train_mode": "cpo", "train": True, **loss}


def words(values: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as a mapping."""
    line = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line.append(f"--{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return line


def from_words(*line: str) -> SimpleNamespace:
    return config.resolve(list(line)).settings


def from_call(**values: Any) -> SimpleNamespace:
    return config.resolve({"train_mode": "cpo", "train": True, **values}).settings


def notes(**values: Any) -> tuple[str, ...]:
    return config.resolve({"train_mode": "cpo", "train": True, **values}).notes


def test_the_table_of_values_covers_every_key() -> None:
    mode = plugins.train_modes()["cpo"]

    assert set(VALUES) == {option.name for option in (*COMMON_OPTIONS, *mode.options)}


@every_key
def test_default_holds_when_nothing_is_given(key: str) -> None:
    options = {option.name: option for option in (*COMMON_OPTIONS, *plugins.train_modes()["cpo"].options)}

    resolved = config.resolve(base(key)).settings

    assert getattr(resolved, key) == options[key].default


@every_key
def test_yaml_overrides_the_default(key: str, tmp_path: Path) -> None:
    file = write(tmp_path, base(key) | {key: VALUES[key][0]})

    assert getattr(from_words("--config", str(file)), key) == VALUES[key][0]


@every_key
def test_command_line_overrides_yaml(key: str, tmp_path: Path) -> None:
    file = write(tmp_path, base(key) | {key: VALUES[key][0]})

    assert getattr(from_words("--config", str(file), *words({key: VALUES[key][1]})), key) == VALUES[key][1]


@every_key
def test_mapping_of_a_call_overrides_yaml(key: str, tmp_path: Path) -> None:
    file = write(tmp_path, base(key) | {key: VALUES[key][0]})

    resolved = config.resolve({"config": str(file), key: VALUES[key][1]}).settings

    assert getattr(resolved, key) == VALUES[key][1]


@every_key
def test_namespace_of_mlx_lm_loras_parser_overrides_yaml_only_where_it_was_given(key: str, tmp_path: Path) -> None:
    file = write(tmp_path, base(key) | {key: VALUES[key][0]})
    namespace = build_host_parser().parse_args(["--config", str(file), "--steps-per-report", "9"])

    resolved = config.resolve(namespace).settings

    assert getattr(resolved, key) == (9 if key == "steps_per_report" else VALUES[key][0])


def test_none_in_a_call_is_not_given(tmp_path: Path) -> None:
    file = write(tmp_path, base("beta") | {"beta": 0.03})

    assert command_line.explicit({"beta": None, "delta": 1}) == {"delta": 1}
    assert config.resolve({"config": str(file), "beta": None}).settings.beta == 0.03


def test_empty_value_in_yaml_leaves_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nbatch_size:\nwandb: null\n")

    resolved = from_words("-c", str(file))

    assert (resolved.batch_size, resolved.wandb) == (1, None)


def test_file_given_beside_the_call_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, base("seed") | {"seed": 5})

    resolved = config.resolve({}, file).settings

    assert (resolved.seed, resolved.config_file, resolved.config) == (5, str(file), None)


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "auto"), ("false", None), ("auto", "auto"), ("runs/a", "runs/a")]
)
def test_true_resumes_like_auto(tmp_path: Path, written: str, meant: str | None) -> None:
    file = write(tmp_path, f"train_mode: cpo\ntrain: true\nresume: {written}\n")

    assert from_words("-c", str(file)).resume == meant
    assert from_words("--train-mode=cpo", "--train", f"--resume={written}").resume == meant


def test_lora_parameters_given_in_part_keep_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nlora_parameters: {rank: 4}\n")

    in_yaml = from_words("-c", str(file)).lora_parameters
    in_both = from_words("-c", str(file), "--lora-parameters={dropout: 0.1}").lora_parameters

    assert in_yaml == {"rank": 4, "dropout": 0.0, "scale": 10.0}
    assert in_both == {"rank": 4, "dropout": 0.1, "scale": 10.0}


def test_settings_of_one_run_are_not_shared_with_the_next() -> None:
    from_call().lora_parameters["rank"] = 99
    from_call().optimizer_config["adam"]["eps"] = 1

    assert from_call().lora_parameters["rank"] == 8
    assert from_call().optimizer_config["adam"] == {}


def test_keys_of_other_modes_are_passed_on_unchecked(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\ngroup_size: many\ntext_feature: body\n")

    resolved = from_words("-c", str(file), "--klpo-top-k", "3")

    assert (resolved.group_size, resolved.text_feature, resolved.klpo_top_k) == ("many", "body", 3)
    assert resolved.judge_config == {}


VALID = {
    "float": st.floats(1e-6, 0.9),
    "int": st.integers(2, 16).filter(bool),
    # argparse drops a value of two dashes
    "str": st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=12).filter(lambda text: text != "--"),
    "bool": st.booleans(),
}


def valid_value(option: Option) -> st.SearchStrategy[Any]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.type in (dict, list):
        return st.sampled_from(VALUES[option.name])
    if option.name == "max_seq_length":
        return st.integers(4, 100_000)
    if option.name in ("lm_studio_name", "run_name"):
        return st.sampled_from(["name", "a b"])
    if option.name == "push_to_hub":
        return st.sampled_from(["name", "account/name"])
    return VALID[option.type.__name__]


CONTRADICTING = ("train", "qat_quantizer", *PRECISIONS)
CHECKED = [option for option in (*COMMON_OPTIONS, BETA, DELTA, CPO_ALPHA) if option.name not in CONTRADICTING]


@given(st.fixed_dictionaries({}, optional={option.name: valid_value(option) for option in CHECKED}))
def test_mapping_and_command_line_resolve_equally(values: dict[str, Any]) -> None:
    call = {"train_mode": "cpo", "train": True, "dpo_cpo_loss_type": "dpop", **values}

    by_mapping = config.resolve(call)
    by_words = config.resolve(words(call))

    assert by_mapping == by_words
    assert all(getattr(by_words.settings, key) == value for key, value in values.items())


@pytest.mark.parametrize(
    ("loss", "read"),
    [
        ("sigmoid", {"beta": 0.05, "label_smoothing": 0.0}),
        ("hinge", {"beta": 0.05}),
        ("ipo", {"beta": 0.05}),
        ("dpop", {"beta": 0.05, "delta": 50.0}),
        ("simpo", {"beta": 0.05, "simpo_gamma": 0.5, "label_smoothing": 0.0}),
        ("alphapo", {"beta": 0.05, "simpo_gamma": 0.5, "alphapo_alpha": 0.25, "label_smoothing": 0.0}),
    ],
)
def test_chosen_loss_gets_exactly_its_options(loss: str, read: dict[str, float]) -> None:
    assert from_call(dpo_cpo_loss_type=loss, beta=0.05).loss_options == read


@pytest.mark.usefixtures("rank")
def test_loss_from_elsewhere_brings_its_options(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nrank_margin: 1.5\n")

    resolved = from_words("-c", str(file), "--dpo-cpo-loss-type", "rank")

    assert resolved.loss_options == {"beta": 2.0, "rank_margin": 1.5}
    assert from_words("-c", str(file), "--dpo-cpo-loss-type", "rank", "--rank-margin", "2").rank_margin == 2.0


@pytest.mark.usefixtures("rank")
def test_loss_from_elsewhere_sets_the_range_of_its_options() -> None:
    assert from_call(dpo_cpo_loss_type="sigmoid", beta=11).beta == 11
    with refused(ConfigError, key="beta", place="in the call"):
        from_call(dpo_cpo_loss_type="rank", beta=11)


@pytest.mark.usefixtures("judged")
def test_mode_without_losses_has_no_loss_options_and_every_common_setting() -> None:
    resolved = from_words("--train-mode", "judged", "--train", "--temper", "2")

    assert (resolved.temper, resolved.loss_options) == (2.0, {})
    assert all(hasattr(resolved, option.name) for option in COMMON_OPTIONS)


def test_no_note_on_usual_settings() -> None:
    assert notes(beta=0.1, delta=50.0, iters=5) == ()


def test_note_on_a_large_beta() -> None:
    assert notes(beta=0.2) == ("beta is 0.2: without a reference model a large beta overshoots; start with 0.05.",)


def test_no_note_on_the_beta_of_a_loss_of_means() -> None:
    assert notes(dpo_cpo_loss_type="simpo", beta=2.0) == ()
    assert notes(dpo_cpo_loss_type="ipo", beta=0.05) == ()


def test_note_on_a_beta_with_which_no_margin_of_means_is_reached() -> None:
    assert notes(dpo_cpo_loss_type="simpo", beta=0.05) == (
        "beta is 0.05: simpo averages log-probs over an answer's tokens; from 2 to 10 is usual.",
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_fills_what_nobody_sets(preset: Preset, tmp_path: Path) -> None:
    file = write(tmp_path, f"train_mode: cpo\ntrain: true\npreset: {preset.name}\n")

    resolved = from_words("-c", str(file))

    assert {key: getattr(resolved, key) for key in preset.values} == preset.values
    of_loss = {key: value for key, value in preset.values.items() if key not in ("dpo_cpo_loss_type", "cpo_alpha")}
    assert resolved.loss_options.items() >= of_loss.items()


def test_command_line_and_yaml_win_over_a_preset(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\npreset: cpo-simpo\nbeta: 4\ncpo_alpha: 0\n")

    resolved = config.resolve(["-c", str(file), "--beta", "3", "--simpo-gamma", "1.5"])

    settings = resolved.settings
    assert (settings.dpo_cpo_loss_type, settings.beta, settings.cpo_alpha) == ("simpo", 3.0, 0.0)
    assert settings.loss_options == {"beta": 3.0, "simpo_gamma": 1.5, "label_smoothing": 0.0}
    assert resolved.notes == ("preset cpo-simpo sets dpo_cpo_loss_type: simpo.",)


def test_note_on_what_a_preset_sets() -> None:
    assert notes(preset="simpo") == (
        "preset simpo sets dpo_cpo_loss_type: simpo, beta: 2.0, simpo_gamma: 1.0, cpo_alpha: 0.0.",
    )
    assert notes(preset="dpop", **dict.fromkeys(("beta", "delta", "cpo_alpha"), 0.05), dpo_cpo_loss_type="dpop") == (
        "preset dpop has no effect: everything it sets is set explicitly.",
    )


def test_a_preset_beside_its_own_loss_is_no_contradiction(tmp_path: Path) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\npreset: simpo\ndpo_cpo_loss_type: simpo\n")

    assert from_words("-c", str(file)).beta == 2.0


def test_values_of_presets_are_within_the_range_of_their_options() -> None:
    options = {option.name: option for option in plugins.train_modes()["cpo"].options}

    for preset in PRESETS:
        for key, value in preset.values.items():
            assert check(options[key], value, lambda key: "in a preset") == value
            assert type(value) is options[key].type
        assert preset.source


@pytest.mark.usefixtures("rank")
def test_no_note_on_the_beta_that_a_loss_asks_for() -> None:
    assert notes(dpo_cpo_loss_type="rank", beta=2.0) == ()


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "dpop", "simpo", "alphapo"])
def test_what_a_loss_does_not_read_may_be_given_at_its_default(loss: str) -> None:
    defaults = {option.name: option.default for option in plugins.train_modes()["cpo"].options}
    given_values = {key: defaults[key] for key in ("delta", "label_smoothing", "simpo_gamma", "alphapo_alpha")}

    beta = 2.0 if loss in ("simpo", "alphapo") else 0.1
    assert notes(dpo_cpo_loss_type=loss, beta=beta, **given_values) == ()


def test_note_on_a_reference_model() -> None:
    assert notes(reference_model_path="base") == ("reference_model_path has no effect: cpo uses no reference model.",)


def test_note_when_iters_and_epochs_are_both_set() -> None:
    assert notes(iters=5, epochs=2) == ("epochs has no effect: iters is set, too.",)


def test_note_on_rows_that_are_named_twice() -> None:
    assert notes(data="rows", hf_dataset=[{"path": "hub"}]) == ("data has no effect: hf_dataset is set, too.",)


@pytest.mark.parametrize(
    ("in_file", "in_call"),
    [
        ({"hf_dataset": [{"path": "hub"}]}, {"data": "rows"}),
        ({"iters": 2}, {"epochs": 1}),
        ({"eval_per_epoch": True}, {"steps_per_eval": 3}),
        ({"save_per_epoch": True}, {"save_every": 3}),
    ],
)
def test_a_call_wins_over_a_key_of_the_file_that_would_overrule_it(
    in_file: dict[str, Any], in_call: dict[str, Any], tmp_path: Path
) -> None:
    file = write(tmp_path, {"train_mode": "cpo", "train": True, **in_file})
    ((overruled, _),), ((winner, value),) = in_file.items(), in_call.items()

    by_words = config.resolve(["--config", str(file), *words(in_call)])
    by_mapping = config.resolve({"config": str(file), **in_call})

    for resolved, where in ((by_words, "on the command line"), (by_mapping, "in the call")):
        assert getattr(resolved.settings, winner) == value
        assert not getattr(resolved.settings, overruled)
        assert resolved.notes == (f"{overruled} has no effect (in {file}, line 1): {winner} is given {where}.",)


def test_a_null_of_the_command_line_wins_over_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, {"train_mode": "cpo", "train": True, "iters": 3, "epochs": 2})

    resolved = config.resolve(["--config", str(file), "--epochs", "null"])

    assert (resolved.settings.iters, resolved.settings.epochs, resolved.notes) == (3, None, ())


def test_a_call_that_gives_both_is_taken_at_its_word(tmp_path: Path) -> None:
    file = write(tmp_path, {"train_mode": "cpo", "train": True})

    assert from_words("-c", str(file), "--iters", "3", "--epochs", "2").iters == 3


def test_note_on_keys_that_only_other_modes_read() -> None:
    assert notes(temperature=0.5) == ("temperature has no effect with cpo.",)
    assert notes(alpha=[0.9], micro_batch_size=4, text_feature="body") == (
        "alpha and micro_batch_size and text_feature have no effect with cpo.",
    )
    assert notes(temperature=1.0, group_size=4) == (), "the host's defaults"


@pytest.mark.parametrize("option", [option.name for option in COMMON_OPTIONS if option.optional])
def test_null_on_the_command_line_is_the_default(option: str, tmp_path: Path) -> None:
    file = write(tmp_path, base(option) | {option: VALUES[option][0]})

    assert getattr(from_words("-c", str(file), f"--{option.replace('_', '-')}", "null"), option) is None


@pytest.mark.parametrize(("words", "option", "default"), [("--beta", "beta", 0.1), ("--data", "data", "data/")])
def test_null_is_the_default_also_of_options_that_always_have_a_value(
    words: str, option: str, default: object, tmp_path: Path
) -> None:
    file = write(tmp_path, "train_mode: cpo\ntrain: true\nbeta: 0.3\ndata: mine/\n")

    assert getattr(from_words("-c", str(file), words, "null"), option) == default


def test_no_layer_at_all_is_refused() -> None:
    with refused(ConfigError, "num_layers is 0 in the call, but must be a whole number >= 1, or -1 for all"):
        from_call(num_layers=0)


def test_note_when_a_batch_is_measured_both_ways() -> None:
    assert notes(batch_size=2, batch_tokens=500) == ("batch_size has no effect on training: batch_tokens is set, too.",)
    assert notes(batch_tokens=500) == ()
