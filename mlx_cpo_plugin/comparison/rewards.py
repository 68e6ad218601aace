"""Reward functions, as mlx-lm-lora's online train modes call them: prompts and completions -> numbers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.comparison.measure import Comparison
from mlx_cpo_plugin.comparison.questions import Question
from mlx_cpo_plugin.comparison.statistics import Measure, figures
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.errors import ConfigError, UserError, first_line, named
from mlx_cpo_plugin.training.summary import counted

Reward = Callable[..., Any]


def load_reward(entry: str) -> Reward:
    """Return the function that ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` names; a module may be in this folder.

    Raises:
        ConfigError: there is none.
    """
    place, _, name = entry.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"--reward {named(entry)} names no function; write MODULE:FUNCTION or FILE.py:FUNCTION.", key="reward"
        )
    try:
        with redirect_stdout(sys.stderr):
            function = getattr(_imported(place), name)
    except (Exception, SystemExit) as error:  # whatever somebody's module does
        raise ConfigError(
            f"--reward {named(entry)} cannot be imported ({type(error).__name__}: {first_line(error)}); check the "
            "module and the name of the function.",
            key="reward",
        ) from error
    if not callable(function):
        raise ConfigError(f"--reward {named(entry)} is no function; name one.", key="reward")
    reward: Reward = function
    return reward


def rewards(
    entry: str, reward: Reward, questions: Sequence[Question], answers: Sequence[Answer]
) -> NDArray[np.float64]:
    """Return the reward of each of N answers: float64 [N], NaN where the function returns None or NaN.

    It is called as mlx-lm-lora calls it, once, with lists: ``prompts`` without the chat template, ``completions``,
    ``answer``, the rows' chosen answers or empty texts, and ``types``, all None.

    Raises:
        UserError: it fails, or does not return a finite number, None or NaN for each answer.
    """
    try:
        with redirect_stdout(sys.stderr):  # standard output has the figures
            returned = reward(
                prompts=[question.text for question in questions],
                completions=[answer.text for answer in answers],
                answer=[question.chosen or "" for question in questions],
                types=[None] * len(answers),
            )
        if isinstance(returned, str | bytes | Mapping | Set):  # whose items are no rewards, or in no order
            raise TypeError(f"it returned a {type(returned).__name__}")
        values = np.array([np.nan if value is None else float(value) for value in returned], np.float64)
    except (Exception, SystemExit) as error:  # whatever somebody's function does
        raise UserError(
            f"--reward {named(entry)} failed ({type(error).__name__}: {first_line(error)}); it gets prompts, "
            "completions, answer and types, and returns a list of numbers.",
            key="reward",
        ) from error
    if len(values) != len(answers):
        raise UserError(
            f"--reward {named(entry)} returned {counted(len(values), 'number')} for "
            f"{counted(len(answers), 'answer')}; return one for each.",
            key="reward",
        )
    if np.isinf(values).any():
        raise UserError(
            f"--reward {named(entry)} returned {values[np.isinf(values)][0]}, of which there is no mean; return finite "
            "numbers, or None for answers that it cannot measure.",
            key="reward",
        )
    return values


def reward_figures(comparison: Comparison, entry: str, reward: Reward) -> dict[str, Any]:
    """Return what the JSON says of a reward function; answers that it gives none for are left out.

    Raises:
        UserError: see :func:`rewards`, or there is no question of which it measures all answers.
    """
    values = np.array([rewards(entry, reward, comparison.questions, given) for given in comparison.answers])
    measured = ~np.isnan(values).any(axis=0)
    if not measured.any():
        raise UserError(
            f"--reward {named(entry)} returned None or NaN for an answer to each prompt, so there is nothing to "
            "compare; check the function.",
            key="reward",
        )
    measure = Measure(f"reward {entry.rpartition(':')[2]}", "answers")
    return figures(measure, comparison.names, values[:, measured])


def _imported(place: str) -> Any:
    with _this_folder_first():
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"mlx_cpo_reward_{Path(place).stem}", place)
        assert spec is not None  # that of .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their types up
        spec.loader.exec_module(module)
        return module


@contextmanager
def _this_folder_first() -> Iterator[None]:
    """Find modules in the current folder, which a console script does not."""
    before = list(sys.path)
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = before
