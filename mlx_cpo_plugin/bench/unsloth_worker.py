"""One measured process of unsloth-zoo's CPO trainer on MLX: ``-m …bench.unsloth_worker FOLDER`` in its own Python.

Of this project that Python sees only what needs nothing but the standard library and MLX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Else it asks for the package unsloth, which asks for a GPU of its own kind.
os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import hf_repo_to_path
from unsloth_zoo.mlx import trainer as unsloth
from unsloth_zoo.mlx.loader import FastMLXModel

from mlx_cpo_plugin.bench.job import EPOCH, Job, Measurement
from mlx_cpo_plugin.bench.recording import StepClock, peak_resident
from mlx_cpo_plugin.blas import in_use, use_fast_blas


def keep_plans() -> list[Any]:
    """Return a list to which each plan of batches will be added that the trainer makes."""
    plans: list[Any] = []
    create = unsloth.create_preference_batch_plan

    def keeping(*arguments: Any, **named: Any) -> Any:
        plans.append(create(*arguments, **named))
        return plans[-1]

    unsloth.create_preference_batch_plan = keeping
    return plans


def build_trainer(job: Job, folder: Path) -> Any:
    """Return unsloth-zoo's trainer with what it recommends: checkpointing and cut cross-entropy."""
    settings = job.settings
    lora, length, batch = settings["lora_parameters"], settings["max_seq_length"], settings["batch_size"]
    model, tokenizer = FastMLXModel.from_pretrained(
        settings["model"], max_seq_length=length, dtype=dtype_of_files(settings["model"]), load_in_4bit=False
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=lora["rank"],
        lora_alpha=lora["scale"] * lora["rank"],
        lora_dropout=0,
        target_modules="all-linear",
        use_gradient_checkpointing="mlx",
        max_seq_length=length,
    )
    arguments = unsloth.MLXCPOConfig(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_steps=-(-len(job.rows) // batch),
        dataset_order="default" if job.task == EPOCH else "sequential",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adam",
        beta=settings["beta"],
        cpo_alpha=0.0,
        loss_type="sigmoid",
        max_seq_length=length,
        max_length=length,
        max_prompt_length=length - 1,
        gradient_checkpointing=True,
        use_cce=True,
        compile=mx.metal.is_available(),
        logging_steps=1,
        seed=settings["seed"],
        output_dir=str(folder / "output"),
    )
    return unsloth.MLXCPOTrainer(model=model, tokenizer=tokenizer, train_dataset=list(job.rows), args=arguments)


def dtype_of_files(model: str) -> str:
    """Return the dtype of the first weights in a model's files that are floating-point numbers."""
    folder = Path(model) if Path(model).exists() else hf_repo_to_path(model)
    files: list[Any] = [mx.load(str(file)) for file in sorted(folder.glob("*.safetensors"))]
    dtypes = [value.dtype for weights in files for value in weights.values()]
    return str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))).removeprefix("mlx.core.")


def dtype_of(model: Any) -> str:
    """Return the dtype of the weights, those of adapters aside."""
    weights = dict(tree_flatten(model.parameters()))
    return next(str(value.dtype) for name, value in weights.items() if "lora" not in name).removeprefix("mlx.core.")


def tokens_of(row: Any) -> dict[str, Any]:
    """Return both sides of a tokenised row, and how many tokens of each come before the answer."""
    return {
        "chosen": list(row.chosen),
        "rejected": list(row.rejected),
        "chosen_prompt_length": len(row.chosen_prompt_ids),
        "rejected_prompt_length": len(row.rejected_prompt_ids),
    }


def scored_tokens(rows: Sequence[Any], schedule: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens each batch scores."""
    return [sum(len(rows[index].chosen_ids) + len(rows[index].rejected_ids) for index in batch) for batch in schedule]


def main() -> None:
    """Do the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    use_fast_blas()
    if not mx.metal.is_available():
        mx.disable_compile()  # else a run of a C++ compiler for each shape would be measured
    plans, losses = keep_plans(), []
    trainer = build_trainer(Job.load(folder), folder)
    clock = StepClock()

    def on_step(step: int, steps: int, loss: float, *_: Any, **__: Any) -> None:
        clock.step()
        losses.append(float(loss))

    trainer.add_step_callback(on_step)
    mx.reset_peak_memory()
    trainer.train()
    blas, plan = in_use(), plans[-1]
    Measurement(
        seconds=clock.seconds,
        processor_seconds=clock.processor_seconds,
        scored_tokens=scored_tokens(plan.rows, plan.schedule),
        peak_memory=mx.get_peak_memory(),
        peak_resident=peak_resident(),
        losses=losses,
        blas=blas.name if blas else "",
        dtype=dtype_of(trainer.model),
        row_tokens=[tokens_of(row) for row in plan.rows],
    ).save(folder)


if __name__ == "__main__":
    main()
