"""Trains with TRL's own CPOTrainer and keeps what it reports of each step; ``trajectory.py`` starts it.

    TRL_PYTHON tests/tools/train_with_trl.py FOLDER [float64]

The folder holds ``trl.yaml``, as TRL's scripts read it; ``rows.jsonl``, taken in their order; and
``initial.safetensors``, the adapter to start from under MLX's names. Into it are written ``trl.json`` and
``trl.safetensors``, the trained adapter under the same names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config
from trl.experimental.cpo import CPOConfig, CPOTrainer

UNSCORED = -100
# TRL's metric -> its name here.
METRICS = {
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "rewards/margins": "margins",
    "nll_loss": "nll_loss",
}


class RecordingTrainer(CPOTrainer):
    """TRL's trainer, which keeps what it reports of each micro-batch."""

    def __init__(self, **arguments: Any) -> None:
        self.steps: list[dict[str, float]] = []
        super().__init__(**arguments)

    def get_batch_loss_metrics(self, *arguments: Any, **named: Any) -> Any:
        """Leave the work to TRL, and take note."""
        loss, metrics = super().get_batch_loss_metrics(*arguments, **named)
        self.steps.append({"loss": loss.item(), **{ours: metrics[theirs] for theirs, ours in METRICS.items()}})
        return loss, metrics


def adapter_of(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a PEFT adapter under MLX's names; MLX has them transposed."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".lora_a")
        .replace(".lora_B.default.weight", ".lora_b"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_adapter(model: PeftModel, initial: dict[str, torch.Tensor]) -> None:
    """Give the adapter its initial weights; both must have the same parameters."""
    parameters = adapter_of(model)
    if set(parameters) != set(initial):
        raise SystemExit(f"the adapters differ in {sorted(set(parameters) ^ set(initial))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name].T)


def tokens_of(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return the tokens of a row as TRL trains on them: those before the answers, and both answers."""
    start = row["chosen_labels"].count(UNSCORED)
    answers = {
        side: row[f"{side}_input_ids"][row[f"{side}_labels"].count(UNSCORED) :] for side in ("chosen", "rejected")
    }
    return {"prompt": row["chosen_input_ids"][:start], **answers}


def train(folder: Path, dtype: str = "float32") -> RecordingTrainer:
    """Train as the folder says."""
    parser = TrlParser((CPOConfig, ModelConfig))
    arguments, model_arguments = parser.parse_args_and_config(["--config", str(folder / "trl.yaml")])
    arguments.train_sampling_strategy = "sequential"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = RecordingTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_arguments.model_name_or_path, dtype=getattr(torch, dtype)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_arguments),
    )
    set_adapter(trainer.model, load_file(folder / "initial.safetensors"))
    trainer.train()
    return trainer


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = train(folder, *sys.argv[2:])
    adapter = {name: value.detach().T.float().contiguous() for name, value in adapter_of(trainer.model).items()}
    save_file(adapter, folder / "trl.safetensors")
    report = {"steps": trainer.steps, "tokens": [tokens_of(row) for row in trainer.train_dataset]}
    (folder / "trl.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
