"""What quantisation-aware training gains on a real model: held-out rows scored by the quantised model.

    python tests/tools/measure_qat.py --model FOLDER --rows rows.jsonl --train-rows 32 --valid-rows 48

Trains LoRA without QAT and with it, for each quantiser at 4 and 8 bits, from the same adapter in the same order; merges
the adapter, quantises the model as ``mlx_lm.convert`` does, in groups of 64, and scores the held-out rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.model.scoring import prepared_scorer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo
from mlx_cpo_plugin.training.validation import scored_batches

GROUP_SIZE = 64
WAYS: tuple[tuple[str, int | None], ...] = (("none", None), ("host", 4), ("mlx", 4), ("host", 8), ("mlx", 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=32)
    parser.add_argument("--valid-rows", type=int, default=48)
    parser.add_argument("--longest", type=int, default=200, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    use_fast_blas()
    print("| QAT | bits | deployed at | accuracy | margin | chosen, nats a token |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    model, tokenizer = load(given.model)
    settings = {"train_mode": "cpo", "train": True, "data": str(given.rows), "max_seq_length": given.longest}
    rows = load_dataset(resolve(settings).settings, tokenizer)[0]
    training, valid = rows[: given.train_rows], rows[given.train_rows : given.train_rows + given.valid_rows]
    print(f"| before training |  | not quantised | {row(model, valid)} |", flush=True)
    for quantizer, bits in WAYS:
        merged = trained(given, training, quantizer, bits)
        for to in [None, 8, 4] if bits is None else [bits]:
            model, _ = load(given.model)
            model.load_weights(list(merged.items()))
            if to is not None:
                nn.quantize(model, GROUP_SIZE, to)
            print(f"| {quantizer} | {bits or ''} | {to or 'not quantised'} | {row(model, valid)} |", flush=True)


def adapt(model: nn.Module) -> None:
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 10.0, "dropout": 0.0})


def trained(given: argparse.Namespace, pairs: Any, quantizer: str, bits: int | None) -> dict[str, mx.array]:
    """Return the weights after training, adapter merged."""
    mx.random.seed(given.seed)
    model, _ = load(given.model)
    adapt(model)
    with tempfile.TemporaryDirectory() as folder:
        args = CPOTrainingArgs(
            iters=len(pairs) // 2,
            batch_size=2,
            beta=0.1,
            cpo_alpha=1.0,
            seed=given.seed,
            max_seq_length=given.longest,
            qat_enable=bits is not None,
            qat_bits=bits or 8,
            qat_group_size=GROUP_SIZE,
            qat_quantizer="auto" if bits is None else quantizer,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        train_cpo(model, optimizers.Adam(given.learning_rate), pairs, args=args)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return by_name(model.parameters())


def row(model: nn.Module, pairs: Any) -> str:
    """Accuracy, margin in nats, and the mean log-prob of a token of the chosen answers, over the held-out pairs."""
    with prepared_scorer(model, pairs, "auto") as scorer:
        scores = [part for part, _ in scored_batches(model, pairs, False, batch_size=4, scorer=scorer)]
    chosen, rejected, tokens = (
        np.concatenate([np.array(getattr(score, name), np.float64) for score in scores])
        for name in ("chosen_logps", "rejected_logps", "chosen_tokens")
    )
    margins = chosen - rejected
    error = margins.std(ddof=1) / np.sqrt(len(margins))
    return f"{(margins > 0).mean():.0%} | {margins.mean():+.2f} ± {error:.2f} | {chosen.sum() / tokens.sum():.3f}"


if __name__ == "__main__":
    main()
