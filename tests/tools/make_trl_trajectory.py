"""Makes ``trl_trajectory.safetensors``: ten optimizer steps of TRL's CPOTrainer on the model of ``trl_reference``.

It runs in the environment of ``make_trl_reference.py``, with peft in it:

    trl/bin/python tests/tools/make_trl_trajectory.py

The file holds the adapter that all cases start from as ``initial.NAME`` and the trained one of each as ``CASE.NAME``,
float32 under MLX's names. In its metadata are the versions, the rows as token ids in the order in which they are taken,
and of each case TRL's configuration and what TRL reported of each micro-batch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
import yaml
from make_trl_reference import FILE, MODEL, build_rows, build_tokenizer
from safetensors.torch import load_file, save_file
from train_with_trl import adapter_of, tokens_of, train
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 10
RANK = 2
CONFIG = {
    "use_peft": True,
    "lora_r": RANK,
    "lora_alpha": 2 * RANK,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "learning_rate": 0.02,
    "num_train_epochs": 1,
    "max_length": MODEL["max_position_embeddings"],
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
WHOLE = {"per_device_train_batch_size": 2}
IN_PARTS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES = {
    "sigmoid, accumulated": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0, **IN_PARTS},
    "sigmoid with likelihood": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0, **WHOLE},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, **WHOLE},
    "ipo": {"loss_type": "ipo", "beta": 0.5, "cpo_alpha": 0.0, **WHOLE},
}


def save_model(folder: Path) -> None:
    """Save the model whose weights ``trl_reference.safetensors`` holds, and its tokenizer."""
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL))
    weights = {name: value for name, value in load_file(FILE).items() if name.startswith("weights.")}
    model.load_state_dict({name.removeprefix("weights."): value for name, value in weights.items()}, strict=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def initial_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter that PEFT gives the model, A random and B zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, target_modules="all-linear")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    return {name: value.detach().T.contiguous() for name, value in adapter_of(model).items()}


def main() -> None:
    """Train every case and write the file."""
    arrays, cases = {}, {}
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        initial = initial_adapter(folder / "model")
        save_file(initial, folder / "initial.safetensors")
        arrays |= {f"initial.{name}": value for name, value in initial.items()}
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_rows(2 * STEPS)))
        for name, case in CASES.items():
            config = {"model_name_or_path": "model", **CONFIG, **case}
            given = config | {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "output")}
            (folder / "trl.yaml").write_text(yaml.safe_dump(given))
            trainer = train(folder)
            adapter = adapter_of(trainer.model)
            arrays |= {f"{name}.{key}": value.detach().T.contiguous() for key, value in adapter.items()}
            cases[name] = {"config": config, "steps": trainer.steps}
            rows = [tokens_of(row) for row in trainer.train_dataset]
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers, peft)}
    metadata = {"versions": versions, "rows": rows, "cases": cases}
    file = FILE.with_name("trl_trajectory.safetensors")
    save_file(arrays, file, {name: json.dumps(value) for name, value in metadata.items()})
    print(f"wrote {file}: {file.stat().st_size / 1024:.0f} KB, {len(cases)} cases")


if __name__ == "__main__":
    main()
