"""What is measured: settings, pairs and model of each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cpo_plugin.bench.shapes import Shape, parse_shape
from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.batches import BatchSize, micro_batches_of, training_plan
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.data.rows import Conversation, parse_row
from mlx_cpo_plugin.data.tokens import DROP, UnusableRow
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

# A learning rate at which weights stay what they are, so that losses can be compared in any iteration.
STILL = 1e-9
SHARED_LOSS = "sigmoid"

_PARTS = ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored")


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: the line's heading.
        settings: every resolved setting, as for a training run.
        pairs: what is trained on.
        model_config: configuration of a model of random weights; ``None``: ``settings.model`` is loaded.
        notes: what was done to make the trainers comparable, one sentence each.
        rows: the pairs for trainers that tokenise themselves, as in :class:`~mlx_cpo_plugin.bench.job.Job`.
    """

    name: str
    settings: RunSettings
    pairs: Sequence[PreferencePair]
    model_config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    rows: Sequence[Mapping[str, Any]] = ()

    def batches(self, iterations: int) -> list[list[int]]:
        """Return the pairs of each iteration, in the order in which the trainer of this project takes them."""
        plan = training_plan(*self._planned, iters=iterations, seed=self.settings.seed)
        return [list(micro_batch.indices) for micro_batch in plan]

    def epoch(self) -> list[list[int]]:
        """Return the pairs of each iteration of one pass over all of them, as this project's trainer batches them."""
        return self.batches(micro_batches_of(1, *self._planned, self.settings.seed))

    @property
    def _planned(self) -> tuple[list[int], BatchSize]:
        size = BatchSize(self.settings.batch_size, self.settings.batch_tokens)
        return [pair.tokens for pair in self.pairs], size


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


def case_of_config(file: Path, rows: int | None, *, shared: bool = False) -> Case:
    """Return the case of a configuration file for training: its model, its settings and the first ``rows`` pairs.

    Args:
        shared: what all trainers can do alike, those of other projects included.

    Raises:
        UserError: the configuration, the model's tokenizer or the data is at fault.
    """
    return _case_of_data(str(file), {"config": str(file)}, rows, shared)


def suite(model: Path | None, data: Path | None, rows: int | None, *, shared: bool = False) -> list[Case]:
    """Return the standard cases: synthetic ones, and with a ``model`` and ``data`` folder those of real rows.

    Args:
        shared: only those of real rows, as all trainers can do them alike, those of other projects included.

    Raises:
        UserError: only one of the two is given, or one of them cannot be read.
    """
    cases = [] if shared else [case_of_shape(shape, rows) for shape in map(parse_shape, SYNTHETIC_SUITE)]
    if model is None and data is None and not shared:
        return cases
    if model is None or data is None:
        raise ConfigError(
            "--model and --data belong together; give both, or none for the synthetic cases alone (without --against)."
        )
    for file, longest in REAL_SUITE:
        settings = {
            "model": str(model),
            "data": str(data / file),
            "batch_size": REAL_BATCH_SIZE,
            "max_seq_length": longest,
        }
        cases.append(
            _case_of_data(f"{model.name}, {file}, batch {REAL_BATCH_SIZE}, max {longest}", settings, rows, shared)
        )
    return cases


def _resolved(settings: Mapping[str, Any]) -> RunSettings:
    """Resolve settings, then switch off what would be measured beside training or make two runs differ."""
    resolved = config.resolve({"train": True, "train_mode": "cpo", **settings}).settings
    resolved.test = resolved.fuse = resolved.qat_enable = False
    resolved.load_best = False  # nothing is validated
    resolved.epochs = resolved.wandb = resolved.resume_adapter_file = resolved.resume = resolved.save_best = None
    resolved.early_stopping_patience = resolved.max_grad_norm = None
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


def share(resolved: RunSettings) -> None:
    """Leave of the settings what all trainers have, and drop rows that each would cut in its own way."""
    if resolved.dpo_cpo_loss_type != SHARED_LOSS:
        raise ConfigError(
            f"trainers of other projects are compared by the loss {SHARED_LOSS}; "
            f"set dpo_cpo_loss_type to it in place of {resolved.dpo_cpo_loss_type}."
        )
    resolved.learning_rate, resolved.lr_schedule, resolved.optimizer = STILL, None, "adam"
    resolved.chat_template = None
    resolved.valid_fraction, resolved.overlong = 0.0, DROP
    resolved.train_type, resolved.num_layers = "lora", -1
    resolved.efficient_long_context = False
    resolved.lora_parameters = {name: resolved.lora_parameters[name] for name in ("rank", "scale", "dropout")}


def _case_of_data(name: str, settings: Mapping[str, Any], rows: int | None, shared: bool) -> Case:
    resolved = _resolved(settings)
    notes = ["dropout, gradient accumulation, max_grad_norm, fake quantisation, cpo_alpha and label_smoothing are off"]
    if shared:
        share(resolved)
        notes.append(
            "LoRA on all linear layers, Adam with a learning rate of almost zero; rows that do not fit are left out"
        )
    train_set, _, _ = load_dataset(resolved, load_chat_tokenizer(resolved.model))
    usable = [pair for pair in train_set if pair.chosen_scored.all() and pair.rejected_scored.all()]
    if len(usable) < len(train_set):
        notes.append(
            f"{len(train_set) - len(usable)} pairs left out: other trainers would score tokens of their answers "
            "that are not the assistant's"
        )
    raw = _conversations(resolved) if shared else {}
    pairs = [pair for pair in usable if not shared or pair.source in raw][:rows]
    if not pairs:
        raise DataError(f"{name}: there is no training pair that all trainers can score alike; check the data.")
    return Case(name, resolved, pairs, notes=tuple(notes), rows=[raw[pair.source] for pair in pairs] if shared else ())


def _conversations(settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Return the training rows that are plain conversations as ``prompt``, ``chosen`` and ``rejected``, by source."""
    found = {}
    for group in read_splits(settings, ["train"])["train"]:
        for row in group.rows:
            try:
                parsed = parse_row(row.value, group.columns)
            except UnusableRow:
                continue
            if isinstance(parsed, Conversation) and not (parsed.tools or parsed.template_kwargs or parsed.partial):
                shared = parsed.shared
                answers = {"chosen": parsed.chosen[shared:], "rejected": parsed.rejected[shared:]}
                found[row.source] = {"prompt": parsed.chosen[:shared], **answers}
    return found


def save_pairs(file: Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs into one ``.npz`` file: tokens end to end, with the length of each part of each pair."""
    arrays = {part: np.concatenate([getattr(pair, part) for pair in pairs]) for part in _PARTS}
    lengths = {f"{part}_lengths": np.array([len(getattr(pair, part)) for pair in pairs]) for part in _PARTS}
    np.savez(file, **(arrays | lengths))  # type: ignore[arg-type]  # no array is called allow_pickle


def load_pairs(file: Path) -> list[PreferencePair]:
    """Read what :func:`save_pairs` wrote."""
    with np.load(file) as stored:
        columns = [np.split(stored[part], np.cumsum(stored[f"{part}_lengths"])[:-1]) for part in _PARTS]
    return [PreferencePair(*parts) for parts in zip(*columns, strict=True)]
