"""Makes ``trl_reference.safetensors``: what TRL's CPOTrainer computes on a tiny llama of random weights.

It runs in an environment of its own, since it needs TRL and torch, which this project does not:

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    trl/bin/python tests/tools/make_trl_reference.py

The file holds the weights as ``weights.NAME``, the gradient of each case as ``NUMBER.NAME``, all float32, and in its
metadata the versions, the model's configuration, the rows as token ids, and the cases with TRL's loss and metrics.
"""

from __future__ import annotations

import json
import random
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer

FILE = Path(__file__).parents[1] / "training" / "trl_reference.safetensors"
WORDS = 45
ROWS = 4
MODEL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
# Temperatures with which some pairs of the rows are right and some wrong, and no loss is saturated.
BETAS = {"sigmoid": 0.1, "hinge": 0.3, "ipo": 0.4, "simpo": 2.0, "alphapo": 2.0}
SMOOTHED = ("sigmoid", "simpo", "alphapo")


def cases() -> list[dict[str, Any]]:
    """Return the settings of each case under this project's names."""
    result = []
    for loss_type, cpo_alpha, label_smoothing in product(BETAS, (0.0, 1.0), (0.0, 0.1)):
        if label_smoothing and loss_type not in SMOOTHED:
            continue
        case = {"loss_type": loss_type, "beta": BETAS[loss_type], "cpo_alpha": cpo_alpha}
        if loss_type in SMOOTHED:
            case["label_smoothing"] = label_smoothing
        if loss_type in ("simpo", "alphapo"):
            case["simpo_gamma"] = 0.5
        if loss_type == "alphapo":
            case["alphapo_alpha"] = 0.25
        result.append(case)
    return result


def trl_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Return the settings under TRL's names; its name ``alphapo`` would set ``cpo_alpha`` to 0."""
    arguments = dict(case)
    arguments["alpha"] = arguments.pop("alphapo_alpha", 0.0)
    if arguments["loss_type"] == "alphapo":
        arguments["loss_type"] = "simpo"
    return arguments


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are their own tokens."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": 3 + number for number in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def build_rows(count: int = ROWS) -> Dataset:
    """Return rows of words, prompts and answers of mixed lengths."""
    drawn = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(f"w{drawn.randrange(WORDS)}" for _ in range(drawn.randint(2, longest)))

    return Dataset.from_list(
        [{"prompt": text(8), "chosen": " " + text(9), "rejected": " " + text(9)} for _ in range(count)]
    )


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """Return a llama of random weights, large enough for its tokens to be told apart."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, attn_implementation="eager", **MODEL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.1 if "norm" in name else 0.5) + ("norm" in name))
    return model


def main() -> None:
    """Compute every case and write the file."""
    tokenizer, rows = build_tokenizer(), build_rows()
    model = build_model(len(tokenizer))
    arrays = {f"weights.{name}": value.detach().clone() for name, value in model.named_parameters()}
    results, batch = [], None
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases()):
            arguments = CPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                per_device_train_batch_size=ROWS,
                **trl_arguments(case),
            )
            trainer = CPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
            if batch is None:
                batch = trainer.data_collator([trainer.train_dataset[row] for row in range(ROWS)])
            # Only products and sums gain from it: the model's norms and angles stay in float32.
            model.to(torch.float64).train()
            model.zero_grad()
            loss, metrics = trainer.get_batch_loss_metrics(model, batch)
            loss.backward()
            arrays |= {f"{number}.{name}": value.grad.float().clone() for name, value in model.named_parameters()}
            results.append({"settings": case, "loss": loss.item(), "metrics": metrics})
            model.to(torch.float32)
    metadata = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": {"vocab_size": len(tokenizer), **MODEL},
        "rows": [row_of(batch, row) for row in range(ROWS)],
        "cases": results,
    }
    save_file(arrays, FILE, {name: json.dumps(value) for name, value in metadata.items()})
    print(f"wrote {FILE}: {FILE.stat().st_size / 1024:.0f} KB, {len(results)} cases")


def row_of(batch: dict[str, Any], row: int) -> dict[str, list[int]]:
    """Return the token ids of one row as TRL trains on them: what both answers follow, and the answers."""
    sides = {}
    for side in ("chosen", "rejected"):
        kept = batch[f"{side}_attention_mask"][row].bool()
        tokens, labels = batch[f"{side}_input_ids"][row][kept], batch[f"{side}_labels"][row][kept]
        sides[side] = tokens[labels != -100].tolist()
        sides["prompt"] = tokens[labels == -100].tolist()
    return sides


if __name__ == "__main__":
    main()
