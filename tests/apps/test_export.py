"""Exports: what is written gives what the adapter gives, and is there as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.checkpoints.adapter import save_adapter, save_adapter_config
from mlx_cpo_plugin.export import peft_adapter
from mlx_cpo_plugin.export.trained import Trained

Arrays = dict[str, np.ndarray]
PEFT_PREFIX = "base_model.model."
ATTENTION, PART_OF_A_LAYER = ["self_attn.q_proj", "self_attn.v_proj"], ["mlp.up_proj"]


def train_adapter(model: Path, folder: Path, kind: str = "lora", layers: int = 2, **parameters: Any) -> Path:
    """Leave an adapter as a run would, with random weights in place of trained ones."""
    net, _ = load(str(model))
    net.freeze()
    mx.random.seed(3)
    if kind == "full":
        net.layers[-1].unfreeze()
        weights = [(name, value + 0.02 * mx.random.normal(value.shape)) for name, value in trainable(net)]
    else:
        config = {"rank": 4, "scale": 2.5, "dropout": 0.1, **parameters}
        linear_to_lora_layers(net, layers, config, use_dora=kind == "dora")
        weights = [
            (name, value + 0.05 * mx.random.normal(value.shape).astype(value.dtype)) for name, value in trainable(net)
        ]
    net.load_weights(weights, strict=False)
    folder.mkdir()
    save_adapter(net, folder / "adapters.safetensors")
    save_adapter_config(net, folder / "adapters.safetensors")
    return folder


def trainable(net: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(net.trainable_parameters())


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    return train_adapter(model_folder, tmp_path / "adapters")


def export(adapter: Path, model: Path, data: Path, to: str, *more: str) -> Path:
    """Run the command, which has to succeed, and return the folder that it writes by default."""
    assert cli.main(["export", str(adapter), "--to", to, "--model", str(model), "--data", str(data), *more]) == 0
    return adapter.with_name(f"{adapter.name}-{to}")


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command, which has to end with exit code 2, and return its last line."""
    assert cli.main(arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([[5, 17, 80, 300, 2, 44, 11]])).astype(mx.float32))


def arrays(file: Path) -> Arrays:
    return {name: np.array(value, np.float64) for name, value in mx.load(str(file)).items()}


# PEFT


def peft_output(weights: Arrays, config: dict[str, Any], layer: str, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What PEFT computes in evaluation, in float64; DoRA as in arXiv 2402.09353, equation 5."""
    part = {key: weights[f"{PEFT_PREFIX}{layer}.{key}.weight"] for key in ("lora_A", "lora_B")}
    summed = weight + config["lora_alpha"] / config["r"] * part["lora_B"] @ part["lora_A"]
    if config["use_dora"]:
        lengths = np.linalg.norm(summed, axis=1, keepdims=True)
        summed = weights[f"{PEFT_PREFIX}{layer}.lora_magnitude_vector"][:, None] * summed / lengths
    return x @ summed.T


def found_by_peft(config: dict[str, Any], linear_layers: list[str]) -> set[str]:
    """The layers that PEFT would give an adapter: by the end of their names, and by the layer's number."""
    return {
        name
        for name in linear_layers
        if any(name == target or name.endswith(f".{target}") for target in config["target_modules"])
        and (config["layers_to_transform"] is None or int(name.split(".")[2]) in config["layers_to_transform"])
    }


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("lora", {}),
        ("dora", {"rank": 3, "scale": 7.0}),
        ("lora", {"keys": ATTENTION, "layers": 1}),
        ("dora", {"keys": PART_OF_A_LAYER, "scale": 1.0}),
    ],
)
def test_pefts_formula_over_the_written_tensors_gives_what_the_layers_give(
    model_folder: Path, data_folder: Path, tmp_path: Path, kind: str, parameters: dict[str, Any]
) -> None:
    adapter = train_adapter(model_folder, tmp_path / "adapters", kind, **parameters)

    folder = export(adapter, model_folder, data_folder, "peft")

    weights, config = (
        arrays(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    base = arrays(model_folder / "model.safetensors")
    tuned, _ = load(str(model_folder), adapter_path=str(adapter))
    adapted = {name: module for name, module in tuned.named_modules() if "lora_a" in module}
    linear_layers = [name.removesuffix(".weight") for name in base if "proj" in name]
    assert found_by_peft(config, linear_layers) == set(adapted)
    assert {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in weights} == set(adapted)
    for name, module in adapted.items():
        x = np.random.default_rng(0).normal(size=(3, base[f"{name}.weight"].shape[1]))
        expected = np.array(module(mx.array(x, mx.float32)), np.float64)
        found = peft_output(weights, config, name, base[f"{name}.weight"], x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_short_names_would_not_tell_apart_are_named_in_full(
    model_folder: Path, data_folder: Path, adapter: Path
) -> None:
    trained = Trained.load(adapter, str(model_folder), str(data_folder), lambda _: None)
    modules = {name: module for name, module in trained.model.named_modules() if "lora_a" in module}
    some = {name: module for name, module in modules.items() if ("q_proj" in name) == ("layers.0" in name)}

    targets, layers = peft_adapter._targets(some, trained.model)

    assert found_by_peft({"target_modules": targets, "layers_to_transform": layers}, list(modules)) == set(some)


PEFT_SCRIPT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
with torch.no_grad():
    found = []
    for row in rows:
        logps = model(torch.tensor([row])).logits[0].log_softmax(-1)[:-1]
        found.append(logps.gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist())
    print(json.dumps(found))
"""


def python_with_peft() -> str | None:
    """A Python that has PyTorch and PEFT: this one, or the one in PYTHON_WITH_PEFT."""
    own = sys.executable if find_spec("peft") and find_spec("torch") else None
    return os.environ.get("PYTHON_WITH_PEFT") or own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_itself_gives_every_token_the_log_prob_of_the_adapter(
    tmp_path: Path, data_folder: Path, kind: str
) -> None:
    """On the model in SMOLLM2, a folder with SmolLM2-135M in float32."""
    python, model = python_with_peft(), os.environ.get("SMOLLM2")
    if not python or not model:
        pytest.skip("needs PyTorch and PEFT, here or in PYTHON_WITH_PEFT, and a folder with SmolLM2-135M in SMOLLM2")
    keys = {"keys": ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"], "layers": 12}
    adapter = train_adapter(Path(model), tmp_path / "adapters", kind, **keys)
    (tmp_path / "row.jsonl").write_text(json.dumps({"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}))
    folder = export(adapter, Path(model), tmp_path / "row.jsonl", "peft")
    tuned, tokenizer = load(model, adapter_path=str(adapter))
    rows = [
        tokenizer.encode(text) for text in ("The capital of France is Paris.", "def add(a, b):\n    return a + b\n")
    ]

    output = subprocess.run(
        [python, "-c", PEFT_SCRIPT, model, str(folder), json.dumps(rows)], check=True, capture_output=True, text=True
    )

    for row, found in zip(rows, json.loads(output.stdout.splitlines()[-1]), strict=True):
        given = np.array(tuned(mx.array([row]))[0, :-1], np.float64)
        expected = given - np.log(np.exp(given).sum(-1, keepdims=True))
        np.testing.assert_allclose(found, expected[range(len(row) - 1), row[1:]], atol=1e-4)


def test_what_peft_cannot_hold_is_refused(
    model_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = train_adapter(model_folder, tmp_path / "full", "full")
    keys = ["model.embed_tokens", *ATTENTION]
    embedded = train_adapter(model_folder, tmp_path / "embedded", keys=keys)
    config = json.loads((embedded / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = keys  # as mlx_lm's own trainer has it
    (embedded / "adapter_config.json").write_text(json.dumps(config))
    for adapter, word in ((full, "full training"), (embedded, "LoRAEmbedding")):
        arguments = ["export", str(adapter), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]
        assert word in refusal(capsys, arguments)
        assert not adapter.with_name(f"{adapter.name}-peft").exists()


# A fused model


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_fused_model_gives_what_the_adapter_gives(
    model_folder: Path, data_folder: Path, tmp_path: Path, kind: str
) -> None:
    adapter = train_adapter(model_folder, tmp_path / "adapters", kind)

    fused, tokenizer = load(str(export(adapter, model_folder, data_folder, "mlx")))

    np.testing.assert_allclose(logits(fused), logits(load(str(model_folder), adapter_path=str(adapter))[0]), atol=1e-4)
    assert tokenizer.chat_template == load(str(model_folder))[1].chat_template


def test_a_fused_model_has_the_bits_that_are_asked_for(
    model_folder: Path, data_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(adapter, model_folder, data_folder, "mlx", "--bits", "6")

    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 6
    assert "of what was learned" in capsys.readouterr().err


def test_peft_is_told_of_a_base_of_few_bits_and_gets_the_model_that_is_named(
    model_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = tmp_path / "quantised"
    convert(str(model_folder), str(quantised), quantize=True, q_bits=4)
    adapter = train_adapter(quantised, tmp_path / "adapters")

    export(adapter, quantised, data_folder, "peft")
    assert "weights of 4 bits" in capsys.readouterr().err

    folder = export(adapter, quantised, data_folder, "peft", "--force", "--base-model", "someone/model")
    assert "weights of 4 bits" not in capsys.readouterr().err
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/model"


# The folder


def test_only_an_export_is_replaced_and_only_when_asked_to(
    model_folder: Path, data_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(adapter, model_folder, data_folder, "peft")
    (folder / "mark").touch()
    arguments = ["export", str(adapter), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]

    assert "--force" in refusal(capsys, arguments)
    assert "no export" in refusal(capsys, [*arguments, "--force", "--output", str(tmp_path)])
    assert (folder / "mark").exists()

    assert cli.main([*arguments, "--force"]) == 0
    assert not (folder / "mark").exists()


def test_an_export_that_fails_leaves_what_was_there(
    model_folder: Path,
    data_folder: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = export(adapter, model_folder, data_folder, "peft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    beside = set(folder.parent.iterdir())

    def scaled_wrongly(*arguments: Any) -> dict[str, Any]:
        return {**config(*arguments), "lora_alpha": 1}

    config = peft_adapter._config
    monkeypatch.setattr(peft_adapter, "_config", scaled_wrongly)
    arguments = ["export", str(adapter), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]

    assert re.search(r"margin of \S+ nats in place of", refusal(capsys, [*arguments, "--force"]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(folder.parent.iterdir()) == beside


def test_what_a_killed_export_left_is_removed_by_the_next_one(
    model_folder: Path, data_folder: Path, adapter: Path
) -> None:
    left = adapter.with_name(f".999-partial-{adapter.name}-peft")
    left.mkdir()

    export(adapter, model_folder, data_folder, "peft")

    assert not left.exists()


def test_without_the_runs_rows_an_export_is_scored_on_built_in_ones(
    model_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(adapter), "--to", "peft", "--model", str(model_folder)]) == 0

    error = capsys.readouterr().err
    assert "mlx-cpo demo" in error
    assert "8 held-out rows" in error


def test_an_option_of_another_target_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--to", "peft", "--bits", "4"],
        ["--to", "mlx", "--bits", "7"],
        ["--to", "mlx", "--base-model", "x"],
    ):
        assert refusal(capsys, ["export", str(adapter), *arguments])
