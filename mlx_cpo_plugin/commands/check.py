"""The report of ``mlx-cpo check``: what training would see, and what it would refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin import cpo
from mlx_cpo_plugin.commands.timing import measured_duration
from mlx_cpo_plugin.console import is_live
from mlx_cpo_plugin.data.batches import BatchSize, micro_batches_of
from mlx_cpo_plugin.data.columns import first_few
from mlx_cpo_plugin.data.dataset import PreferenceDataset, Splits, load_splits, require_splits
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.report import DataReport, columns_of
from mlx_cpo_plugin.data.sample_prompts import own_prompts
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer, TokenIds
from mlx_cpo_plugin.data.tokens import Lengths
from mlx_cpo_plugin.device import device_memory
from mlx_cpo_plugin.errors import DataError, UserError, named
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.plugins import sets_of
from mlx_cpo_plugin.run.building import (
    build_optimizer,
    is_on_this_machine,
    iterations,
    load_model,
    optimizer_steps,
    unevaluated_model,
)
from mlx_cpo_plugin.run.preflight import (
    adapter_file,
    check_destinations,
    plan_notes,
    position_notes,
    rehearsed,
    run_identity,
)
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.identity import data_digest
from mlx_cpo_plugin.training.memory_estimate import MemoryEstimate
from mlx_cpo_plugin.training.optimizer_step import in_float32
from mlx_cpo_plugin.training.summary import counted
from mlx_cpo_plugin.training.validation import unused_without_validation
from mlx_cpo_plugin.training.wiring import expected_memory
from mlx_cpo_plugin.types import Tokenizer, TrainMode

_SCORED_COLOUR, _PLAIN = "\x1b[32m", "\x1b[0m"

Load = Callable[[RunSettings, Tokenizer], Splits]


def load_all(settings: RunSettings, tokenizer: Tokenizer) -> Splits:
    """Return every split that the data has; a test set that the run does not read may be at fault."""
    try:
        return load_splits(settings, tokenizer, ("train", "valid", "test"))
    except DataError as error:
        if settings.test:
            raise
        train, valid, _ = load_splits(settings, tokenizer, ("train", "valid"))
        note = f"left out, since the run has no test: true, and it is at fault: {error}"
        return train, valid, PreferenceDataset(split="test", notes=(note,))


def run_check(
    settings: RunSettings,
    mode: TrainMode,
    stream: TextIO | None = None,
    examples: int = 3,
    timed: bool = False,
    load: Load = load_all,
) -> None:
    """Load tokenizer and data, and print what a training run would make of them, and what it would refuse.

    Args:
        settings: of a training run; every split that the data has is checked.
        mode: one that reads its rows otherwise than CPO gets them counted.
        stream: where to print; standard output by default.
        examples: pairs of the first split to show as text.
        timed: load the model, too, and measure how long the run takes.
        load: returns the pairs of CPO.

    Raises:
        UserError: the first of what the run would refuse; the others are printed.
    """
    stream = sys.stdout if stream is None else stream
    refusals = _Refusals()
    with refusals:
        check_destinations(settings)
    with refusals:
        settings.run_identity = run_identity(settings)
        settings.begun = settings.run_identity.begun
    with refusals:
        _check_rows(settings, mode, stream, examples, timed, refusals, load)
    refusals.tell(stream)


class _Refusals(list[UserError]):
    """What a run would refuse, gathered in one ``with`` block after the other."""

    def __enter__(self) -> _Refusals:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, UserError) and str(error) not in map(str, self):
            self.append(error)
        return isinstance(error, UserError)

    def tell(self, stream: TextIO) -> None:
        """Raise the first, which is the one that a run would name, and print the others."""
        for error in self[1:]:
            print(f"error: {error}", file=stream)
        if self:
            raise self[0]


def _check_rows(
    settings: RunSettings,
    mode: TrainMode,
    stream: TextIO,
    examples: int,
    timed: bool,
    refusals: _Refusals,
    load: Load,
) -> None:
    tokenizer = load_chat_tokenizer(settings.model)
    if mode.load_dataset is not cpo.load_dataset:
        rows = sets_of(mode, settings, tokenizer)
        for name, split in zip(("Train", "Valid", "Test"), rows, strict=True):
            print(f"{name}: {len(split)} rows.", file=stream)
        if rows[0]:
            _print_steps(rows[0], settings, stream)
        return
    splits = load(settings, tokenizer)
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    if settings.sample_prompts:
        with refusals:
            own_prompts(settings.sample_prompts, chat_tokenizer, settings.max_seq_length)
    for dataset in splits:
        print(*dataset.report.lines(), sep="\n", file=stream)
    for dataset in splits:
        if dataset:
            _print_columns(dataset.report, stream)
            _print_lengths(dataset, settings.max_seq_length, stream)
    with refusals:
        require_splits(settings, splits)
    with refusals:
        if splits[0]:
            print_plan(settings, splits, timed, stream)
    shown = next((dataset[:examples] for dataset in splits if dataset), [])
    _print_examples(shown, chat_tokenizer, stream)


def _print_columns(report: DataReport, stream: TextIO) -> None:
    read = "; ".join(f"{part}: {named(', '.join(columns))}" for part, columns in report.columns.read.items())
    unread = [named(column, 60) for column in report.columns.unread]
    if read:
        print(f"\n{report.split.capitalize()}, columns read: {read}", file=stream)
        print(f"  not read: {first_few(unread, 12) or 'none'}", file=stream)


def _print_lengths(dataset: PreferenceDataset, max_seq_length: int, stream: TextIO) -> None:
    """Print the lengths before the cut, and of what it leaves where it takes anything."""
    report = dataset.report
    lost = report.prompts_cut or report.answers_cut or len(report.lengths["prompt"]) > report.pairs
    title = f"{report.split.capitalize()}, tokens"
    header = f"{'median':>8} {'95%':>7} {'max':>7}"
    print(f"\n{title:<16}{header}{'   cut: ' + header.lstrip() if lost else ''}", file=stream)
    left = columns_of([Lengths.of(pair) for pair in dataset])
    for part, lengths in report.lengths.items():
        print(f"  {part:<14}{_figures(lengths)}{'  ' + _figures(left[part]) if lost else ''}", file=stream)
    cut = f"prompt in {report.prompts_cut}, answer in {report.answers_cut} of {report.pairs} pairs"
    print(f"  Cut to max_seq_length {max_seq_length}: {cut}", file=stream)
    most, every = report.max_seq_length_for(0.95), report.max_seq_length_for(1)
    print(f"  Whole with max_seq_length {most}: 95% of the pairs; with {every}: all", file=stream)
    longer = float(np.mean(report.lengths["chosen"] > report.lengths["rejected"]))
    print(f"  sha256 of the pairs as tokens: {data_digest(dataset, whole=True)}", file=stream)
    print(f"  Length bias: the chosen answer is the longer one in {longer:.0%} of the pairs", file=stream)


def _figures(lengths: NDArray[np.int64]) -> str:
    median, high = np.percentile(lengths, [50, 95])
    return f"{median:>8.0f} {high:>7.0f} {lengths.max():>7}"


def _print_steps(rows: Sequence[Any], settings: RunSettings, stream: TextIO) -> int:
    """Print what the run amounts to, and set ``settings.iters``; return its optimizer steps."""
    size = BatchSize(settings.batch_size, settings.batch_tokens)
    lengths = [0 if settings.batch_tokens is None else pair.tokens for pair in rows]
    batches = micro_batches_of(1, lengths, size, settings.seed)
    settings.iters = iterations(settings, rows, lambda line: print(line, file=stream))
    steps, accumulation = optimizer_steps(settings, rows), settings.gradient_accumulation_steps
    key = "batch_size" if settings.batch_tokens is None else "batch_tokens"
    each = f"{key} {getattr(settings, key)}, gradient_accumulation_steps {accumulation}"
    in_epoch = (
        f"{counted(batches, 'iteration')}, {counted(math.ceil(batches / accumulation), 'optimizer step')} ({each})"
    )
    print(f"\nSteps per epoch: {in_epoch}", file=stream)
    epochs = settings.iters / batches
    in_run = f"{counted(settings.iters, 'iteration')}, {counted(steps, 'optimizer step')}"
    print(f"Steps of the run: {in_run}, {epochs:.3g} epoch{'s' * (epochs != 1)}", file=stream)
    return steps


def print_plan(
    settings: RunSettings,
    splits: Splits,
    timed: bool,
    stream: TextIO,
) -> None:
    """Print steps, memory, notes and time of the run; of the model's arrays only ``timed`` evaluates any."""
    train, valid, _ = splits
    steps = _print_steps(train, settings, stream)
    if timed:
        model, _ = load_model(settings)
    elif is_on_this_machine(settings.model):
        model = unevaluated_model(settings)
    else:
        print(
            "Not looked at, since the model has not been fetched yet: memory, lora_parameters.keys, the bits to load "
            "in, and what is resumed from.",
            file=stream,
        )
        return
    with rehearsed(settings, model, train, valid, probing=timed or settings.scoring == "shared") as run:
        print(*run.memory.lines(device_memory()), sep="\n", file=stream)
        unused = None if run.val_pairs else unused_without_validation(run.args)
        notes = [*plan_notes(settings, run.step.optimizer, steps), *position_notes(settings.model, train), unused]
        for note in filter(None, notes):
            print(note, file=stream)
        if timed:
            print(measured_duration(run), file=stream)


def memory_estimate(model: nn.Module, settings: RunSettings, pairs: Sequence[PreferencePair]) -> MemoryEstimate:
    """Return what a run takes to train ``model`` on these pairs; no array is evaluated."""
    optimizer = build_optimizer(settings)
    optimizer.init(in_float32(model.trainable_parameters()))
    args = CPOTrainingArgs.from_settings(settings, adapter_file(settings))
    return expected_memory(model, optimizer, pairs, args)


def _print_examples(pairs: list[PreferencePair], tokenizer: ChatTokenizer, stream: TextIO) -> None:
    if pairs:
        print("\nFirst pairs, scored tokens between ⟦ and ⟧", file=stream)
    for pair in pairs:
        print(f"\n{pair.source}\n  prompt:   {_one_line(tokenizer.decode(pair.prompt))}", file=stream)
        for name, ids, scored in (
            ("chosen", pair.chosen, pair.chosen_scored),
            ("rejected", pair.rejected, pair.rejected_scored),
        ):
            print(f"  {name + ':':<9} {_marked(ids, scored, tokenizer, is_live(stream))}", file=stream)


def scored_runs(ids: TokenIds, scored: NDArray[np.bool_], tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """Return the text of each run of tokens that are all scored, or none of them, and whether they are."""
    turns = np.flatnonzero(np.diff(scored)) + 1
    runs = zip(np.split(ids, turns), np.split(scored, turns), strict=True)
    return [(tokenizer.decode(run), bool(mark[0])) for run, mark in runs]


def _marked(ids: TokenIds, scored: NDArray[np.bool_], tokenizer: ChatTokenizer, colour: bool) -> str:
    """The decoded text in one line, each run of scored tokens in brackets."""
    parts = []
    for decoded, is_scored in scored_runs(ids, scored, tokenizer):
        text = _one_line(decoded)
        if is_scored:
            text = f"⟦{_SCORED_COLOUR}{text}{_PLAIN}⟧" if colour else f"⟦{text}⟧"
        parts.append(text)
    return "".join(parts)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
