"""An adapter folder as a run leaves it, and a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from support.hub import TOKEN, Hub, serve_hub

from mlx_cpo_plugin.publish import card

SETTINGS = {
    "train_mode": "cpo",
    "train": True,
    "model": "account/base-model",
    "data": "/home/somebody/secret customers/rows.jsonl",
    "dpo_cpo_loss_type": "simpo",
    "beta": 2.0,
    "simpo_gamma": 1.0,
    "delta": 7.0,
    "train_type": "dora",
    "learning_rate": 5e-06,
    "batch_size": 4,
    "iters": 60,
    "max_seq_length": 512,
    "seed": 0,
    "adapter_path": "/home/somebody/adapters",
    "sample_prompts": ["What does Mrs Miller owe us?"],
}


def report(kind: str, iteration: int, accuracy: float) -> str:
    prefix = {"train": "train", "valid": "val", "test": "test"}[kind]
    figures = {"accuracies": accuracy, "margins": accuracy / 2, "loss": 1 - accuracy, "nll_loss": 0.25}
    values = {f"{prefix}_{name}": value for name, value in figures.items()}
    return json.dumps({"kind": kind, "run": "r", "time": 1e9 + iteration, "iteration": iteration, **values})


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(card, "as_png", lambda *_: b"\x89PNG")  # to draw takes longer than all else
    folder = tmp_path / "polite"
    (folder / "checkpoints" / "0000060").mkdir(parents=True)
    (folder / "best").mkdir()
    lines = [report("valid", 1, 0.5)]
    for iteration in range(10, 70, 10):
        lines.append(report("train", iteration, 0.5 + iteration / 200))
        if iteration in (30, 60):
            lines.append(report("valid", iteration, 0.75 if iteration == 30 else 0.625))
    lines.append(json.dumps({"kind": "sample", "run": "r", "prompt": "Mrs Miller?", "answer": "She owes 5."}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, report("test", 60, 0.6)]) + "\n")
    versions = "# mlx-cpo-plugin 0.1.0, mlx 0.32.4, Python 3.12, Darwin arm64, Device(gpu, 0)\n"
    (folder / "run_settings.yaml").write_text(versions + yaml.safe_dump(SETTINGS, sort_keys=False))
    data = {"train": {"rows": 12, "pairs": 11, "sha256": "ab" * 32}}
    record = {"id": "r", "begun": "2026-11-27T00:00:00+00:00", "origin": None, "done": ["trained"], "files": []}
    (folder / "run.json").write_text(json.dumps({**record, "successor": None, "data": data}))
    for place, iteration in ((folder, "60"), (folder / "best", "30")):
        mx.save_safetensors(str(place / "adapters.safetensors"), {"a": mx.zeros(4)}, {"iteration": iteration})
        (place / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "dora", "model": "/home/somebody/m"}))
    for name in ("0000060_adapters.safetensors", "console.log", ".lock", "notes.txt"):
        (folder / name).write_text("private")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
