"""One model in memory, twice measured: as it is, then with the weights that a run trained put on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load

from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, BEST, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.run_identity import run_in
from mlx_cpo_plugin.comparison.preference import LengthGroup, length_groups, preferences
from mlx_cpo_plugin.data.dataset import load_splits
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import prompt_tokens
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.errors import ConfigError, DataError, UserError, first_line, is_device_fault, named, shown
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import quantise_base, quantised_load
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.command_line import ON_THE_COMMAND_LINE
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.run_settings import read_run_settings
from mlx_cpo_plugin.training.objective import objective_for

ADAPTER_FILES = (ADAPTER_FILE, ADAPTER_CONFIG)
USER_PROMPT = "prompt"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What both models are asked.

    Attributes:
        source: where the row stands, e.g. ``test.jsonl:3``; ``prompt`` for the user's own.
        prompt: as text; of a row, as the chat template writes it.
        tokens: of the prompt.
        chosen, rejected: the answers in the row; None for the user's own.
    """

    source: str
    prompt: str
    tokens: list[int]
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model answers greedily, and whether it came to an end by itself."""

    text: str
    finished: bool


@dataclass
class Comparison:
    """Both models' answers and preferences.

    Attributes:
        settings: those of the run.
        questions: with ``base`` and ``tuned``, the answers of both models to each of them.
        groups: held-out pairs by length, with ``before`` and ``after``, both models' means over each group.
        held_out: the split that these come from, ``file`` for a file without one; empty where there are none.
    """

    settings: RunSettings
    questions: list[Question]
    groups: list[LengthGroup]
    held_out: str
    base: list[Answer] = field(default_factory=list)
    tuned: list[Answer] = field(default_factory=list)
    before: list[dict[str, float]] = field(default_factory=list)
    after: list[dict[str, float]] = field(default_factory=list)


def compare(
    adapter_path: Path,
    *,
    prompts: Sequence[str] = (),
    rows: int = 0,
    model: str | None = None,
    data: str | None = None,
    max_tokens: int = 128,
    say: Say = print,
) -> Comparison:
    """Ask the base model, then the tuned one; no two models are in memory at any time.

    Args:
        adapter_path: where a run left its adapter, of LoRA, DoRA or full training, and its settings.
        prompts: the user's own.
        rows: how many held-out rows to take as prompts, too.
        model, data: in place of the run's; ``data`` may be a single file, all of which is then held out.
        max_tokens: the most tokens of an answer.
        say: receives a line of progress at each step.

    Raises:
        UserError: there is no adapter, no model or no data, or a prompt cannot be rendered.
    """
    missing = next((name for name in ADAPTER_FILES if not (adapter_path / name).is_file()), None)
    if missing:
        raise ConfigError(
            f"There is no {missing} in {named(str(adapter_path))}; give the adapter_path of a run that was saved.",
            place=str(adapter_path),
        )
    folder = run_folder(adapter_path)
    settings = run_settings(folder, model, data)
    run = run_in(folder)
    settings.begun = run.begun if run else None  # which templates tell that print the date
    tokenizer = load_chat_tokenizer(settings.model)
    split, held_out = held_out_pairs(settings, tokenizer, is_given=data is not None, needed=not prompts, say=say)
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    questions = [own_question(prompt, chat_tokenizer) for prompt in prompts]
    questions += [question_of(pair, chat_tokenizer) for pair in uncut(held_out[:rows], settings, tokenizer)]
    comparison = Comparison(settings, questions, length_groups(held_out) if held_out else [], split)
    with compile_where_it_pays():
        _measure_both(comparison, adapter_path, max_tokens, say)
    return comparison


def _measure_both(comparison: Comparison, adapter_path: Path, max_tokens: int, say: Say) -> None:
    settings, questions = comparison.settings, comparison.questions

    say(f"Loading {settings.model}.")
    model, tokenizer = load_base(settings)
    comparison.base = answers(model, tokenizer, questions, max_tokens, "base model", say)
    comparison.before = measured(model, comparison, "base model", say)
    say(f"Loading the adapter {adapter_path}.")
    try:
        load_adapters(model, str(adapter_path))  # over the layers as they are, of full training over the weights
    except (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"The adapter in {named(str(adapter_path))} does not fit model {settings.model!r} "
            f"({first_line(error)}); give the model that it was trained from.",
            key="model",
            place=str(adapter_path),
        ) from error
    model.eval()
    comparison.tuned = answers(model, tokenizer, questions, max_tokens, "tuned model", say)
    comparison.after = measured(model, comparison, "tuned model", say)


def run_folder(adapter_path: Path) -> Path:
    """Return the adapter folder of a run, which holds that of its best adapter."""
    parent = adapter_path.absolute().parent
    inside = adapter_path.name.startswith(BEST) and (parent / RUN_SETTINGS).is_file()
    return parent if inside and not (adapter_path / RUN_SETTINGS).exists() else adapter_path


def run_settings(adapter_path: Path, model: str | None, data: str | None) -> RunSettings:
    """Return the settings of the run, with ``model`` and ``data`` in place of its own where they are given.

    Raises:
        ConfigError: they are not known, or no longer accepted.
    """
    record = adapter_path / RUN_SETTINGS
    recorded: dict[str, Any] = {}
    call: dict[str, Any] = {"train_mode": "cpo", "train": True, "model": model, "data": data}
    if record.is_file():
        call["config"] = str(record)
        recorded, _ = read_run_settings(adapter_path)
        if model is None and "model" not in recorded:
            raise ConfigError(
                f"{RUN_SETTINGS} in {named(str(adapter_path))} names no model, since the run was started by a call "
                "that was given a loaded one; give --model, and --data for rows.",
                key="model",
            )
    elif model is None:
        raise ConfigError(
            f"There is no {RUN_SETTINGS} in {named(str(adapter_path))}; give --model, and --data for rows.", key="model"
        )
    settings = config.resolve(call, call_place=ON_THE_COMMAND_LINE).settings
    if data is not None:
        settings.hf_dataset = None  # which would go before data
    elif "data" not in recorded:
        settings.data = ""  # the default is where another run's may be
    return settings


def held_out_pairs(
    settings: RunSettings, tokenizer: Any, *, is_given: bool, needed: bool, say: Say
) -> tuple[str, Sequence[PreferencePair]]:
    """Return a split and its pairs: the test set, or else the validation set, as far as the run itself evaluates it.

    Args:
        is_given: whether the user named the data; it is then taken whole, even a file without a split.
        needed: whether there is nothing to compare without; if not, there may be no pairs.

    Raises:
        DataError: the data is missing or unusable, and needed or given.
    """
    is_file = is_given and isinstance(settings.data, str) and Path(settings.data).expanduser().is_file()
    if is_file:
        wanted = ["train"]
    elif settings.valid_fraction > 0:
        wanted = ["train", "valid", "test"]
    else:
        wanted = ["valid", "test"]
    try:
        if not settings.data and not settings.hf_dataset:
            raise DataError(
                "the run's rows are not recorded; name some with --data, or ask with --prompt alone.", key="data"
            )
        train, valid, test = load_splits(settings, tokenizer, wanted)
        held_out = train if is_file else test or valid
        if not held_out:
            where = named(str(settings.hf_dataset or settings.data))
            raise DataError(
                f"{where} holds no held-out rows; name some with --data, or ask with --prompt alone.", key="data"
            )
    except DataError as error:
        if needed or is_given:
            raise
        say(f"No held-out rows are compared: {error}")
        return "", []
    batches = -1 if is_given else settings.test_batches if test else settings.val_batches
    return "file" if is_file else held_out.report.split, held_out[
        : None if batches < 0 else batches * settings.batch_size
    ]


def uncut(pairs: Sequence[PreferencePair], settings: RunSettings, tokenizer: Any) -> list[PreferencePair]:
    """Return pairs as they were before they were cut to ``max_seq_length``: half a prompt is nothing to ask."""
    if all(pair.length < settings.max_seq_length for pair in pairs):
        return list(pairs)
    whole = RunSettings.of({**vars(settings), "max_seq_length": sys.maxsize})
    splits = load_splits(whole, tokenizer, ("train", "valid", "test"))
    by_source = {pair.source: pair for split in splits for pair in split}
    return [by_source[pair.source] for pair in pairs]


def own_question(prompt: str, tokenizer: ChatTokenizer) -> Question:
    """Return a prompt of the user's under the chat template.

    Raises:
        DataError: the template does not take it.
    """
    try:
        tokens = prompt_tokens(prompt, tokenizer)
    except UnusableRow as error:
        raise DataError(f"--prompt {shown(prompt)} cannot be asked ({error}); write another.", key="prompt") from error
    return Question(USER_PROMPT, prompt, tokens.tolist())


def question_of(pair: PreferencePair, tokenizer: ChatTokenizer) -> Question:
    """Return the prompt of a held-out row with the answers that the row has."""
    chosen, rejected = (tokenizer.without_end(tokenizer.decode(ids))[0].strip() for ids in (pair.chosen, pair.rejected))
    return Question(pair.source, tokenizer.decode(pair.prompt), pair.prompt.tolist(), chosen, rejected)


def load_base(settings: RunSettings) -> tuple[nn.Module, Any]:
    """Load the model without any adapter, in the precision of the run.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        model, tokenizer = load(settings.model)[:2]
        precision = quantised_load(settings)
        if precision is not None:
            quantise_base(model, precision)
    except UserError:
        raise
    except Exception as error:  # the hub client and the architectures raise many kinds
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"model {settings.model!r} cannot be loaded ({first_line(error)}); check its files or give --model.",
            key="model",
        ) from error
    if settings.train_type != "full" or settings.num_layers > 0:
        model.freeze()  # as in the run: scores are computed, and rounded, otherwise where the head is trained
    model.eval()
    return model, tokenizer


def answers(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_tokens: int, name: str, say: Say
) -> list[Answer]:
    """Return the greedy answer to every question, at most ``max_tokens`` long."""
    given = []
    for number, question in enumerate(questions, 1):
        say(f"The {name} answers prompt {number} of {len(questions)}.")
        text, finished = "", False
        for response in stream_generate(model, tokenizer, question.tokens, max_tokens=max_tokens):
            text += response.text
            finished = response.finish_reason == "stop"
        given.append(Answer(text.strip(), finished))
    return given


def measured(model: nn.Module, comparison: Comparison, name: str, say: Say) -> list[dict[str, float]]:
    """Return the means of a model over each group of held-out pairs; none where there are no pairs."""
    if not comparison.groups:
        return []
    settings = comparison.settings
    say(f"The {name} scores {len(comparison.groups[0].pairs)} held-out pairs.")
    objective = objective_for(
        settings.dpo_cpo_loss_type,
        {"beta": settings.beta, "delta": settings.delta, **settings.loss_options},
        cpo_alpha=settings.cpo_alpha,
    )
    return preferences(model, comparison.groups, objective, batch_size=settings.batch_size, scoring=settings.scoring)
