"""Models as a run loads them: quantised in groups that fit, and an adapter that goes on as what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.tiny import build_model

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.run.building import quantise_base

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


def test_a_model_without_any_width_that_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="load_in_8bits needs layers whose width divides by 32"):
        quantise_base(build_model(hidden_size=40, intermediate_size=50, num_attention_heads=2), "load_in_8bits")


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
    ("changes", "told"),
    [
        ({}, r"lora_parameters\.rank 4 \(here 8\), lora_parameters\.scale 4\.0 \(here 10\.0\)"),
        ({"lora_parameters": {"scale": 8.0, "rank": 4}}, r"trained with lora_parameters\.scale 4\.0 \(here 8\.0\), as"),
        ({**AS_IT_WAS, "train_type": "dora"}, r"train_type lora \(here dora\)"),
        ({**AS_IT_WAS, "train_type": "full"}, r"train_type lora \(here full\)"),
        ({**AS_IT_WAS, "num_layers": 1}, r"num_layers 2 \(here 1\)"),
    ],
)
def test_an_adapter_does_not_go_on_as_something_else(
    settings: Settings, run_main: RunMain, adapter: Path, changes: Settings, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run_main({**settings, **changes, "resume_adapter_file": str(adapter)})

    assert not Path(settings["adapter_path"], "adapters.safetensors").exists()


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

    with pytest.raises(ConfigError, match=r"trained with lora_parameters\.scale 6\.0 \(here 4\.0\), as"):
        run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})


def test_an_adapter_of_some_modules_only_says_which(settings: Settings, run_main: RunMain, adapter: Path) -> None:
    path = adapter.with_name("adapter_config.json")
    config = json.loads(path.read_text())
    config["lora_parameters"]["keys"] = ["self_attn.q_proj"]
    path.write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"lora_parameters\.keys \['self_attn\.q_proj'\] \(here all\)"):
        run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})


def test_without_a_configuration_beside_it_an_adapter_is_taken_as_the_settings_say(
    settings: Settings, run_main: RunMain, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter.with_name("adapter_config.json").unlink()

    run_main({**settings, **AS_IT_WAS, "resume_adapter_file": str(adapter)})

    assert "There is no adapter_config.json beside" in capsys.readouterr().out
