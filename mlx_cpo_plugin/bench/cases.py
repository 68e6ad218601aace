"""What is measured: settings, pairs and model of each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.bench.shapes import Shape, parse_shape
from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.batches import BatchSize, training_plan
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.config import RunSettings

HOST_LOSSES = ("sigmoid", "hinge", "ipo", "dpop")

SYNTHETIC_SUITE = (
    "P256,C128,R96,B2",
    "P512,C64,R48,B1",
    "P1024,C256,R256,B2,long",
    "P128,C64,R64,B4,V151936,H1024,L2,qwen3",
)
# Rows, tokens at most.
REAL_SUITE = (("translation_prompt.jsonl", 2048), ("messages_dpo_mix.jsonl", 1024))
REAL_BATCH_SIZE = 4
DEFAULT_BATCHES = 4


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: the line's heading.
        settings: every resolved setting, as for a training run.
        pairs: what is trained on.
        model_config: configuration of a model of random weights; ``None``: ``settings.model`` is loaded.
        notes: what was done to make the two trainers comparable, one sentence each.
    """

    name: str
    settings: RunSettings
    pairs: Sequence[PreferencePair]
    model_config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def batches(self, iterations: int) -> list[list[int]]:
        """Return the pairs of each iteration, in the order in which the trainer of this project takes them."""
        plan = training_plan(
            [pair.tokens for pair in self.pairs],
            BatchSize(self.settings.batch_size, self.settings.batch_tokens),
            iters=iterations,
            seed=self.settings.seed,
        )
        return [list(micro_batch.indices) for micro_batch in plan]


def case_of_shape(shape: Shape, rows: int | None = None) -> Case:
    """Return a case of random pairs, four batches unless ``rows`` are given, and random weights with LoRA of rank 8."""
    settings = {
        "batch_size": shape.batch,
        # Random answers of other lengths differ by hundreds of nats, and a saturated loss has no gradient.
        "beta": 1 / (shape.chosen + shape.rejected),
        "efficient_long_context": shape.long,
        "max_seq_length": max(2048, shape.prompt + max(shape.chosen, shape.rejected)),
    }
    return Case(
        shape.title, _resolved(settings), shape.pairs(rows or DEFAULT_BATCHES * shape.batch), shape.model_config()
    )


def case_of_config(file: Path, rows: int | None) -> Case:
    """Return the case of a configuration file for training: its model, its settings and the first ``rows`` pairs.

    Raises:
        UserError: the configuration, the model's tokenizer or the data is at fault.
    """
    return _case_of_data(str(file), {"config": str(file)}, rows)


def suite(model: Path | None, data: Path | None, rows: int | None) -> list[Case]:
    """Return the standard cases: synthetic ones, and with a ``model`` and ``data`` folder those of real rows.

    Raises:
        UserError: only one of the two is given, or one of them cannot be read.
    """
    cases = [case_of_shape(shape, rows) for shape in map(parse_shape, SYNTHETIC_SUITE)]
    if model is None and data is None:
        return cases
    if model is None or data is None:
        raise ConfigError("--model and --data belong together; give both, or none for the synthetic cases alone.")
    for file, longest in REAL_SUITE:
        settings = {
            "model": str(model),
            "data": str(data / file),
            "batch_size": REAL_BATCH_SIZE,
            "max_seq_length": longest,
        }
        cases.append(_case_of_data(f"{model.name}, {file}, batch {REAL_BATCH_SIZE}, max {longest}", settings, rows))
    return cases


def _resolved(settings: Mapping[str, Any]) -> RunSettings:
    """Resolve settings, then switch off what would be measured beside training or make two runs differ."""
    resolved = config.resolve({"train": True, "train_mode": "cpo", **settings}).settings
    resolved.test = resolved.fuse = resolved.qat_enable = False
    resolved.epochs = resolved.wandb = resolved.resume_adapter_file = None
    resolved.gradient_accumulation_steps = 1
    resolved.cpo_alpha = 0.0  # mlx-lm-lora has neither this nor smoothed labels
    resolved.loss_options = {name: value for name, value in resolved.loss_options.items() if name != "label_smoothing"}
    resolved.steps_per_report = 1
    resolved.lora_parameters = {**resolved.lora_parameters, "dropout": 0.0}
    if resolved.dpo_cpo_loss_type not in HOST_LOSSES:
        raise ConfigError(
            f"mlx-lm-lora has no loss {resolved.dpo_cpo_loss_type!r} to compare with; "
            f"set dpo_cpo_loss_type to one of {', '.join(HOST_LOSSES)}."
        )
    return resolved


def _case_of_data(name: str, settings: Mapping[str, Any], rows: int | None) -> Case:
    resolved = _resolved(settings)
    train_set, _, _ = load_dataset(resolved, load_chat_tokenizer(resolved.model))
    pairs = list(train_set[:rows])
    usable = [pair for pair in pairs if pair.chosen_scored.all() and pair.rejected_scored.all()]
    if not usable:
        raise DataError(f"{name}: there is no training pair that both trainers can score alike; check the data.")
    notes = ["dropout, gradient accumulation, fake quantisation, cpo_alpha and label_smoothing are off"]
    if len(usable) < len(pairs):
        notes.append(
            f"{len(pairs) - len(usable)} pairs left out: mlx-lm-lora would score tokens of their answers "
            "that are not the assistant's"
        )
    return Case(name, resolved, usable, notes=tuple(notes))
