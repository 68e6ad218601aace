"""Exports: what is written gives what the adapter gives, and is there as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import jinja2
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert, generate
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, load
from support.data_tokenizers import THINKING
from support.refusals import refused

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.checkpoints.adapter import save_adapter, save_adapter_config
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity, RunRecord
from mlx_cpo_plugin.comparison.contenders import run_folder
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.export import gguf_file, peft_adapter
from mlx_cpo_plugin.export.command import default_target
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.export.folder import whole_or_nothing
from mlx_cpo_plugin.export.gguf_tokenizer import with_arguments
from mlx_cpo_plugin.export.ollama import chat_format
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.model.layers import merged_weight

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

    folder = export(adapter, quantised, data_folder, "peft", "--base-model", "someone/model")

    assert "weights of 4 bits" in capsys.readouterr().err
    assert "weights of 4 bits" in (folder / "README.md").read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/model"


# The folder


@pytest.mark.parametrize(
    ("inside", "given", "folder"), [("", ".", "run"), ("best", "..", "run"), ("best", ".", "run/best")]
)
def test_dots_stand_for_the_folder_that_they_lead_to(
    inside: str, given: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "run_settings.yaml").touch()
    monkeypatch.chdir(tmp_path / "run" / inside)

    assert default_target(Path(given), "peft") == tmp_path / f"{folder}-peft"
    assert run_folder(Path(given)).resolve() == tmp_path / "run"


def test_a_whole_model_is_no_adapter_whatever_else_is_given(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["export", str(model_folder), "--to", "mlx", "--output", str(tmp_path / "out")]

    said = refusal(capsys, call)

    assert "holds a whole model" in said
    assert said == refusal(capsys, [*call, "--model", str(model_folder)])
    assert not (tmp_path / "out").exists()


def test_what_gives_no_finite_scores_is_not_exported(
    model_folder: Path, data_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverged = shutil.copytree(adapter, tmp_path / "diverged")
    file = str(diverged / "adapters.safetensors")
    mx.save_safetensors(file, {name: value + 1e30 for name, value in dict(mx.load(file)).items()})
    call = ["export", str(diverged), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]

    assert "log-probs that are not finite" in refusal(capsys, [*call, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_only_an_export_is_replaced_and_only_when_asked_to(
    model_folder: Path, data_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(adapter, model_folder, data_folder, "peft")
    (folder / ".mark").touch()
    arguments = ["export", str(adapter), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]

    assert "--force" in refusal(capsys, arguments)
    assert "no export" in refusal(capsys, [*arguments, "--force", "--output", str(tmp_path)])
    assert (folder / ".mark").exists()

    assert ".mark" in refusal(capsys, [*arguments, "--force"])
    (folder / ".mark").rename(folder / "mine.gguf")
    assert "mine.gguf" in refusal(capsys, [*arguments, "--force"])
    (folder / "mine.gguf").unlink()

    written = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(written.replace("{", "{ ", 1))
    assert "adapter_config.json" in refusal(capsys, [*arguments, "--force"])
    (folder / "adapter_config.json").write_text(written)

    (folder / ".DS_Store").touch()
    assert cli.main([*arguments, "--force"]) == 0
    assert not (folder / ".DS_Store").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["export", str(adapter), "--to", "peft", "--model", str(tmp_path / "no model")]

    said = refusal(capsys, [*arguments, "--output", str(tmp_path / "file" / "deeper" / "out")])

    assert "cannot be written to" in said
    assert list(tmp_path.glob(".*")) == []


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


def test_a_disk_that_is_full_is_one_sentence(
    model_folder: Path,
    data_folder: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[write] Unable to write 1710 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    target = ["--to", "peft", "--output", str(tmp_path / "full")]
    words = ["export", str(adapter), *target, "--model", str(model_folder), "--data", str(data_folder)]

    assert "free space, or give another --output" in refusal(capsys, words)
    assert not (tmp_path / "full").exists()


def test_what_a_killed_export_left_is_removed_by_the_next_one(
    model_folder: Path, data_folder: Path, adapter: Path
) -> None:
    left = adapter.with_name(f".999-partial-{adapter.name}-peft")
    left.mkdir()

    export(adapter, model_folder, data_folder, "peft")

    assert not left.exists()


def test_an_export_that_was_being_replaced_when_its_process_was_killed_is_put_back(
    model_folder: Path, data_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(adapter, model_folder, data_folder, "peft")
    folder.rename(folder.with_name(f".999-removed-{folder.name}"))
    arguments = ["export", str(adapter), "--to", "peft", "--model", str(model_folder), "--data", str(data_folder)]

    assert "--force" in refusal(capsys, arguments)

    assert (folder / "export.json").is_file()
    assert not list(folder.parent.glob(".*-removed-*"))


def test_what_another_export_to_the_same_folder_is_writing_is_left_to_it(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = adapter.with_name("both")
    with whole_or_nothing(target, {}) as first:
        (first / "weights").write_text("half")

        assert "Another export is writing to" in refusal(
            capsys, ["export", str(adapter), "--to", "peft", "--output", str(target)]
        )

        assert (first / "weights").read_text() == "half"
    assert (target / "weights").read_text() == "half"


def test_the_folder_that_the_shell_is_in_is_not_replaced_beneath_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = adapter.with_name("here")
    here.mkdir()
    monkeypatch.chdir(here)

    assert "the current folder" in refusal(capsys, ["export", str(adapter), "--to", "peft", "--output", "."])

    assert os.path.samefile(here, ".")


def test_without_the_runs_rows_an_export_is_scored_on_built_in_ones(
    model_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(adapter), "--to", "peft", "--model", str(model_folder)]) == 0

    error = capsys.readouterr().err
    assert "mlx-cpo demo" in error
    assert "8 held-out rows" in error


def test_an_option_of_another_target_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--to", "peft", "--bits", "4"], ["--to", "mlx", "--bits", "7"], ["--to", "gguf", "--bits", "4"]):
        assert refusal(capsys, ["export", str(adapter), *arguments])


# GGUF

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the extra 'gguf'")


def read_gguf(file: Path) -> tuple[Arrays, str]:
    """The tensors in a file by their names, dequantised, and the architecture that it names."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return tensors, bytes(reader.fields["general.architecture"].parts[-1]).decode()


# What is not the same in all of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": False},
    "mistral": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "model_type": "llama",
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"vocab_size": 520, "tie_word_embeddings": False},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 32, "num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 4},
}


def make_model(family: str, tokenizer_folder: Path, folder: Path) -> Path:
    """A random model of a family in which no weight is as it is initialised, norms and biases included."""
    config = {
        **{"model_type": family, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 512},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        **{"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2},
        **FAMILIES[family],
    }
    model_class, args = _get_classes(config)
    mx.random.seed(1)
    weights = {
        name: value + 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model_class(args.from_dict(dict(config))).parameters())
    }
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


class LlamaCpp:
    """llama.cpp with a file, from the package xllamacpp."""

    def __init__(self, file: Path) -> None:
        llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp, in the package xllamacpp")
        parameters = llama_cpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.verbosity, parameters.warmup = 512, 1, 0, False
        parameters.cpuparams.n_threads = 1
        self.server = llama_cpp.Server(parameters)

    def next_tokens(self, prompt: str | list[int]) -> dict[int, float]:
        """The likeliest tokens after a prompt with their log-probs; none where the first is no whole character."""
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "logprobs": 4, "cache_prompt": False}
        (choice,) = self.server.handle_completions(request)["choices"]
        content = (choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
        return {token["id"]: token["logprob"] for token in content[0]["top_logprobs"]}


@needs_gguf
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_itself_gives_the_log_probs_of_the_adapter_and_reads_text_as_the_same_tokens(
    shared: Path, tmp_path: Path, data_folder: Path, family: str
) -> None:
    model = make_model(family, shared / "models" / "stories260k-chat", tmp_path / "model")
    adapter = train_adapter(model, tmp_path / "adapters", scale=1.0)
    llama_cpp = LlamaCpp(export(adapter, model, data_folder, "gguf") / "model-f16.gguf")
    tuned, tokenizer = load(str(model), adapter_path=str(adapter))
    text = "Once upon a time, 12 friends met:\n\tTom's dog"
    ids = tokenizer.encode(text, add_special_tokens=False)

    compared = 0
    for count in range(3, len(ids), 5):
        found = llama_cpp.next_tokens(ids[:count])
        given = np.array(tuned(mx.array([ids[:count]]))[0, -1].astype(mx.float32), np.float64)
        expected = given - np.log(np.exp(given).sum())
        np.testing.assert_allclose(list(found.values()), expected[list(found)], rtol=0, atol=0.05)
        if found:
            assert expected[next(iter(found))] > expected.max() - 0.05  # the likeliest, but for rounding
            compared += 1
    assert compared >= 2
    assert llama_cpp.next_tokens(text) == llama_cpp.next_tokens(ids)


@needs_gguf
def test_llama_cpp_answers_a_chat_as_the_adapter_does(shared: Path, tmp_path: Path, data_folder: Path) -> None:
    model = shared / "models" / "stories260k-chat"
    adapter = train_adapter(model, tmp_path / "adapters", scale=0.5)
    messages = [{"role": "user", "content": "One day, Tom and Sue went to the park."}]
    llama_cpp = LlamaCpp(export(adapter, model, data_folder, "gguf") / "model-f16.gguf")

    found = llama_cpp.server.handle_chat_completions({"messages": messages, "max_tokens": 24, "temperature": 0.0})

    tuned, tokenizer = load(str(model), adapter_path=str(adapter))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = generate(tuned, tokenizer, prompt, max_tokens=24)
    assert len(answer) > 20
    assert found["choices"][0]["message"]["content"].strip() == answer.strip()


@needs_gguf
@pytest.mark.parametrize("bits", [16, 8])
def test_a_gguf_file_holds_the_merged_weights_by_the_names_of_llama_cpp(
    model_folder: Path, data_folder: Path, adapter: Path, bits: int
) -> None:
    folder = export(adapter, model_folder, data_folder, "gguf", "--bits", str(bits))

    found, architecture = read_gguf(folder / f"model-{'q8_0' if bits == 8 else 'f16'}.gguf")
    weights, base = arrays(adapter / "adapters.safetensors"), arrays(model_folder / "model.safetensors")
    assert len(found) == len(base)

    def merged(name: str) -> np.ndarray:
        return base[f"{name}.weight"] + 2.5 * (weights[f"{name}.lora_a"] @ weights[f"{name}.lora_b"]).T

    within = {"rtol": 0, "atol": 5e-3 if bits == 8 else 5e-4}
    up, query = merged("model.layers.1.mlp.up_proj"), merged("model.layers.1.self_attn.q_proj")
    np.testing.assert_allclose(found["blk.1.ffn_up.weight"], up, **within)
    # In each of the 4 heads, dimension i turns with i + 16 in MLX, and with its neighbour here.
    pairs = [32 * head + i + half for head in range(4) for i in range(16) for half in (0, 16)]
    np.testing.assert_allclose(found["blk.1.attn_q.weight"], query[pairs], **within)
    np.testing.assert_allclose(found["output_norm.weight"], base["model.norm.weight"])
    assert architecture == "llama"


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}{% endif %}\n  "])
def test_a_chat_template_renders_with_the_arguments_of_training_whatever_llama_cpp_gives_it(start: str) -> None:
    words = {"one": [1, "two'", None, True], "more": {"a": False}, "nothing": None, "text": 'a"\\n{{ b }}\n'}
    template = start + THINKING + "".join(f"{{{{ {name} }}}}" for name in words)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": "Hi!"}]

    def render(template: str, arguments: dict[str, Any]) -> str:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **arguments)

    arguments = {"enable_thinking": False, "no name": 1, **words}
    found = render(with_arguments(template, arguments), {"enable_thinking": True})

    assert found == render(template, arguments)
    assert "</think>" in found


@needs_gguf
def test_a_gguf_file_has_the_template_with_the_arguments_of_its_run(
    model_folder: Path, data_folder: Path, adapter: Path
) -> None:
    run = RunRecord(RunIdentity.new(), template_arguments={"enable_thinking": False})
    (adapter / "run.json").write_text(json.dumps(run.plain()))

    folder = export(adapter, model_folder, data_folder, "gguf")

    from gguf import GGUFReader

    template = GGUFReader(folder / "model-f16.gguf").fields["tokenizer.chat_template"].contents()
    assert template.startswith("{% set enable_thinking = false %}\n{")


@needs_gguf
def test_a_quantised_base_is_written_with_the_weights_that_it_stands_for(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    quantised = tmp_path / "quantised"
    convert(str(model_folder), str(quantised), quantize=True, q_bits=4)
    adapter = train_adapter(quantised, tmp_path / "adapters", keys=ATTENTION)

    file = export(adapter, quantised, data_folder, "gguf") / "model-f16.gguf"

    stored = dict(mx.load(str(quantised / "model.safetensors")))
    parts = [stored[f"model.layers.0.mlp.up_proj.{part}"] for part in ("weight", "scales", "biases")]
    expected = np.array(mx.dequantize(*parts, group_size=64, bits=4), np.float64)
    found, _ = read_gguf(file)
    np.testing.assert_allclose(found["blk.0.ffn_up.weight"], expected, rtol=1e-3, atol=1e-6)


@needs_gguf
def test_a_file_that_does_not_score_as_the_adapter_is_not_left_behind(
    model_folder: Path,
    data_folder: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_file, "merged_weight", lambda module: 1.1 * merged_weight(module))
    arguments = ["export", str(adapter), "--to", "gguf", "--model", str(model_folder), "--data", str(data_folder)]

    assert "nats a token away" in refusal(capsys, arguments)
    assert [path.name for path in adapter.parent.iterdir() if "gguf" in path.name] == []


@needs_gguf
def test_an_added_token_without_a_row_in_the_embedding_is_left_out(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    described = json.loads((base / "tokenizer.json").read_text())
    rows = arrays(base / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    described["added_tokens"].append({**described["added_tokens"][0], "id": rows, "content": "<image_soft_token>"})
    (base / "tokenizer.json").write_text(json.dumps(described))

    file = export(train_adapter(base, tmp_path / "adapters"), base, data_folder, "gguf") / "model-f16.gguf"

    assert read_gguf(file)[0]["token_embd.weight"].shape[0] == rows


@needs_gguf
def test_what_gguf_cannot_hold_is_refused(
    model_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_otherwise = shutil.copytree(model_folder, tmp_path / "split")
    described = json.loads((split_otherwise / "tokenizer.json").read_text())
    steps = [{"type": "Punctuation", "behavior": "Isolated"}, described["pre_tokenizer"]]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (split_otherwise / "tokenizer.json").write_text(json.dumps(described))
    scaled = shutil.copytree(model_folder, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    (scaled / "config.json").write_text(json.dumps(config))

    for number, (model, word) in enumerate(((split_otherwise, "splits text"), (scaled, "yarn"))):
        adapter = train_adapter(model_folder, tmp_path / f"adapters{number}", keys=ATTENTION)
        arguments = ["export", str(adapter), "--to", "ollama", "--model", str(model), "--data", str(data_folder)]
        assert word in refusal(capsys, arguments)
        assert not adapter.with_name(f"{adapter.name}-ollama").exists()


@needs_gguf
def test_a_type_of_model_that_gguf_is_not_written_for_is_refused(
    model_folder: Path, data_folder: Path, adapter: Path
) -> None:
    trained = Trained.load(adapter, str(model_folder), str(data_folder), lambda _: None)
    trained.config["model_type"] = "cohere2"

    with refused(ExportError, "cohere2", key="to"):
        gguf_file.check_gguf(trained)


# Ollama

CHATML_IN_GO = """{{ $answered := false }}{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
<|im_start|>user
{{ else }}<|im_start|>user
{{ end }}{{ range $place, $message := .Messages }}{{ if eq .Role "user" }}{{ if $answered }}<|im_end|>
<|im_start|>user
{{ end }}{{ .Content }}<|im_end|>
<|im_start|>assistant
{{ else if eq .Role "assistant" }}{{ .Content }}{{ $answered = true }}{{ end }}{{ end }}"""


@needs_gguf
def test_a_modelfile_has_model_template_ends_and_how_to_sample(
    model_folder: Path, data_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "do_sample": True}))

    folder = export(adapter, base, data_folder, "ollama", "--bits", "8")

    assert (folder / "Modelfile").read_text() == (
        f'FROM ./model-q8_0.gguf\nTEMPLATE """{CHATML_IN_GO}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 2048\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n"
    )
    assert (folder / "model-q8_0.gguf").is_file()


Messages = list[dict[str, str]]


class Rendering:
    """In place of a tokenizer: a chat template in Python."""

    def __init__(self, render: Callable[[Messages], str]) -> None:
        self.render_messages = render

    def render(self, messages: Messages, tools: None, add_generation_prompt: bool, variant: None) -> str:
        return self.render_messages(messages)


def folded(messages: Messages) -> str:
    """As Gemma has it: what the system says opens the first message of the user; BOS in front; a header that thinks."""
    text, opening = "<bos>", ""
    for message in messages:
        if message["role"] == "system":
            opening = message["content"] + "\n\n"
        else:
            text += f"<{message['role']}>{opening}{message['content']}<end>"
            opening = ""
    return f"{text}<assistant><think>"


def without_system(messages: Messages) -> str:
    if messages[0]["role"] == "system":
        raise UnusableRow("no system role")
    return folded(messages)


@pytest.mark.parametrize(("template", "system"), [(folded, "Be kind."), (folded, None), (without_system, None)])
def test_a_chat_format_renders_as_the_chat_template(template: Callable[[Messages], str], system: str | None) -> None:
    form = chat_format(cast(Any, Rendering(template)), bos="<bos>")

    turns = ["How {{ are }} you?", "Fine.", " Bye.\n"]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)
    ]
    assert "<bos>" + form.render(turns, system) == template(messages)
    assert (form.before_system is None) == (template is without_system)


@pytest.mark.parametrize(
    "template",
    [
        lambda messages: "".join(f"{number}: {message['content']} " for number, message in enumerate(messages)),
        lambda messages: messages[-1]["content"],
        lambda messages: "".join(message["content"].upper() for message in messages),
    ],
)
def test_a_chat_template_that_does_more_than_frame_messages_is_refused(template: Callable[[Messages], str]) -> None:
    with refused(ExportError, key="to"):
        chat_format(cast(Any, Rendering(template)))
