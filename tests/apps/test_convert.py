"""``mlx-cpo convert``: what becomes of the keys of TRL, Axolotl and LLaMA-Factory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import refused

from mlx_cpo_plugin import cli, plugins
from mlx_cpo_plugin.convert.command import SOURCES, read_settings, recognised
from mlx_cpo_plugin.convert.conversion import Conversion, Source, account
from mlx_cpo_plugin.convert.writing import as_yaml, told_lines
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.run.building import build_optimizer
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings

TRL: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/pairs",
    "loss_type": "simpo",
    "cpo_alpha": 0.0,
    "simpo_gamma": 0.3,
    "beta": 2.0,
    "learning_rate": 8e-7,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_steps": 100,
    "output_dir": "out",
}
AXOLOTL: dict[str, Any] = {
    "base_model": "some/model",
    "rl": "simpo",
    "datasets": [{"path": "some/pairs", "type": "chatml.argilla"}],
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "learning_rate": 2e-4,
    "micro_batch_size": 2,
    "simpo_gamma": 0.5,
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "stage": "dpo",
    "do_train": True,
    "pref_loss": "simpo",
    "pref_beta": 2.0,
    "dataset": "some/pairs",
    "dataset_dir": "ONLINE",
    "learning_rate": 5e-6,
    "output_dir": "saves",
}
SIMPO: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "dataset_mixer": {"some/pairs": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "beta": 2.5,
    "gamma_beta_ratio": 0.55,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "max_length": 2048,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "output_dir": "out",
}
EXAMPLES = {"trl": TRL, "axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "simpo": SIMPO}
LOSS_KEYS = {"beta", "cpo_alpha", "simpo_gamma", "learning_rate", "batch_size", "iters"}
FURTHER_KEYS = re.findall(
    r"\w+",
    """
    num_train_epochs num_epochs warmup_ratio warmup_steps lr_scheduler_type lr_scheduler_kwargs eval_strategy
    eval_steps save_steps val_size val_set_size report_to run_name use_peft lora_rank lora_target_modules
    test_datasets trl optim optimizer resume_from_checkpoint gamma rpo_alpha ld_alpha chat_template save_strategy
    excess_length_strategy max_samples hub_model_id dpo_beta dpo_ftx use_swanlab
    """,
)
KEYS = sorted({*FURTHER_KEYS, *(key for example in EXAMPLES.values() for key in example)})
with_each_source = pytest.mark.parametrize("name", EXAMPLES)


def converted(
    name: str, changes: dict[str, Any] | None = None, rows: int | None = None, drop_reference: bool = False
) -> Conversion:
    """The conversion of an example in which some keys are others; None removes one."""
    values = {key: value for key, value in (EXAMPLES[name] | (changes or {})).items() if value is not None}
    return SOURCES[name][1](Source(YamlSettings("their.yaml", values, {})), rows, drop_reference)


def written(name: str, values: dict[str, Any], rows: int | None = None, file: str = "their.yaml") -> tuple[str, str]:
    """The file that a conversion makes: its head, in one line, and its settings."""
    source = Source(YamlSettings(file, values, {}))

    def convert(source: Source) -> Conversion:
        return SOURCES[name][1](source, rows, True)

    conversion = convert(source)
    text = as_yaml(conversion, told_lines(conversion, source, account(source, conversion, convert)))
    head, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    return " ".join(head.replace("#", " ").split()), body


def told(conversion: Conversion) -> str:
    return "\n".join(conversion.changed)


@pytest.fixture
def whole_family() -> None:
    """The losses and options that the other programs have."""
    options = known_options([plugins.train_modes()["cpo"]], plugins.loss_types().values())
    missing = {"simpo", "alphapo"} - set(plugins.loss_types()) | {"cpo_alpha", "label_smoothing"} - set(options)
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}, which no plugin registers")


@pytest.fixture
def convert(tmp_path: Path, whole_family: None) -> Callable[..., tuple[int, Path]]:
    """Run the command on a file with the given values; return its exit code and the file that it was to write."""

    def convert(values: Any, *words: str, name: str = "their.yaml") -> tuple[int, Path]:
        text = json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values)
        (tmp_path / name).write_text(text)
        output = tmp_path / "ours.yaml"
        return cli.main(["convert", str(tmp_path / name), "--output", str(output), *words]), output

    return convert


@with_each_source
def test_a_configuration_is_recognised_by_its_keys(name: str) -> None:
    assert recognised(YamlSettings("their.yaml", EXAMPLES[name], {})) == name


@with_each_source
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_written_is_what_training_resolves(
    convert: Callable[..., tuple[int, Path]], name: str, suffix: str
) -> None:
    code, output = convert(EXAMPLES[name], name=f"their.{suffix}")

    assert code == 0
    resolved = config.resolve({}, output).settings
    assert (resolved.train_mode, resolved.train, resolved.fuse) == ("cpo", True, False)
    assert resolved.dpo_cpo_loss_type == "simpo"
    assert resolved.model == "some/model"


def test_trl_simpo_keeps_its_loss_and_its_options() -> None:
    ours = converted("trl").settings

    assert (ours["dpo_cpo_loss_type"], ours["beta"], ours["simpo_gamma"]) == ("simpo", 2.0, 0.3)
    assert "cpo_alpha" not in ours


def test_the_defaults_of_a_cpo_config_are_written_where_ours_differ() -> None:
    nothing_said = dict.fromkeys(("loss_type", "cpo_alpha", "simpo_gamma", "beta", "learning_rate", "max_steps"))
    conversion = converted("trl", {**nothing_said, "per_device_train_batch_size": None})

    ours = conversion.settings
    assert (ours["dpo_cpo_loss_type"], ours["beta"], ours["cpo_alpha"]) == ("sigmoid", 0.1, 1.0)
    assert (ours["batch_size"], ours["epochs"], ours["learning_rate"]) == (8, 3, 1e-6)
    assert (ours["seed"], ours["max_grad_norm"], ours["max_seq_length"]) == (42, 1.0, 1024)
    assert ours["optimizer"] == "adamw"
    assert ours["optimizer_config"]["adamw"] == {
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": True,
    }
    assert ours["grad_checkpoint"] is True
    assert {"cpo_alpha", "seed", "optimizer_config", "grad_checkpoint"} <= set(conversion.defaulted)


def test_what_both_programs_do_by_default_is_not_written() -> None:
    ours = converted("llama-factory").settings

    assert "max_seq_length" not in ours  # 2048 in both
    assert "gradient_accumulation_steps" not in ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, {"dpo_cpo_loss_type": "sigmoid", "label_smoothing": 0.1}),
        ({"loss_type": "hinge"}, {"dpo_cpo_loss_type": "hinge"}),
        ({"loss_type": "ipo"}, {"dpo_cpo_loss_type": "ipo"}),
        ({"loss_type": ["simpo"]}, {"dpo_cpo_loss_type": "simpo"}),
        (
            {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.5},
            {"dpo_cpo_loss_type": "alphapo", "alphapo_alpha": 0.25, "cpo_alpha": 0.5},
        ),
        # In TRL alphapo is simpo without the likelihood term, and alpha 0 leaves its rewards as they are.
        ({"loss_type": "alphapo", "cpo_alpha": 1.0}, {"dpo_cpo_loss_type": "simpo"}),
        ({"loss_type": "alphapo", "alpha": 0.25}, {"dpo_cpo_loss_type": "alphapo", "alphapo_alpha": 0.25}),
    ],
)
def test_losses_of_trl(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    settings = converted("trl", theirs).settings

    expected = {"cpo_alpha": None, "label_smoothing": None, "alphapo_alpha": None} | ours
    assert {key: settings.get(key) for key in expected} == expected


def test_smoothing_that_trl_ignores_is_ignored_here_too() -> None:
    conversion = converted("trl", {"loss_type": "hinge", "label_smoothing": 0.1})

    assert "label_smoothing" not in conversion.settings
    assert "label_smoothing 0.1 had no effect with hinge" in told(conversion)


def test_the_margin_of_the_simpo_authors_stands_inside_beta() -> None:
    ours = converted("simpo").settings

    assert (ours["dpo_cpo_loss_type"], ours["beta"], ours["simpo_gamma"]) == ("simpo", 2.5, pytest.approx(1.375))
    assert "cpo_alpha" not in ours
    assert converted("simpo", {"sft_weight": 0.2, "beta": None}).settings["cpo_alpha"] == 0.2
    defaults = converted("simpo", {"beta": None, "gamma_beta_ratio": None}).settings
    assert (defaults["beta"], defaults["simpo_gamma"]) == (2.0, 0.5)
    with refused(ConfigError, key="loss_type", place="in their.yaml"):
        converted("simpo", {"loss_type": "hinge"})


def test_the_first_files_of_the_simpo_authors_give_the_margin_itself() -> None:
    older = {"gamma": 1.4, "gamma_beta_ratio": None}

    assert recognised(YamlSettings("their.yaml", {"beta": 2.5, "gamma": 1.4, "output_dir": "out"}, {})) == "simpo"
    assert converted("simpo", older).settings["simpo_gamma"] == 1.4
    assert converted("simpo", {"gamma": 1.4}).settings["simpo_gamma"] == pytest.approx(1.375)  # as the later ones do
    assert converted("simpo", {**older, "loss_type": "simpo"}).settings["dpo_cpo_loss_type"] == "simpo"


@pytest.mark.parametrize(
    "values",
    [
        {"loss_type": "simpo", "cpo_alpha": 1.0, "simpo_gamma": 1.4, "beta": 2.0, "gamma": None},
        {"loss_type": "sigmoid", "cpo_alpha": 0.5, "beta": 2.0, "gamma": 0.5},
        {"output_dir": "out", "num_generations": 8, "beta": 0.04, "gamma": 0.99},
        {"output_dir": "out", "rpo_alpha": 1.0, "beta": 0.1, "gamma": 0.99},
    ],
    ids=["null", "CPO", "GRPO", "DPO"],
)
def test_a_gamma_of_another_trainer_makes_no_file_one_of_the_simpo_authors(values: dict[str, Any]) -> None:
    assert recognised(YamlSettings("their.yaml", values, {})) == "trl"
    if "num_generations" in values:
        with refused(ConfigError, key="num_generations"):
            converted("simpo", values)


def test_what_dpo_weighs_its_likelihood_term_with_is_kept_and_what_else_changes_its_loss_is_named() -> None:
    theirs = {"loss_type": "sigmoid", "rpo_alpha": 0.5, "ld_alpha": 0.3, "use_weighting": True, "output_dir": "out"}
    theirs |= {"f_divergence_type": "js_divergence"}

    head, body = written("trl", theirs)

    assert yaml.safe_load(body)["cpo_alpha"] == 0.5
    assert re.search(r"No counterpart, left out: - ld_alpha, use_weighting, f_divergence_type", head)
    assert "without effect: - rpo_alpha" not in head
    axolotl = {"rl": "dpo", "rpo_alpha": 0.5}
    assert converted("axolotl", axolotl, drop_reference=True).settings["cpo_alpha"] == 0.5


@pytest.mark.parametrize("name", ["trl", "simpo"])
def test_a_chat_template_in_words_is_kept_and_a_name_is_not(name: str) -> None:
    text = "{% if x %}${name}{% endif %}"  # which is nothing of Hydra's
    assert converted(name, {"chat_template": text}).settings["chat_template"] == text
    assert "chat_template" not in converted(name, {"chat_template": "chatml"}).settings


@pytest.mark.parametrize(("theirs", "ours"), [(None, "drop"), ("truncate", "cut"), ("raise", "error")])
def test_axolotl_leaves_out_what_is_too_long(theirs: str | None, ours: str) -> None:
    conversion = converted("axolotl", {"excess_length_strategy": theirs})

    assert config.resolve(conversion.settings).settings.overlong == ours


@pytest.mark.parametrize(
    ("kind", "words"), [("chatml.intel", "does not use the model's"), ("argilla", "is not needed")]
)
def test_a_prompt_strategy_of_axolotl_that_writes_its_own_format_is_told_of(kind: str, words: str) -> None:
    assert words in told(converted("axolotl", {"datasets": [{"path": "some/pairs", "type": kind}]}))


@pytest.mark.parametrize("what", ["eval", "save"])
def test_what_axolotl_switches_off_is_not_switched_on(what: str) -> None:
    conversion = converted("axolotl", {f"{what}_strategy": "no", "val_set_size": 0.05})

    assert f"{what}_per_epoch" not in conversion.settings
    assert f"{what}_strategy no has no counterpart" in told(conversion)


def test_the_first_files_of_llama_factory_had_other_names() -> None:
    theirs = {"pref_beta": None, "dpo_beta": 0.3, "dpo_ftx": 1.0, "pref_loss": None, "dpo_loss": "ipo"}
    conversion = converted("llama-factory", theirs, drop_reference=True)

    settings = conversion.settings
    assert (settings["dpo_cpo_loss_type"], settings["beta"], settings["cpo_alpha"]) == ("ipo", 0.3, 1.0)
    assert "dpo_ftx weighs" in told(conversion)
    with refused(ConfigError, key="dpo_loss"):
        converted("llama-factory", {"pref_loss": None, "dpo_loss": "kto_pair"})


def test_the_first_rows_of_llama_factory_are_taken() -> None:
    settings = converted("llama-factory", {"max_samples": 1000}).settings

    assert settings["hf_dataset"][0]["train_split"] == "train[:1000]"
    counted = converted("llama-factory", {"max_samples": 1000, "val_size": 100, "warmup_ratio": 0.1}, rows=12_000)
    assert counted.settings["valid_fraction"] == 0.1


def test_data_sets_of_the_alignment_handbook() -> None:
    mixed = {"dataset_mixer": {"a/b": 1.0, "c/d": 0.25}, "evaluation_strategy": "steps"}

    assert converted("simpo", mixed).settings["hf_dataset"] == [
        {"path": "a/b", "train_split": "train_prefs", "valid_split": "test_prefs"},
        {"path": "c/d", "train_split": "train_prefs[:25%]", "valid_split": "test_prefs"},
    ]
    mixture = {
        "datasets": [{"id": "a/b", "config": "en", "split": "train_prefs", "weight": 0.5}],
        "test_split_size": 0.1,
    }
    ours = converted("trl", {"dataset_name": None, "dataset_mixture": mixture}).settings
    assert ours["hf_dataset"] == [{"path": "a/b", "config": "en", "train_split": "train_prefs", "weight": 0.5}]
    assert ours["valid_fraction"] == 0.1


@pytest.mark.parametrize(
    "values",
    [
        {"beta": 0.1, "output_dir": "out", "learning_rate": 1e-6},
        {"loss_type": "sigmoid", "beta": 0.1, "num_train_epochs": 1},
        {"dataset_mixer": {"a/b": 1.0}, "beta": 0.05, "max_prompt_length": 512},  # alignment-handbook, DPO or ORPO
    ],
)
def test_a_file_that_may_be_of_another_trainer_is_refused_unless_it_is_said_to_be_none(
    values: dict[str, Any], convert: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(values)[0] == 2
    assert "none of the keys that only a CPOConfig has" in capsys.readouterr().err

    assert convert(values, "--from", "trl")[0] == 0
    as_cpo = yaml.safe_load(convert(values, "--from", "trl", "--force")[1].read_text())
    as_dpo = yaml.safe_load(convert(values, "--drop-reference", "--force")[1].read_text())
    assert (as_cpo["cpo_alpha"], as_dpo.get("cpo_alpha")) == (1.0, None)


def test_a_file_of_ms_swift_is_refused(
    convert: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = convert({"rlhf_type": "simpo", "model": "some/model", "output_dir": "out", "beta": 2.0})

    assert code == 2
    assert "rlhf_type is 'simpo' in" in capsys.readouterr().err


def test_axolotl_simpo_has_the_likelihood_term_of_trl_unless_it_says_otherwise() -> None:
    assert converted("axolotl").settings["cpo_alpha"] == 1.0
    assert "cpo_alpha" not in converted("axolotl", {"cpo_alpha": 0.0}).settings
    assert converted("axolotl", {"rl_beta": 0.2}).settings["beta"] == 0.2
    assert converted("axolotl", {"rl_beta": 0.2, "trl": {"beta": 3}}).settings["beta"] == 3.0


def test_llama_factory_simpo_keeps_its_loss_and_its_options() -> None:
    conversion = converted("llama-factory", {"pref_ftx": 0.2, "simpo_gamma": 1.0})

    ours = conversion.settings
    assert (ours["dpo_cpo_loss_type"], ours["beta"], ours["simpo_gamma"], ours["cpo_alpha"]) == ("simpo", 2.0, 1.0, 0.2)
    assert "pref_ftx weighs" in told(conversion)


WITH_REFERENCE = [
    ("trl", {"loss_type": "sigmoid", "precompute_ref_log_probs": True}, "precompute_ref_log_probs", "in their.yaml"),
    ("axolotl", {"rl": "dpo"}, "rl", "in their.yaml"),
    ("axolotl", {"rl": "ipo"}, "rl", "in their.yaml"),
    ("llama-factory", {"pref_loss": "hinge"}, "pref_loss", "in their.yaml"),
    ("llama-factory", {"pref_loss": None}, "pref_loss", "by default"),
]


@pytest.mark.parametrize(("name", "changes", "key", "place"), WITH_REFERENCE)
def test_dpo_with_a_reference_model_is_refused(name: str, changes: dict[str, Any], key: str, place: str) -> None:
    with refused(ConfigError, "needs a reference model", key=key, place=place):
        converted(name, changes)


@pytest.mark.parametrize(("name", "changes"), [case[:2] for case in WITH_REFERENCE])
def test_dpo_is_converted_where_its_reference_may_be_dropped(name: str, changes: dict[str, Any]) -> None:
    conversion = converted(name, changes, drop_reference=True)

    assert conversion.settings["dpo_cpo_loss_type"] in ("sigmoid", "hinge", "ipo")
    assert "cpo_alpha" not in conversion.settings  # DPO has no likelihood term
    assert "The reference model is dropped" in told(conversion)


@pytest.mark.parametrize(
    ("name", "changes", "key", "place"),
    [
        ("trl", {"loss_type": "nll"}, "loss_type", "in their.yaml"),
        ("trl", {"loss_type": "ipo", "alpha": 0.5}, "alpha", "in their.yaml"),
        ("trl", {"learning_rate": "fast"}, "learning_rate", "in their.yaml"),
        ("trl", {"per_device_train_batch_size": 0}, "per_device_train_batch_size", "in their.yaml"),
        ("trl", {"use_peft": True, "lora_r": 0}, "lora_r", "in their.yaml"),
        ("trl", {"datasets": ["rows"]}, "datasets", "in their.yaml"),
        ("trl", {"dataset_mixer": {"a/b": 1.5}}, "dataset_mixer.a/b", "in their.yaml"),
        ("trl", {"dataset_mixer": {"a/b": 0.0}}, "dataset_mixer.a/b", "in their.yaml"),
        ("trl", {"warmup_ratio": 1.5}, "warmup_ratio", "in their.yaml"),
        ("llama-factory", {"warmup_steps": -5}, "warmup_steps", "in their.yaml"),
        ("axolotl", {"warmup_ratio": -0.1}, "warmup_ratio", "in their.yaml"),
        ("trl", {"model_name_or_path": "${oc.env:BASE}"}, "model_name_or_path", "in their.yaml"),
        ("trl", {"output_dir": "out/${beta}"}, "output_dir", "in their.yaml"),
        ("axolotl", {"rl": None}, "rl", "in their.yaml"),
        ("axolotl", {"rl": "grpo"}, "rl", "in their.yaml"),
        ("axolotl", {"rl": "orpo"}, "rl", "in their.yaml"),
        ("axolotl", {"adapter": "llama-adapter"}, "adapter", "in their.yaml"),
        ("axolotl", {"lora_r": None}, "lora_r", "in their.yaml"),
        ("axolotl", {"learning_rate": None}, "learning_rate", "in their.yaml"),
        ("llama-factory", {"stage": "sft"}, "stage", "in their.yaml"),
        ("llama-factory", {"stage": None}, "stage", "by default"),
        ("llama-factory", {"pref_loss": "orpo"}, "pref_loss", "in their.yaml"),
        ("llama-factory", {"pref_loss": "kto_pair"}, "pref_loss", "in their.yaml"),
        ("llama-factory", {"finetuning_type": "oft"}, "finetuning_type", "in their.yaml"),
        ("llama-factory", {"quantization_bit": 3}, "quantization_bit", "in their.yaml"),
    ],
)
def test_what_has_no_counterpart_at_all_is_one_sentence(
    name: str, changes: dict[str, Any], key: str, place: str
) -> None:
    with refused(ConfigError, key=key, place=place):
        converted(name, changes)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("trl", {"use_peft": True}, {"rank": 16, "dropout": 0.0, "scale": 2.0}),
        (
            "trl",
            {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": True, "disable_dropout": False},
            {"rank": 4, "dropout": 0.05, "scale": 4.0},
        ),
        ("axolotl", {"lora_dropout": 0.1}, {"rank": 32, "dropout": 0.0, "scale": 0.5}),
        ("llama-factory", {"lora_rank": 12}, {"rank": 12, "dropout": 0.0, "scale": 2.0}),
        ("llama-factory", {"lora_rank": 4, "lora_alpha": 6}, {"rank": 4, "dropout": 0.0, "scale": 1.5}),
    ],
)
def test_scale_is_alpha_over_the_rank_and_dropout_counts_only_where_the_trainer_leaves_it_on(
    name: str, changes: dict[str, Any], expected: dict[str, float]
) -> None:
    assert converted(name, changes).settings["lora_parameters"] == expected


@pytest.mark.parametrize(
    ("name", "changes", "train_type"),
    [
        ("trl", {}, "full"),
        ("trl", {"use_peft": True, "use_dora": True}, "dora"),
        ("axolotl", {"adapter": None}, "full"),
        ("axolotl", {"peft_use_dora": True}, "dora"),
        ("llama-factory", {"finetuning_type": "full"}, "full"),
        ("llama-factory", {"finetuning_type": "freeze"}, "full"),
        ("llama-factory", {}, None),  # LoRA in both
    ],
)
def test_which_weights_are_trained(name: str, changes: dict[str, Any], train_type: str | None) -> None:
    assert converted(name, changes).settings.get("train_type") == train_type


def test_frozen_layers_are_counted_from_the_last() -> None:
    frozen = {"finetuning_type": "freeze"}

    assert converted("llama-factory", frozen).settings["num_layers"] == 2
    assert converted("llama-factory", {**frozen, "freeze_trainable_layers": 5}).settings["num_layers"] == 5


def test_a_cpo_config_alone_says_nothing_of_model_and_adapters() -> None:
    conversion = converted("trl", {"model_name_or_path": None, "dataset_name": None})

    assert not {"model", "train_type", "lora_parameters", "data", "hf_dataset"} & set(conversion.settings)
    for sentence in ("names no model", "says nothing of adapters", "names no data set"):
        assert sentence in told(conversion)


@pytest.mark.parametrize(
    ("targets", "keys", "sentence"),
    [
        ("all-linear", None, ""),
        (["q_proj", "v_proj"], ["self_attn.q_proj", "self_attn.v_proj"], ""),
        (
            ["q_proj", "down_proj", "lm_head"],
            ["self_attn.q_proj", "mlp.down_proj"],
            "the adapted modules lm_head stay without an adapter",
        ),
        (["c_attn"], ["c_attn"], "keys has c_attn as it stands"),
        (None, None, "those that PEFT picks, have no counterpart"),
        (".*_proj", None, "The adapted modules, .*_proj, have no counterpart"),
        (["lm_head"], None, "every linear layer is adapted"),
    ],
)
def test_target_modules_become_paths_inside_a_layer(targets: Any, keys: list[str] | None, sentence: str) -> None:
    conversion = converted("trl", {"use_peft": True, "lora_target_modules": targets})

    assert conversion.settings["lora_parameters"].get("keys") == keys
    assert sentence in told(conversion)
    assert ("adapted modules" in told(conversion)) is ("adapted" in sentence or "counterpart" in sentence)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-factory", {"lora_target": "q_proj, v_proj"}),
        ("axolotl", {"lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]}),
    ],
)
def test_each_trainers_target_modules_are_read(name: str, changes: dict[str, Any]) -> None:
    keys = converted(name, changes).settings["lora_parameters"]["keys"]

    assert keys == ["self_attn.q_proj", "self_attn.v_proj"]


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("trl", {"load_in_4bit": True}, "load_in_4bits"),
        ("axolotl", {"load_in_8bit": True}, "load_in_8bits"),
        ("llama-factory", {"quantization_bit": 4}, "load_in_4bits"),
    ],
)
def test_a_quantised_base_model_is_loaded_in_as_many_bits(name: str, changes: dict[str, Any], key: str) -> None:
    conversion = converted(name, changes)

    assert conversion.settings[key] is True
    assert "affine quantisation" in told(conversion)


def test_optimizer_steps_become_micro_batches() -> None:
    ours = converted("trl", {"logging_steps": 5, "save_steps": 20, "eval_strategy": "steps", "eval_steps": 10}).settings

    assert ours["iters"] == 800
    assert (ours["steps_per_report"], ours["save_every"], ours["steps_per_eval"]) == (40, 160, 80)


def test_shares_of_a_run_become_micro_batches_where_the_rows_are_known() -> None:
    shares = {"max_steps": None, "num_train_epochs": 2, "eval_strategy": "steps", "save_steps": 0.5, "eval_steps": 0.5}
    ours = converted("trl", shares, rows=99).settings

    # 50 micro-batches of 2 pairs and so 7 optimizer steps an epoch, of which half the run is 7, or 56 micro-batches.
    assert (ours["epochs"], ours["steps_per_eval"], ours["save_every"]) == (2, 56, 56)
    unknown = converted("trl", shares)
    assert not {"steps_per_eval", "save_every"} & set(unknown.settings)
    assert "steps_per_eval depends on the number of training rows" in told(unknown)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("trl", {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        ("simpo", {"evaluation_strategy": "epoch", "save_strategy": "epoch"}),
        ("llama-factory", {"eval_strategy": "epoch", "save_strategy": "epoch", "val_size": 0.1}),
        ("axolotl", {"val_set_size": 0.1}),
        ("axolotl", {"val_set_size": 0.1, "evals_per_epoch": 1, "saves_per_epoch": 1}),
        ("axolotl", {"val_set_size": 0.1, "eval_strategy": "epoch", "save_strategy": "epoch"}),
    ],
)
@pytest.mark.parametrize("rows", [None, 99])
def test_once_each_epoch_needs_no_number_of_rows(name: str, theirs: dict[str, Any], rows: int | None) -> None:
    nothing_said = dict.fromkeys(("eval_steps", "save_steps", "evals_per_epoch", "saves_per_epoch"))
    ours = converted(name, {**nothing_said, **theirs}, rows).settings

    assert (ours["eval_per_epoch"], ours["save_per_epoch"]) == (True, True)
    assert not {"steps_per_eval", "save_every"} & ours.keys()


@pytest.mark.parametrize("held_out", [0.2, 4])
def test_rows_that_are_held_out_train_nothing(held_out: float) -> None:
    ours = converted("llama-factory", {"num_train_epochs": 1.5, "val_size": held_out, **SMALL}, rows=20).settings

    assert ours["valid_fraction"] == 0.2
    assert ours["iters"] == 12  # 8 micro-batches of 2 rows in an epoch


@pytest.mark.parametrize(("rows", "expected"), [(None, {"epochs": 2}), (20, {"iters": 15})])
def test_epochs_that_are_no_whole_number(rows: int | None, expected: dict[str, int]) -> None:
    conversion = converted("trl", {"max_steps": None, "num_train_epochs": 1.5}, rows)

    assert {key: conversion.settings.get(key) for key in expected} == expected
    assert "1.5 is not a whole number" in told(conversion)


SMALL = {"max_steps": None, "per_device_train_batch_size": 2}


def rates_of(conversion: Conversion, steps: int) -> list[float]:
    """The learning rate of each step of a run."""
    keys = {"learning_rate", "lr_schedule", "warmup_ratio"} & conversion.settings.keys()
    settings = {key: conversion.settings[key] for key in keys}
    named = settings["lr_schedule"]
    settings["lr_schedule"] = {"name": named} if isinstance(named, str) else named
    schedule = build_optimizer(RunSettings(**settings), steps)._schedulers["learning_rate"]
    return [float(schedule(mx.array(step))) for step in range(steps)]


def rate_of_transformers(name: str, step: int, peak: float, warmup: int, steps: int, end: float) -> float:
    """The learning rate at an optimizer step, counted from 0, after the formulas of transformers' documentation."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    if name == "linear":
        return peak * (1 - done)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize(
    ("name", "arguments", "end"),
    [("linear", {}, 0.0), ("cosine", {}, 0.0), ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 0.1)],
)
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 10}, {"warmup_ratio": 0.1}])
def test_learning_rates_are_those_of_transformers(
    name: str, arguments: dict[str, float], end: float, warmup: dict[str, float]
) -> None:
    schedule = {"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments, "learning_rate": 1e-3}
    ours = rates_of(converted("trl", {**schedule, **warmup}), 100)

    steps = 10 if warmup else 0
    for step in range(100):
        expected = rate_of_transformers(name, step, 1e-3, steps, 100, end * 1e-3)
        # MLX's own schedules have their full rate in the step after the warm-up, too.
        assert ours[step] == pytest.approx(expected, abs=2e-5 if warmup and end else 1e-9)


def test_a_constant_rate_is_no_schedule_and_one_with_a_warm_up_is() -> None:
    assert "lr_schedule" not in converted("trl", {"lr_scheduler_type": "constant", "warmup_steps": 9}).settings
    flat = converted("trl", {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10})
    assert [rates_of(flat, 501)[step] for step in (0, 5, 20, 500)] == pytest.approx([0, 4e-7, 8e-7, 8e-7])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"lr_schedule": "linear"}),
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}, {"lr_schedule": "cosine", "warmup_ratio": 0.1}),
        ({"warmup_steps": 10}, {"lr_schedule": {"name": "linear", "warmup": 10}}),
    ],
)
def test_a_schedule_over_epochs_is_taken_by_name(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    conversion = converted("trl", {"max_steps": None, "lr_scheduler_type": "linear", **changes})

    assert {key: conversion.settings[key] for key in expected} == expected
    assert ("warmup_ratio" in conversion.settings) is ("warmup_ratio" in expected)


@pytest.mark.parametrize("name", ["trl", "llama-factory"])
def test_a_schedule_over_epochs_that_does_not_end_at_zero_needs_the_number_of_rows(name: str) -> None:
    epochs = {
        "max_steps": None,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-8},
        "warmup_ratio": 0.1,
    }
    without, with_rows = converted(name, epochs), converted(name, epochs, rows=1000)

    assert (without.settings["lr_schedule"], without.settings["warmup_ratio"]) == ("constant", 0.1)
    assert "with --rows" in told(without)
    assert with_rows.settings["lr_schedule"]["arguments"][0] == with_rows.settings["learning_rate"]


@pytest.mark.parametrize("name", ["inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_a_schedule_without_a_counterpart_is_told_of(name: str) -> None:
    conversion = converted("trl", {"lr_scheduler_type": name})

    assert "lr_schedule" not in conversion.settings
    assert f"The schedule {name} has no counterpart" in told(conversion)


def test_a_schedule_without_a_counterpart_keeps_its_warm_up() -> None:
    conversion = converted("trl", {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 10})

    assert conversion.settings["lr_schedule"] == {"name": "constant", "warmup": 10}
    assert "after the warm-up" in told(conversion)


@pytest.mark.parametrize(
    ("name", "key", "optimizer", "expected", "words"),
    [
        ("trl", "optim", "adamw_torch", "adamw", ""),
        ("trl", "optim", "paged_adamw_8bit", "adamw", "keeps its state in fewer bits"),
        ("trl", "optim", "adagrad", "adamw", "adagrad has no counterpart"),
        ("trl", "optim", "lion_32bit", "lion", ""),
        ("trl", "optim", "galore_adamw_8bit", "adamw", "galore_adamw_8bit has no counterpart"),
        ("axolotl", "optimizer", "schedule_free_adamw", "adamw", "schedule_free_adamw has no counterpart"),
        ("axolotl", "optimizer", "paged_lion_8bit", "lion", "lion has it whole"),
        ("trl", "optim", "adafactor", "adafactor", ""),
        ("llama-factory", "optim", "sgd", "sgd", ""),
        ("axolotl", "optimizer", "muon", "muon", "muon is MLX's"),
        ("llama-factory", "use_muon", True, "muon", "muon is MLX's"),
    ],
)
def test_optimizers(name: str, key: str, optimizer: Any, expected: str, words: str) -> None:
    conversion = converted(name, {key: optimizer})

    assert conversion.settings["optimizer"] == expected
    assert set(conversion.settings["optimizer_config"]) == {expected}
    assert words in told(conversion)


def test_a_hub_data_set_is_validated_on_only_where_that_is_asked_for() -> None:
    assert converted("trl").settings["hf_dataset"] == [
        {"path": "some/pairs", "train_split": "train", "valid_split": None}
    ]
    validated = {"eval_strategy": "steps", "dataset_config": "en", "dataset_train_split": "train_prefs"}
    assert converted("trl", validated).settings["hf_dataset"] == [
        {"path": "some/pairs", "config": "en", "train_split": "train_prefs", "valid_split": "test"}
    ]


@pytest.mark.parametrize(("size", "rows", "share"), [(0.05, None, 0.05), (50, 1000, 0.05), (50, None, None)])
def test_rows_held_out_of_training_are_a_share_of_them(size: float, rows: int | None, share: float | None) -> None:
    conversion = converted("axolotl", {"val_set_size": size}, rows)

    assert conversion.settings.get("valid_fraction") == share
    assert ("valid_split" in conversion.settings["hf_dataset"][0]) is (share is None)


def test_columns_and_files_of_axolotl_data_sets() -> None:
    columns = {"field_prompt": "question", "field_chosen": "better", "field_rejected": "worse"}
    local = converted("axolotl", {"datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": columns}]})
    assert local.settings["data"] == "rows.jsonl"
    assert local.settings["chosen_feature"] == "better"

    several = [{"path": "rows.jsonl"}, {"path": "some/pairs", "split": "train_prefs", "name": "en", "shards": 4}]
    both = converted("axolotl", {"datasets": several})
    assert both.settings["hf_dataset"] == [
        {"path": "json", "config": {"data_files": "rows.jsonl"}, "train_split": "train", "valid_split": None},
        {"path": "some/pairs", "config": "en", "train_split": "train_prefs", "valid_split": None},
    ]
    assert "datasets.1.shards" in written("axolotl", AXOLOTL | {"datasets": several})[0]


def test_llama_factory_data_sets_are_read_from_their_description(tmp_path: Path) -> None:
    info = {
        "local": {"file_name": "rows.json", "ranking": True, "columns": {"chosen": "better", "rejected": "worse"}},
        "hub": {"hf_hub_url": "some/pairs", "subset": "en", "formatting": "sharegpt", "split": "prefs"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    local = converted("llama-factory", {"dataset": "local", "dataset_dir": str(tmp_path)}).settings
    assert (local["data"], local["chosen_feature"]) == (str(tmp_path / "rows.json"), "better")
    assert "prompt_feature" not in local
    hub = converted("llama-factory", {"dataset": ["hub"], "dataset_dir": str(tmp_path)}).settings
    assert hub["hf_dataset"] == [{"path": "some/pairs", "config": "en", "train_split": "prefs", "valid_split": None}]
    with refused(ConfigError, key="dataset", place=str(tmp_path / "dataset_info.json")):
        converted("llama-factory", {"dataset": "other", "dataset_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "instruction", "query": "input"}, "instruction+input"),
        ({"prompt": "question", "query": "context"}, "question+context"),
        ({"prompt": "question"}, "question"),
        ({"prompt": "question", "query": ""}, "question"),
        ({"prompt": "instruction", "query": "input", "history": "history"}, None),
    ],
)
def test_the_query_of_a_llama_factory_data_set_joins_its_prompt(
    columns: dict[str, str], prompt: str | None, tmp_path: Path
) -> None:
    info = {"my": {"file_name": "rows.json", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    ours = converted("llama-factory", {"dataset": "my", "dataset_dir": str(tmp_path)}).settings

    assert ours.get("prompt_feature") == prompt


def test_messages_that_the_reader_does_not_know_are_told_of(tmp_path: Path) -> None:
    tags = {"role_tag": "speaker", "content_tag": "text", "user_tag": "klant", "assistant_tag": "gpt"}
    info = {"my": {"file_name": "a.json", "ranking": True, "formatting": "sharegpt", "tags": tags}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    mapped = {
        "message_property_mappings": {"role": "speaker", "content": "text"},
        "roles": {"user": ["klant", "human"]},
    }

    for conversion in (
        converted("llama-factory", {"dataset": "my", "dataset_dir": str(tmp_path)}),
        converted("axolotl", {"datasets": [{"path": "my", "field_messages": "talk", **mapped}]}),
    ):
        assert "Messages of my have the keys speaker, text" in told(conversion)
        assert "Messages of my call the role user klant" in told(conversion)
        assert "gpt" not in told(conversion)
        assert "human" not in told(conversion)
    assert conversion.settings["hf_dataset"][0]["prompt_feature"] == "talk"


def test_a_data_set_whose_description_is_elsewhere_is_told_of(tmp_path: Path) -> None:
    conversion = converted("llama-factory", {"dataset": "mine", "dataset_dir": str(tmp_path / "none")})

    assert not {"data", "hf_dataset"} & set(conversion.settings)
    assert "dataset mine is described in dataset_info.json" in told(conversion)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("trl", {"report_to": "wandb", "run_name": "a/b"}, {"report_to": ["wandb"], "run_name": "a-b"}),
        ("trl", {"report_to": "none"}, {}),
        ("trl", {"report_to": ["tensorboard", "mlflow"]}, {"report_to": ["tensorboard"]}),
        ("axolotl", {"wandb_project": "mine"}, {"report_to": ["wandb"], "project": "mine"}),
        ("axolotl", {"use_trackio": True, "trackio_run_name": "r"}, {"report_to": ["trackio"], "run_name": "r"}),
        (
            "axolotl",
            {"use_swanlab": True, "swanlab_project": "p", "swanlab_experiment_name": "r"},
            {"report_to": ["swanlab"], "project": "p", "run_name": "r"},
        ),
        ("llama-factory", {"use_swanlab": True}, {"report_to": ["swanlab"], "project": "llamafactory"}),
    ],
)
def test_trackers(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    settings = converted(name, theirs).settings

    assert {key: settings[key] for key in ("report_to", "project", "run_name") if key in settings} == ours


@pytest.mark.parametrize("name", ["trl", "llama-factory"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"push_to_hub": True, "hub_model_id": "me/it"}, {"push_to_hub": "me/it"}),
        (
            {"push_to_hub": True, "hub_model_id": "me/it", "hub_private_repo": False},
            {"push_to_hub": "me/it", "hub_private_repo": False},
        ),
        ({"push_to_hub": True}, {}),
        ({"push_to_hub": False, "hub_model_id": "me/it"}, {}),
    ],
)
def test_a_push_goes_to_the_same_repository(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    conversion = converted(name, theirs)

    assert {key: value for key, value in conversion.settings.items() if "hub" in key} == ours
    assert ("push_to_hub" in told(conversion)) == (theirs["push_to_hub"] and "hub_private_repo" not in ours)


def test_axolotl_pushes_where_it_has_a_repository() -> None:
    assert converted("axolotl", {"hub_model_id": "me/it"}).settings["push_to_hub"] == "me/it"
    assert "push_to_hub" not in converted("axolotl", {"hub_model_id": ""}).settings


def test_the_best_checkpoint_is_kept_and_loaded_by_the_same_measure() -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins", "save_total_limit": 3}
    ours = converted("trl", best).settings

    assert (ours["save_best"], ours["load_best"], ours["keep_checkpoints"]) == ("margin", True, 3)
    assert not {"save_best", "load_best"} & converted("trl", {**best, "metric_for_best_model": "bleu"}).settings.keys()
    kept = converted("trl", {"save_strategy": "best", "metric_for_best_model": "loss"}).settings
    assert kept["save_best"] == "loss"
    assert "load_best" not in kept


@with_each_source
def test_every_key_without_a_counterpart_is_named_in_the_head(name: str) -> None:
    head, body = written(name, EXAMPLES[name] | {"deepspeed": "zero3.json", "no_such\nkey": 1, "torch_compile": False})

    left_out, off = head.partition("No counterpart, left out:")[2].split("Empty or switched off")
    assert "deepspeed, no_such\\nkey" in left_out
    assert "torch_compile" in off
    assert yaml.safe_load(body)["train_mode"] == "cpo"


@with_each_source
@given(data=st.data())
def test_every_key_at_every_depth_is_carried_over_or_named(name: str, data: st.DataObject) -> None:
    before = with_everything(name)
    holder: Any = data.draw(st.sampled_from(list(mappings_in(before))))
    key = data.draw(st.sampled_from(KEYS) | st.text("abc_", min_size=3, max_size=8))
    value = data.draw(
        st.integers(2, 9) | st.just(True) | st.floats(0.1, 0.9) | st.sampled_from(["linear", "zz", "steps"])
    )
    kept = dict(holder)
    holder.pop(key, None)
    outcomes = []
    for change in ({}, {key: value}):
        holder.update(change)
        with suppress(ConfigError):  # which names the key
            outcomes.append(written(name, before, 1000))
    holder.clear()
    holder.update(kept)

    if len(outcomes) == 2:
        (defaulted, without), (head, body) = outcomes
        # What the other program has by default is carried over where it no longer counts as such.
        carried = without != body or set(defaulted.split(", ")) - set(head.split(", "))
        assert re.search(rf"(?<!\w){re.escape(key)}(?!\w)", head) or carried, (key, value)


def with_everything(name: str) -> dict[str, Any]:
    """An example that has mappings inside it wherever they are read."""
    inside: dict[str, dict[str, Any]] = {
        "trl": {
            "datasets": [{"path": "more/pairs"}],
            "dataset_mixer": {"other/pairs": 0.5},
            "dataset_mixture": {"datasets": [{"id": "mixed/pairs"}]},
            "lr_scheduler_kwargs": {"min_lr": 1e-8},
        },
        "axolotl": {
            "trl": {"beta": 2.0},
            "datasets": [
                {"path": "some/pairs", "type": {"field_chosen": "best"}, "message_property_mappings": {"role": "role"}},
                {"path": "other/pairs", "roles": {"user": ["human"]}},
            ],
            "test_datasets": [{"path": "some/pairs"}],
        },
        "llama-factory": {"lr_scheduler_kwargs": {"min_lr": 1e-8}},
        "simpo": {},
    }
    return json.loads(json.dumps(EXAMPLES[name] | inside[name]))  # type: ignore[no-any-return]


def mappings_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings_in(item)


INFO = {
    "file_name": "rows.json",
    "ranking": True,
    "columns": {"chosen": "chosen", "rejected": "rejected"},
    "tags": {"role_tag": "from"},
}


@given(data=st.data())
def test_every_key_of_a_data_set_description_is_carried_over_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("info")
    known = [
        "history",
        "messages",
        "query",
        "prompt",
        "system",
        "tools",
        "images",
        "kto_tag",
        "user_tag",
        "content_tag",
    ]
    key = data.draw(st.sampled_from([*known, "subset", "folder", "split", "num_samples", "formatting", "zz"]))
    value = data.draw(st.sampled_from(["sharegpt", "zz", "other"]))
    place = data.draw(st.sampled_from([(), ("columns",), ("tags",)]))
    values = LLAMA_FACTORY | {"dataset": "my", "dataset_dir": str(folder)}
    outcomes = []
    for change in ({}, {key: value}):
        info = json.loads(json.dumps(INFO))
        (info[place[0]] if place else info).update(change)
        (folder / "dataset_info.json").write_text(json.dumps({"my": info}))
        with suppress(ConfigError):
            outcomes.append(written("llama-factory", values))

    if len(outcomes) == 2 and outcomes[0] == outcomes[1]:
        assert (place, key, value) == ((), "formatting", "sharegpt")  # rows are told apart by their keys


@with_each_source
def test_every_key_of_the_examples_has_a_counterpart(name: str) -> None:
    source = Source(YamlSettings("their.yaml", EXAMPLES[name], {}))

    SOURCES[name][1](source, 1000, False)

    assert source.unread() == []


def test_what_is_told_is_on_the_console_and_in_the_file(
    convert: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = convert(TRL | {"bf16": True})

    printed = capsys.readouterr().out
    head = [line.removeprefix("# ") for line in output.read_text().splitlines() if line.startswith("# ")]
    assert all(line in printed for line in head)
    assert "bf16" in printed


@pytest.mark.parametrize("name", ["trl", "axolotl"])
def test_what_is_written_trains(
    name: str,
    convert: Callable[..., tuple[int, Path]],
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    run_main: Callable[..., None],
) -> None:
    model, data, output = str(model_folder), str(data_folder), str(tmp_path / "adapters")
    changes = {
        "trl": {"model_name_or_path": model, "dataset_name": data, "gradient_accumulation_steps": 1},
        "axolotl": {"base_model": model, "datasets": [{"path": data, "type": "chatml.argilla"}]},
    }
    _, ours = convert(EXAMPLES[name] | changes[name] | {"output_dir": output, "max_steps": 2})

    run_main({"config": str(ours), "fuse": False})

    lines = [json.loads(line) for line in (tmp_path / "adapters" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["iteration"] for line in lines) == 2
    recorded = yaml.safe_load((tmp_path / "adapters" / "run_settings.yaml").read_text())
    asked_for = yaml.safe_load(ours.read_text())
    assert recorded["dpo_cpo_loss_type"] == "simpo"
    for key in LOSS_KEYS & asked_for.keys():
        assert recorded[key] == asked_for[key], key
    adapter = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert all(mx.abs(value).max() > 0 for value in adapter.values())  # those of B began at zero


def test_without_an_output_file_the_result_is_printed(
    tmp_path: Path, whole_family: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "their.json").write_text(json.dumps(TRL, indent="\t"))

    assert cli.main(["convert", str(tmp_path / "their.json")]) == 0

    assert yaml.safe_load(capsys.readouterr().out)["dpo_cpo_loss_type"] == "simpo"


def test_an_output_file_is_not_overwritten_without_force(
    convert: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ours.yaml").write_text("mine")

    code, output = convert(TRL)

    assert (code, output.read_text()) == (2, "mine")
    assert capsys.readouterr().err.endswith("is there already; give another --output, or --force to overwrite it.\n")
    assert convert(TRL, "--force")[0] == 0
    assert "train_mode: cpo" in output.read_text()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("missing.yaml", None, "The configuration file {file} cannot be read (No such file or directory)"),
        ("their.yaml", "a: [1", "{file}, line 1 is not valid YAML"),
        ("their.json", '{"a": ', "{file} is not valid JSON; correct it."),
        ("their.json", "[1]", "{file} holds no JSON object"),
        ("their.py", "CPOConfig(beta=0.1)", "{file} is a program, and none is run here"),
        ("their.yaml", "a: 1", "{file} has no key by which"),
        ("their.yaml", "train_mode: cpo", "{file} has train_mode"),
    ],
)
def test_a_file_that_cannot_be_converted_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, sentence: str
) -> None:
    file, output = tmp_path / name, tmp_path / "ours.yaml"
    if text is not None:
        file.write_text(text)

    assert cli.main(["convert", str(file), "--output", str(output)]) == 2

    printed = capsys.readouterr().err
    assert printed.startswith("error: " + sentence.format(file=file))
    assert printed.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"beta": -1.0}, "beta is -1.0 from beta {place}, but must"),
        ({"max_steps": None, "num_train_epochs": -2}, "epochs is -2 from num_train_epochs {place}, but must"),
        ({"loss_type": "simpo", "simpo_gamma": -3.0}, "simpo_gamma is -3.0 from simpo_gamma {place}, but must"),
        ({"use_peft": True, "lora_r": 0}, "lora_r is 0 {place}, but it must"),
    ],
)
def test_a_value_that_training_would_refuse_is_refused_with_the_key_and_the_line_that_it_comes_from(
    convert: Callable[..., tuple[int, Path]],
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = convert(TRL | changes)

    file = tmp_path / "their.yaml"
    key = list(changes)[-1]
    (line,) = [number for number, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(f"{key}:")]
    assert code == 2
    assert capsys.readouterr().err.startswith("error: " + sentence.format(place=f"in {file}, line {line}"))
    assert not output.exists()


def test_no_length_at_all_is_that_of_trls_trainer() -> None:
    source = Source(YamlSettings("their.yaml", TRL | {"max_length": None}, {}))

    assert SOURCES["trl"][1](source, None, False).settings["max_seq_length"] == 512


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "beta", "min_lr"]), inner),
    max_leaves=4,
)


@given(
    st.sampled_from(sorted(EXAMPLES)),
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3),
    st.none() | st.integers(1, 1000),
)
def test_any_values_are_converted_or_refused(name: str, changes: dict[str, Any], rows: int | None) -> None:
    text = "train_mode: cpo"
    with suppress(ConfigError):
        text = written(name, EXAMPLES[name] | changes, rows)[1]

    assert yaml.safe_load(text)["train_mode"] == "cpo"


@pytest.mark.parametrize(("name", "limited"), [("trl", False), ("simpo", False), ("axolotl", True)])
def test_no_limit_of_the_norm_stays_none(name: str, limited: bool) -> None:
    source = Source(YamlSettings("their.yaml", EXAMPLES[name] | {"max_grad_norm": None}, {}))

    assert ("max_grad_norm" in SOURCES[name][1](source, None, False).settings) is limited


def test_a_key_that_stands_twice_in_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "their.json").write_text('{"cpo_alpha": 1, "beta": 0.2, "beta": 0.3}')

    file = str(tmp_path / "their.json")
    with refused(ConfigError, "has the key beta twice", key="beta", place=file):
        read_settings(file)
