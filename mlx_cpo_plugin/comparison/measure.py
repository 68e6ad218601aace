"""Models measured one after the other: their answers, and which answer of a held-out pair they prefer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.comparison.answering import answers
from mlx_cpo_plugin.comparison.contenders import BASE, TUNED, Contender, contenders, load_base, put_on
from mlx_cpo_plugin.comparison.preference import LengthGroup, Preferences, length_groups, preferences
from mlx_cpo_plugin.comparison.questions import (
    FILE,
    Question,
    Say,
    held_out_pairs,
    one_of_each_row,
    own_question,
    question_of,
    uncut,
)
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import quantised_load
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.objective import objective_for


@dataclass
class Comparison:
    """What each model answers and prefers.

    Attributes:
        settings: those of the first run; its data, its loss and its base model are compared with.
        models: the base model first.
        questions: what all were asked.
        groups: held-out pairs by length.
        held_out: the split that these come from, ``file`` for a file without one; empty where there are none.
        answers: of each model, to each question.
        preferences: of each model; none where there are no held-out pairs.
    """

    settings: RunSettings
    models: list[Contender]
    questions: list[Question]
    groups: list[LengthGroup]
    held_out: str
    answers: list[list[Answer]] = field(default_factory=list)
    preferences: list[Preferences] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return [contender.name for contender in self.models]

    @property
    def step_size(self) -> int | None:
        """Tokens of a segment of a long pair: the fewest of any run, so that no model takes more than its steps did."""
        return min((size for contender in self.models if (size := contender.settings.step_size)), default=None)


def compare(
    folders: Sequence[Path],
    *,
    prompts: Sequence[str] = (),
    rows: int = 0,
    model: str | None = None,
    data: str | None = None,
    max_tokens: int = 128,
    say: Say = print,
) -> Comparison:
    """Ask the base model, then each of the others; no two models are in memory at any time.

    Args:
        folders: adapters of LoRA, DoRA or full training, as runs left them, and models of the same tokenizer.
        prompts: the user's own.
        rows: how many held-out rows to take as prompts, too.
        model, data: in place of the run's; ``data`` may be a single file, all of which is then held out.
        max_tokens: the most tokens of an answer.
        say: receives a line of progress at each step.

    Raises:
        UserError: there is no adapter, no model or no data, or a prompt cannot be rendered.
    """
    models = contenders(folders, model, data)
    settings = models[0].settings
    tokenizer = load_chat_tokenizer(settings.model)
    chat_tokenizer = ChatTokenizer.from_settings(tokenizer, settings)
    _check_tokenizers(models, chat_tokenizer)
    split, held_out = held_out_pairs(settings, tokenizer, is_given=data is not None, needed=not prompts, say=say)
    asked = one_of_each_row(held_out)[:rows]
    questions = [own_question(prompt, chat_tokenizer) for prompt in prompts]
    questions += [question_of(pair, chat_tokenizer) for pair in uncut(asked, settings, tokenizer, split == FILE)]
    comparison = Comparison(settings, models, questions, length_groups(held_out) if held_out else [], split)
    for contender in models[1:]:
        if contender.adapter_path is not None:
            _note_other_base(contender, settings, say)
    _measure_all(comparison, max_tokens, say)
    return comparison


def _check_tokenizers(models: Sequence[Contender], tokenizer: ChatTokenizer) -> None:
    """Raise ConfigError where a model would read other tokens than the base model does."""
    base = models[0].settings
    for name in {contender.settings.model for contender in models} - {base.model}:
        if ChatTokenizer.from_settings(load_chat_tokenizer(name), base).digest() != tokenizer.digest():
            raise ConfigError(
                f"Model {name!r} has another tokenizer or chat template than {base.model!r}; compare models that "
                "read the same tokens.",
                key="model",
            )


def _note_other_base(contender: Contender, base: RunSettings, say: Say) -> None:
    """Say where an adapter is put on another model than the base model of the comparison, or asked otherwise."""
    if os.path.realpath(contender.settings.model) != os.path.realpath(base.model):  # names of the hub are no links
        say(f"Note: {contender.name} is an adapter of {contender.settings.model}, but {BASE} is {base.model}.")
    precision = quantised_load(contender.settings)
    if precision != quantised_load(base):
        loaded = f"with {precision}" if precision else "unquantised"
        say(f"Note: {contender.name} needs its weights loaded {loaded}, unlike the base model in this comparison.")
    for key in ("chat_template", "chat_template_kwargs"):
        if getattr(contender.settings, key) != getattr(base, key):
            say(
                f"Note: {contender.name} was trained with another {key} than the first run's, which all are asked with."
            )


def _measure_all(comparison: Comparison, max_tokens: int, say: Say) -> None:
    loaded: Contender | None = None  # whose base model is in memory as it was loaded
    model: Any = None
    tokenizer: Any = None
    for contender in comparison.models:
        if loaded is None or not contender.same_base(loaded):
            model = tokenizer = None  # the one before goes first
            mx.clear_cache()
            say(f"Loading {contender.settings.model}.")
            model, tokenizer = load_base(contender.settings)
        loaded = contender
        if contender.adapter_path is not None:
            say(f"Loading the adapter {contender.adapter_path}.")
            put_on(model, contender)
            loaded = None
        name = f"{contender.name} model" if contender.name in (BASE, TUNED) else f"model {contender.name}"
        comparison.answers.append(answers(model, tokenizer, comparison.questions, max_tokens, name, say))
        if comparison.groups:
            say(f"The {name} scores {len(comparison.groups[0].pairs)} held-out pairs.")
            found = preferred(model, comparison)
            if not np.isfinite(found.of_pairs).all():
                say(f"Warning: the {name} gives log-probs that are not finite, which count as worse than any other.")
            comparison.preferences.append(found)


def preferred(model: nn.Module, comparison: Comparison) -> Preferences:
    """Return what a model prefers among the held-out pairs, by the loss of the first run."""
    settings = comparison.settings
    objective = objective_for(
        settings.dpo_cpo_loss_type,
        {"beta": settings.beta, "delta": settings.delta, **settings.loss_options},
        cpo_alpha=settings.cpo_alpha,
    )
    return preferences(
        model,
        comparison.groups,
        objective,
        batch_size=settings.batch_size,
        scoring=settings.scoring,
        step_size=comparison.step_size,
    )
