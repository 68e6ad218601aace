"""Models as a run loads them: quantised in groups that fit, and an adapter that goes on as what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.utils
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import llama
from support.architectures import build_architecture
from support.refusals import refused
from support.tiny import build_model

from mlx_cpo_plugin.checkpoints.adapter import adaptable_modules, describe_adapter
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.run.building import choose_trained_weights, quantise_base
from mlx_cpo_plugin.settings.config import RunSettings

Settings = dict[str, Any]
RunMain = Callable[..., None]


@pytest.mark.parametrize(("width", "inner", "group"), [(256, 384, 128), (192, 384, 64), (96, 128, 32)])
def test_the_groups_are_the_largest_that_divide_every_width(width: int, inner: int, group: int) -> None:
    model = build_model(hidden_size=width, intermediate_size=inner)

    told = quantise_base(model, "load_in_4bits")

    packed = [module for module in model.modules() if isinstance(module, nn.QuantizedLinear)]
    assert {module.group_size for module in packed} == {group}
    assert len(packed) == 14
    assert model.args.quantization == {"bits": 4, "group_size": group, "mode": "affine"}
    assert f"groups of {group}." in told


def test_a_layer_that_no_group_divides_stays_as_it_is() -> None:
    model = build_model(hidden_size=64, intermediate_size=172)
    weight = np.array(model.layers[0].mlp.down_proj.weight)

    told = quantise_base(model, "load_in_4bits")

    assert "2 layers, 172 wide" in told
    assert isinstance(model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert np.array_equal(np.array(model.layers[0].mlp.down_proj.weight), weight)


@pytest.mark.parametrize("key", ["load_in_4bits", "load_in_mxfp4"])
@pytest.mark.parametrize(("name", "asked_for"), [("gpt_oss", "router"), ("granite", "o_proj"), ("qwen3_moe", "gate")])
def test_layers_for_which_a_model_asks_for_more_bits_get_them_as_where_mlx_lm_converts_it(
    name: str, asked_for: str, key: str
) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    model, converted = (build_architecture(name, **widths) for _ in range(2))

    told = quantise_base(model, key)
    packing = {part: model.args.quantization[part] for part in ("group_size", "bits", "mode")}
    _, config = mlx_lm.utils.quantize_model(converted, {}, **packing)

    assert model.args.quantization == config["quantization"]
    assert {module.bits for path, module in model.named_modules() if path.endswith(asked_for)} == {8}
    assert "layers of 8 bits, as the model asks" in told
    for layer, weight in by_name(converted.parameters()).items():
        assert mx.array_equal(by_name(model.parameters())[layer], weight), layer


def test_a_model_without_any_width_that_fits_is_refused() -> None:
    with refused(ConfigError, key="load_in_8bits"):
        quantise_base(build_model(hidden_size=40, intermediate_size=50, num_attention_heads=2), "load_in_8bits")


class Reading(llama.MLP):
    """Reads a weight of its own besides calling its layers, as the layers of Gemma 3n do."""

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = super().__call__(x)
        return output + (x @ self.up_proj.weight.T).mean()


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_a_layer_whose_weight_is_read_beside_its_call_gets_no_adapter(
    train_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model()
    for layer in model.layers:
        layer.mlp = Reading(model.args)

    choose_trained_weights(model, RunSettings.of({"train_type": train_type}))

    assert "No adapter for mlp.up_proj: the model's code reads" in capsys.readouterr().out
    keys = describe_adapter(model)["lora_parameters"]["keys"]
    assert keys == sorted(adaptable_modules(model.layers[0]) - {"mlp.up_proj"})
    assert mx.isfinite(model(mx.array([[5, 6]]))).all()
    with refused(ConfigError, "reads its weight by itself", key="lora_parameters.keys"):
        named = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
        choose_trained_weights(model, RunSettings.of({"train_type": train_type, "lora_parameters": named}))


def test_more_layers_than_there_are_are_told(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**settings, "num_layers": 100, "iters": 1})

    assert "num_layers is 100; all 2 layers" in capsys.readouterr().out


@pytest.fixture
def adapter(settings: Settings, run_main: RunMain, tmp_path: Path) -> Path:
    """An adapter of scale 4 and rank 4."""
    folder = tmp_path / "first"
    run_main({**settings, "adapter_path": str(folder), "lora_parameters": {"scale": 4.0, "rank": 4, "dropout": 0.1}})
    return folder / "adapters.safetensors"


AS_IT_WAS = {"lora_parameters": {"scale": 4.0, "rank": 4, "dropout": 0.1}}


@pytest.mark.parametrize(
    ("changes", "key", "trained_with"),
    [
        ({}, "lora_parameters.rank, lora_parameters.scale", "4, 4.0"),
        ({"lora_parameters": {"scale": 8.0, "rank": 4}}, "lora_parameters.scale", "4.0"),
        ({**AS_IT_WAS, "train_type": "dora"}, "train_type", "lora"),
        ({**AS_IT_WAS, "train_type": "full"}, "train_type", "lora"),
        ({**AS_IT_WAS, "num_layers": 1}, "num_layers", "2"),
    ],
)
def test_an_adapter_does_not_go_on_as_something_else(
    settings: Settings, run_main: RunMain, adapter: Path, changes: Settings, key: str, trained_with: str
) -> None:
    with refused(ConfigError, key=key, place=str(adapter.with_name("adapter_config.json")), allowed=trained_with):
        run_main({**settings, **changes, "resume_adapter_file": str(adapter)})

    assert not Path(settings["adapter_path"], "adapters.safetensors").exists()


def test_an_adapter_is_not_tested_as_something_else(settings: Settings, run_main: RunMain, adapter: Path) -> None:
    tested = {**settings, "train": False, "test": True, "adapter_path": str(adapter.parent)}
    run_main({**tested, **AS_IT_WAS})

    with refused(ConfigError, "adapter_path", key="lora_parameters.scale", allowed="4.0"):
        run_main({**tested, "lora_parameters": {"scale": 20.0, "rank": 4}})


@pytest.mark.parametrize("numbers", [{}, {"num_layers": 2}, {"num_layers": 7}])
def test_an_adapter_goes_on_with_the_settings_that_it_was_trained_with(
    settings: Settings, run_main: RunMain, adapter: Path, capsys: pytest.CaptureFixture[str], numbers: Settings
) -> None:
    run_main({**settings, **AS_IT_WAS, **numbers, "resume_adapter_file": str(adapter), "learning_rate": 1e-12})

    before, after = mx.load(str(adapter)), mx.load(str(Path(settings["adapter_path"], "adapters.safetensors")))
    assert all(np.allclose(np.array(before[name]), np.array(after[name]), atol=1e-8) for name in before)


def test_another_dropout_is_told_and_taken(
    settings: Settings, run_main: RunMain, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**settings, "lora_parameters": {"scale": 4.0, "rank": 4}, "resume_adapter_file": str(adapter)})

    assert "trained with dropout 0.1; it goes on with 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        {"lora_parameters": {"rank": 4, "scale": 6.0, "dropout": 0.1, "use_dora": False, "num_layers": -1}},
        {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 4, "scale": 6.0, "dropout": 0.1}},
    ],
    ids=["mlx-lm-lora", "mlx_lm"],
)
def test_the_files_of_other_trainers_are_read(
    settings: Settings, run_main: RunMain, adapter: Path, config: dict[str, Any]
) -> None:
    adapter.with_name("adapter_config.json").write_text(json.dumps(config))

    with refused(ConfigError, key="lora_parameters.scale", allowed="6.0"):
        run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})


def test_an_adapter_of_some_modules_only_says_which(settings: Settings, run_main: RunMain, adapter: Path) -> None:
    path = adapter.with_name("adapter_config.json")
    config = json.loads(path.read_text())
    config["lora_parameters"]["keys"] = ["self_attn.q_proj"]
    path.write_text(json.dumps(config))

    with refused(ConfigError, key="lora_parameters.keys", allowed="[self_attn.q_proj]"):
        run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})


MODULES = [f"mlp.{name}_proj" for name in ("down", "gate", "up")] + [f"self_attn.{name}_proj" for name in "koqv"]
ATTENTION = ["self_attn.v_proj", "self_attn.q_proj"]


def with_keys(keys: list[str], **more: Any) -> Settings:
    return {"lora_parameters": {"rank": 4, "scale": 4.0, "keys": keys}, **more}


@pytest.mark.parametrize("train_type", ["lora", "dora"])
@pytest.mark.parametrize(("num_layers", "layers"), [(-1, {"0", "1"}), (1, {"1"})])
def test_keys_are_the_modules_of_a_layer_that_get_an_adapter(
    settings: Settings, run_main: RunMain, train_type: str, num_layers: int, layers: set[str]
) -> None:
    run_main({**settings, **with_keys(ATTENTION, train_type=train_type, num_layers=num_layers)})

    folder = Path(settings["adapter_path"])
    weights = dict(mx.load(str(folder / "adapters.safetensors")))
    assert {name.rpartition(".")[0].partition("model.layers.")[2] for name in weights} == {
        f"{layer}.{module}" for layer in layers for module in ATTENTION
    }
    assert all(np.array(value).any() for value in weights.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": sorted(ATTENTION)}
    loaded, _ = mlx_lm.load(settings["model"], adapter_path=str(folder))
    adapted = {name for name, module in loaded.named_modules() if "lora_a" in module}
    assert adapted == {name.rpartition(".")[0] for name in weights}
    again = dict(mlx.utils.tree_flatten(loaded.parameters()))
    assert all(mx.array_equal(again[name], value) for name, value in weights.items())


def test_keys_may_be_modules_outside_the_layers(settings: Settings, run_main: RunMain) -> None:
    keys = ["self_attn.q_proj", "model.embed_tokens"]
    run_main({**settings, **with_keys(keys)})

    folder = Path(settings["adapter_path"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == sorted(keys)
    loaded, _ = mlx_lm.load(settings["model"], adapter_path=str(folder))
    assert "lora_a" in loaded.model.embed_tokens
    weights = dict(mx.load(str(folder / "adapters.safetensors")))
    assert np.array(weights["model.embed_tokens.lora_b"]).any()
    again = {"resume_adapter_file": str(folder / "adapters.safetensors"), "adapter_path": f"{folder}-again"}
    run_main({**settings, **with_keys(keys), **again})
    with refused(ConfigError, key="lora_parameters.keys", allowed="[model.embed_tokens, self_attn.q_proj]"):
        run_main({**settings, **with_keys(keys[:1]), **again, "adapter_path": f"{folder}-other"})


def test_all_modules_by_name_are_those_that_are_taken_without_keys(settings: Settings, run_main: RunMain) -> None:
    paths = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    run_main({**settings, **with_keys(paths), "adapter_path": settings["adapter_path"] + "-named"})
    run_main({**settings, "lora_parameters": {"rank": 4, "scale": 4.0}})

    named, unnamed = (dict(mx.load(f"{settings['adapter_path']}{end}/adapters.safetensors")) for end in ("-named", ""))
    assert named.keys() == unnamed.keys()
    assert all(mx.array_equal(named[name], unnamed[name]) for name in named)
    config = json.loads(Path(settings["adapter_path"] + "-named", "adapter_config.json").read_text())
    assert "keys" not in config["lora_parameters"]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("q_proj", "self_attn.q_proj"),
        ("model.layers.0.mlp.up_proj", "mlp.up_proj"),
        ("self_attn.q_porj", "self_attn.q_proj, self_attn.v_proj, self_attn.o_proj"),
        ("lm_head", ", ".join(MODULES)),
    ],
)
def test_a_module_that_no_layer_has_is_refused_with_the_nearest(
    settings: Settings, run_main: RunMain, key: str, near: str
) -> None:
    with refused(ConfigError, f"'{re.escape(key)}'", key="lora_parameters.keys", allowed=near):
        run_main({**settings, **with_keys(["self_attn.v_proj", key])})
    assert not Path(settings["adapter_path"]).exists()


def test_an_adapter_of_some_modules_goes_on_with_the_same_keys(
    settings: Settings, run_main: RunMain, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    run_main({**settings, **with_keys(ATTENTION), "adapter_path": str(first)})
    again = {"resume_adapter_file": str(first / "adapters.safetensors"), "learning_rate": 1e-12}

    run_main({**settings, **with_keys(ATTENTION[::-1]), **again})
    for keys in ([*ATTENTION, "mlp.up_proj"], ATTENTION[:1]):
        with refused(ConfigError, key="lora_parameters.keys", allowed="[self_attn.q_proj, self_attn.v_proj]"):
            run_main({**settings, **with_keys(keys), **again})

    before = dict(mx.load(str(first / "adapters.safetensors")))
    after = dict(mx.load(str(Path(settings["adapter_path"], "adapters.safetensors"))))
    assert before.keys() == after.keys()
    assert all(np.allclose(np.array(before[name]), np.array(after[name]), atol=1e-8) for name in before)


def test_a_run_with_other_keys_is_another_run(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, **with_keys(ATTENTION), "save_every": 1})

    with pytest.raises(ConfigError, match="lora_parameters"):
        run_main({**settings, **with_keys(ATTENTION[:1]), "resume": "auto", "iters": 3})


def test_without_a_configuration_beside_it_an_adapter_is_taken_as_the_settings_say(
    settings: Settings, run_main: RunMain, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter.with_name("adapter_config.json").unlink()

    run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})

    assert "There is no adapter_config.json beside" in capsys.readouterr().out
