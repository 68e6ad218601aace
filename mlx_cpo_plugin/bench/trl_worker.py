"""One measured process of TRL's CPO trainer on torch: ``-m …bench.trl_worker FOLDER`` in its own Python.

Of this project that Python sees only what needs nothing but the standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.cpo import CPOConfig, CPOTrainer

from mlx_cpo_plugin.bench.job import EPOCH, Job, Measurement
from mlx_cpo_plugin.bench.recording import StepClock, peak_resident

UNSCORED = -100


class StepTimer(TrainerCallback):
    """Keeps time of each step."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.clock = StepClock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take note of a step's end, which on a GPU is that of its last kernel."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.step()


class RecordingTrainer(CPOTrainer):
    """TRL's trainer, which keeps loss and scored tokens of each step."""

    def __init__(self, **arguments: Any) -> None:
        self.losses: list[float] = []
        self.scored_tokens: list[int] = []
        super().__init__(**arguments)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """Take note, and leave the work to TRL."""
        labels = (inputs["chosen_labels"], inputs["rejected_labels"])
        self.scored_tokens.append(sum(int((side != UNSCORED).sum()) for side in labels))
        loss = super().compute_loss(model, inputs, *arguments, **named)
        self.losses.append(float(loss.detach()))
        return loss


def build_trainer(job: Job, folder: Path, timer: StepTimer) -> RecordingTrainer:
    """Return TRL's trainer with the settings and rows of a job."""
    settings = job.settings
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lora = settings["lora_parameters"]
    arguments = CPOConfig(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=settings["batch_size"],
        num_train_epochs=1,
        train_sampling_strategy="random" if job.task == EPOCH else "sequential",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        beta=settings["beta"],
        cpo_alpha=0.0,
        loss_type="sigmoid",
        max_length=settings["max_seq_length"],
        gradient_checkpointing=settings["grad_checkpoint"],
        seed=settings["seed"],
        bf16=False,
        logging_strategy="no",
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return RecordingTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(list(job.rows)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora["rank"], lora_alpha=lora["scale"] * lora["rank"], lora_dropout=0.0, target_modules="all-linear"
        ),
        callbacks=[timer],
    )


def tokens_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return both sides of a tokenised row, and how many tokens of each come before the answer."""
    tokens: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        tokens[side] = row[f"{side}_input_ids"]
        tokens[f"{side}_prompt_length"] = row[f"{side}_labels"].count(UNSCORED)
    return tokens


def blas_name() -> str:
    """Return what torch multiplies matrices with."""
    settings = torch.__config__.show().replace(",", "\n").split()
    name = next((part.split("=")[1] for part in settings if part.startswith("BLAS_INFO=")), "a BLAS of its own")
    return f"torch {torch.__version__} with {name}"


def main() -> None:
    """Do the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    timer = StepTimer()
    trainer = build_trainer(Job.load(folder), folder, timer)
    trainer.train()
    Measurement(
        seconds=timer.clock.seconds,
        processor_seconds=timer.clock.processor_seconds,
        scored_tokens=trainer.scored_tokens,
        peak_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        peak_resident=peak_resident(),
        losses=trainer.losses,
        blas=blas_name(),
        dtype="float32",
        row_tokens=[tokens_of(row) for row in trainer.train_dataset],
    ).save(folder)


if __name__ == "__main__":
    main()
