"""Adapters on disk: whole, loadable by mlx_lm, and the same when loaded back."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import add_adapter, assert_same, build_model, build_pairs, parameters
from mlx.utils import tree_flatten, tree_map
from mlx_lm import generate
from mlx_lm.utils import load

from mlx_cpo_plugin.checkpoints import adapter as checkpoints
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.scoring.answers import score_answers


def saved(model: nn.Module, folder: Path) -> Path:
    checkpoints.save_adapter(model, folder / "adapters.safetensors")
    checkpoints.save_adapter_config(model, folder / "adapters.safetensors")
    return folder / "adapters.safetensors"


@pytest.mark.parametrize("train_type", ["lora", "dora", "full", "lora on the last layer"])
def test_adapters_load_with_mlx_lm_and_score_the_same(tmp_path: Path, model_folder: Path, train_type: str) -> None:
    model, _ = load(str(model_folder))
    if train_type == "full":
        model.update(tree_map(lambda weight: weight * 1.1, model.parameters()))
    elif "last layer" in train_type:
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 4, "scale": 5.0, "dropout": 0.0})
        model.layers[1].self_attn.q_proj.lora_b = mx.ones((4, 128))
    else:
        add_adapter(model, dora=train_type == "dora", scale=3.0, dropout=0.1)
    model.eval()
    saved(model, tmp_path)

    loaded, tokenizer = load(str(model_folder), adapter_path=str(tmp_path))

    batch = collate(build_pairs(3, vocabulary=300))
    ours, theirs = score_answers(model, batch), score_answers(loaded, batch)
    assert np.array(ours.chosen_logps) == pytest.approx(np.array(theirs.chosen_logps), rel=1e-6)
    base, _ = load(str(model_folder))
    assert score_answers(base, batch).chosen_logps.tolist() != theirs.chosen_logps.tolist()
    assert isinstance(generate(loaded, tokenizer, prompt="There are", max_tokens=3), str)


def test_a_checkpoint_is_written_beside_the_adapter_under_the_hosts_name(tmp_path: Path) -> None:
    model = add_adapter(build_model())

    path = checkpoints.save_checkpoint(model, tmp_path / "adapters.safetensors", 100)

    assert path == tmp_path / "0000100_adapters.safetensors"
    assert path.read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_older_adapter_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(add_adapter(build_model()), tmp_path)
    before = path.read_bytes()

    def disk_full(name: str, weights: object) -> None:
        Path(name).write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", disk_full)
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors cannot be written \(.*No space left"):
        checkpoints.save_adapter(add_adapter(build_model(1)), path)

    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"^.*file/adapters\.safetensors cannot be written \(.*; free space or"):
        checkpoints.save_adapter(add_adapter(build_model()), tmp_path / "file" / "adapters.safetensors")


def test_the_dropout_of_the_layers_is_described() -> None:
    assert checkpoints.describe_adapter(add_adapter(build_model(), dropout=0.25))["lora_parameters"]["dropout"] == 0.25


def test_keys_of_an_existing_adapter_config_are_kept(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"model": "mine", "num_layers": 99}))

    saved(add_adapter(build_model()), tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "model": "mine",
        "num_layers": -1,
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0},
    }


def test_loading_restores_every_trained_parameter(tmp_path: Path) -> None:
    model, other = add_adapter(build_model(0)), add_adapter(build_model(1))
    path = saved(model, tmp_path)

    checkpoints.load_adapter(other, path)

    assert_same(parameters(other), parameters(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.0.self_attn.q_proj.lora_a"), "has no 'model.layers.0"),
        (lambda weights: weights.update(stranger=mx.zeros(2)), "has 'stranger', which the model does not train"),
        (
            lambda weights: weights.update({"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((32, 9))}),
            r"as \(32, 9\), but the model trains \(32, 4\)",
        ),
    ],
)
def test_an_adapter_of_another_training_is_refused(tmp_path: Path, change: object, message: str) -> None:
    model = add_adapter(build_model())
    weights = dict(tree_flatten(model.trainable_parameters()))
    change(weights)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)

    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_adapter(model, tmp_path / "adapters.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_missing_or_broken_adapter_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "adapters.safetensors"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_adapter(add_adapter(build_model()), path)


def test_an_adapter_that_scores_differently_when_loaded_back_is_an_error(tmp_path: Path) -> None:
    model = add_adapter(build_model())
    path = saved(add_adapter(build_model(5)), tmp_path)
    batch = collate(build_pairs(2))

    with pytest.raises(CheckpointError, match="does not score like the model that was trained"):
        checkpoints.verify_adapter(model, path, lambda: score_answers(model, batch).chosen_logps)


def test_an_adapter_that_scores_the_same_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = add_adapter(build_model())
    before, path = parameters(model), saved(model, tmp_path)
    batch = collate(build_pairs(2))

    checkpoints.verify_adapter(model, path, lambda: score_answers(model, batch).chosen_logps)

    assert_same(parameters(model), before)
