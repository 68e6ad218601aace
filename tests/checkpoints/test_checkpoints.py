"""Adapters on disk: whole, loadable by mlx_lm, and the same when loaded back."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import generate
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.utils import load
from support.refusals import refused
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints import adapter as checkpoints
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.model.logps import score_answers


def saved(model: nn.Module, folder: Path) -> Path:
    checkpoints.save_adapter(model, folder / "adapters.safetensors")
    checkpoints.save_adapter_config(model, folder / "adapters.safetensors")
    return folder / "adapters.safetensors"


def test_a_config_of_another_shape_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")

    saved(add_adapter(build_model()), tmp_path)

    assert json.loads((tmp_path / "adapter_config.json").read_text())["fine_tune_type"] == "lora"


@pytest.mark.parametrize("train_type", ["lora", "dora", "full", "lora on the last layer", "lora on the embedding, too"])
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
    if "embedding" in train_type:
        embedding = model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, 4, scale=3.0)
        embedding.lora_b = mx.full(embedding.lora_b.shape, 0.1)
    model.eval()
    saved(model, tmp_path)

    loaded, tokenizer = load(str(model_folder), adapter_path=str(tmp_path))

    batch = collate(build_pairs(3, vocabulary=300))
    ours, theirs = score_answers(model, batch), score_answers(loaded, batch)
    assert np.array(ours.chosen_logps) == pytest.approx(np.array(theirs.chosen_logps), rel=1e-6)
    base, _ = load(str(model_folder))
    assert score_answers(base, batch).chosen_logps.tolist() != theirs.chosen_logps.tolist()
    assert isinstance(generate(loaded, tokenizer, prompt="There are", max_tokens=3), str)


def test_a_failed_write_leaves_the_older_adapter_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(add_adapter(build_model()), tmp_path)
    before = path.read_bytes()

    def disk_full(name: str, *_: object) -> None:
        Path(name).write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", disk_full)
    with refused(CheckpointError, "No space left", key="adapter_path", place=str(path)):
        checkpoints.save_adapter(add_adapter(build_model(1)), path)

    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_two_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    def written(text: str) -> None:
        for _ in range(20):
            replace_whole(tmp_path / "file", lambda partial: partial.write_text(text))

    with ThreadPoolExecutor() as threads:
        list(threads.map(written, "ab"))

    assert (tmp_path / "file").read_text() in ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "adapters.safetensors"

    with refused(CheckpointError, key="adapter_path", place=str(path)):
        checkpoints.save_adapter(add_adapter(build_model()), path)


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
    ("change", "key", "fault"),
    [
        (lambda weights: weights.pop("model.layers.0.self_attn.q_proj.lora_a"), "train_type", "lacks 'model.layers.0"),
        (lambda weights: weights.update(stranger=mx.zeros(2)), "train_type", "has 'stranger'"),
        (
            lambda weights: weights.update({"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((32, 9))}),
            "lora_parameters",
            r"\(32, 9\).*\(32, 4\)",
        ),
    ],
)
def test_an_adapter_of_another_training_is_refused(tmp_path: Path, change: object, key: str, fault: str) -> None:
    model = add_adapter(build_model())
    weights = dict(tree_flatten(model.trainable_parameters()))
    change(weights)
    path = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(path), weights)

    with refused(CheckpointError, fault, key=key, place=str(path)):
        checkpoints.load_adapter(model, path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_missing_or_broken_adapter_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "adapters.safetensors"
    if content is not None:
        path.write_bytes(content)

    with refused(CheckpointError, "cannot be read", place=str(path)):
        checkpoints.load_adapter(add_adapter(build_model()), path)


def changed(path: Path) -> None:
    """Give one number of one parameter another last bit."""
    weights: dict[str, mx.array] = dict(mx.load(str(path)))
    name = "model.layers.1.mlp.up_proj.lora_b"
    bits = np.array(weights[name]).view(np.uint32)
    bits[0, 0] ^= 1
    mx.save_safetensors(str(path), weights | {name: mx.array(bits.view(np.float32))})


def gone(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = pytest.mark.parametrize(
    ("damage", "message"),
    [(changed, "'model.layers.1.mlp.up_proj.lora_b' in the adapter"), (gone, "cannot be read"), (cut_short, "read")],
)


@DAMAGE
def test_a_file_that_is_not_what_was_trained_is_told_and_the_model_stays_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = add_adapter(build_model())
    before, path = parameters(model), saved(model, tmp_path)
    checkpoints.verify_adapter(model, path)
    damage(path)

    with refused(CheckpointError, message, place=str(path)):
        checkpoints.verify_adapter(model, path)

    assert_same(parameters(model), before)


@DAMAGE
def test_what_happens_to_a_file_once_is_told_and_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    model, path, told = add_adapter(build_model()), tmp_path / "adapters.safetensors", []
    save, times = checkpoints.save_adapter, count()

    def save_and_damage(*arguments: Any) -> None:
        save(*arguments)
        if next(times) == 0:
            damage(path)

    monkeypatch.setattr(checkpoints, "save_adapter", save_and_damage)
    checkpoints.save_and_verify(model, path, told.append)

    assert len(told) == 1
    assert message in told[0]
    checkpoints.verify_adapter(model, path)


def test_a_file_that_is_damaged_whenever_it_is_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save = tmp_path / "adapters.safetensors", checkpoints.save_adapter
    monkeypatch.setattr(checkpoints, "save_adapter", lambda *arguments: (save(*arguments), changed(path)))

    with refused(CheckpointError, "is not what was trained", place=str(path)):
        checkpoints.save_and_verify(add_adapter(build_model()), path, lambda _: None)


def test_parameters_of_a_file_are_in_place_for_a_while_only(tmp_path: Path) -> None:
    model, other = add_adapter(build_model(0)), add_adapter(build_model(1))
    path, own = saved(other, tmp_path), parameters(model)

    def fail_within() -> None:
        with checkpoints.adapter_in_place(model, path):
            assert_same(parameters(model), parameters(other))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert_same(parameters(model), own)
    path.unlink()
    with pytest.raises(CheckpointError), checkpoints.adapter_in_place(model, path):
        pytest.fail("there is no file")
    assert_same(parameters(model), own)


def test_an_adapter_takes_the_precision_of_the_model_that_it_is_loaded_into(tmp_path: Path) -> None:
    model, narrow = add_adapter(build_model(0)), add_adapter(build_model(1))
    narrow.update(tree_map(lambda value: value.astype(mx.bfloat16), narrow.trainable_parameters()))

    checkpoints.load_adapter(model, saved(narrow, tmp_path))

    assert {value.dtype for _, value in tree_flatten(model.trainable_parameters())} == {mx.float32}
