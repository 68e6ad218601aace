"""``mlx_cpo_plugin.train``: a whole run by one call from Python, for scripts and notebooks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model as load_fused_model

from mlx_cpo_plugin import data as preference_data
from mlx_cpo_plugin.activation.patches import announce, resolved_settings
from mlx_cpo_plugin.console import lasting_output
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.model.layers import WITH_ADAPTER, base_of
from mlx_cpo_plugin.plugins import metrics_of, train_modes
from mlx_cpo_plugin.publish.hub import PushAfterRunError
from mlx_cpo_plugin.report.record import ReportError, rows_of_last_run
from mlx_cpo_plugin.run import mode as whole_run
from mlx_cpo_plugin.run.fusing import fused_folder
from mlx_cpo_plugin.settings.command_line import IN_THE_CALL
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.nested import SET_KEYS
from mlx_cpo_plugin.settings.validation import refused
from mlx_cpo_plugin.settings.yaml_settings import read_yaml
from mlx_cpo_plugin.training.call import check_callback
from mlx_cpo_plugin.training.state import random_seed
from mlx_cpo_plugin.types import Tokenizer, Values
from mlx_cpo_plugin.verdict import Verdict

# What a call means where neither it nor its YAML file says otherwise: it returns the model with its adapter.
DEFAULTS = {"train_mode": "cpo", "train": True, "fuse": False}

Rows = Iterable[object]


@dataclass(frozen=True)
class TrainingResult:
    """What a run has made.

    Attributes:
        model, tokenizer: the model with the trained adapter, or the fused one with ``fuse=True``.
        adapter_path: the folder of the adapter, which ``mlx_lm.load(..., adapter_path=)`` takes.
        metrics: the newest value of every metric, e.g. ``train_loss``, ``val_margins`` and, with ``test=True``,
            ``test_accuracies``; None for one that is not finite.
        verdict: how the last validation, with ``load_best`` the best, compares with the one before training; None where
            there are no two.
        history: every report of the run in order, those before it was resumed included: what ``metrics.jsonl`` has.
            ``kind`` is ``train``, ``valid``, ``test``, ``sample``, ``warning``, or ``best`` for what ``load_best`` has
            loaded.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    adapter_path: Path
    metrics: dict[str, float | None] = field(repr=False)
    verdict: Verdict | None
    history: list[Values] = field(repr=False)


def train(
    model: str | os.PathLike[str] | tuple[nn.Module, Tokenizer] | None = None,
    data: str | os.PathLike[str] | Rows | Mapping[str, Rows] | None = None,
    *,
    config: str | Path | None = None,
    training_callback: TrainingCallback | None = None,
    **settings: object,
) -> TrainingResult:
    """Train with CPO as ``mlx_lm_lora.train`` does, and return what came of it.

    ::

        from mlx_cpo_plugin import train

        rows = [{"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "5"}]
        result = train("HuggingFaceTB/SmolLM2-135M-Instruct", rows, beta=0.05, epochs=1)
        print(result.metrics["train_margins"], result.adapter_path)

    Args:
        model: a folder or a name on the Hugging Face hub, or a model and its tokenizer as ``mlx_lm.load`` returns
            them; such a model is given the adapter in place, and rid of it again where the run ends early.
        data: a folder, a file or a name on the hub, or a list of them, also as mappings with ``path``, ``weight``; or
            rows of any format, as a list, a ``datasets.Dataset`` or another iterable; or such rows, or files of them,
            by split: ``{"train": rows, "valid": "valid.jsonl"}``.
        config: a YAML file with settings that the call does not give.
        training_callback: gets the reports, see :func:`mlx_cpo_plugin.train_cpo`.
        settings: every key of a YAML file, with the same defaults, but ``fuse=False``.

    Raises:
        UserError: settings, data, model or files are at fault; says which and what to do.
    """
    in_file = read_yaml(config).values if config is not None else {}
    call = {key: value for key, value in DEFAULTS.items() if key not in in_file}
    call |= {**settings, "config": config}
    loaded, rows = None, None
    if isinstance(model, tuple | list) and len(model) >= 2 and isinstance(model[0], nn.Module):
        loaded = model[0], model[1]
    elif model is None or isinstance(model, str | os.PathLike):
        call["model"] = model
    else:
        allowed = "a folder, a name on the hub, or a model and its tokenizer as mlx_lm.load returns them"
        raise refused("model", model, IN_THE_CALL, allowed)
    if data is None or isinstance(data, str | os.PathLike):
        call["data"] = data
    elif isinstance(data, list) and _are_sets(data):
        call["data"] = [os.fspath(entry) if isinstance(entry, os.PathLike) else entry for entry in data]
    elif isinstance(data, Mapping):
        rows = data
    elif isinstance(data, Iterable) or hasattr(data, "__getitem__"):
        rows = {"train": data}
    else:
        raise refused("data", data, IN_THE_CALL, "rows, or a folder, a file or a name on the hub")

    with lasting_output(speaks=is_first_rank()), _random_numbers_kept():
        check_callback(training_callback)
        resolved = resolved_settings(call)
        modes = train_modes()
        mode = modes[resolved.train_mode]
        if loaded is not None:
            _check_loaded(*loaded, resolved)
            resolved.model = ""
        if rows is not None:
            if mode.load_dataset is not modes["cpo"].load_dataset:  # which would read other rows
                raise refused("data", data, IN_THE_CALL, f"a folder, a file or a name on the hub with {mode.name}")
            resolved.data, resolved.hf_dataset = "", None
            mode = replace(mode, load_dataset=partial(preference_data.load_dataset, rows=rows))
        tested: Values = {}

        def evaluate(*arguments: Any) -> Mapping[str, float]:
            means = metrics_of(own_mode, *arguments)
            tested.update({f"test_{name}": value for name, value in means.items()})
            return means

        own_mode, mode = mode, replace(mode, evaluate=evaluate)
        announce(mode)
        with _taken_off_where_it_fails(loaded):
            trained, tokenizer = whole_run.run_mode(resolved, mode, training_callback, loaded)
        if resolved.fuse and is_first_rank():
            trained, _ = load_fused_model(fused_folder(resolved), lazy=True)
        try:
            whole_run.push_run(resolved)
        except PushAfterRunError as error:  # the caller has a result nevertheless
            warnings.warn(str(error), stacklevel=2)
    return _result(trained, tokenizer, resolved, tested)


@contextmanager
def _taken_off_where_it_fails(loaded: tuple[nn.Module, Tokenizer] | None) -> Iterator[None]:
    """Leave no adapter on a model of the caller's where the run ends early: the same call can be made again."""
    try:
        yield
    except BaseException:
        if loaded is not None:
            modules = loaded[0].named_modules()
            bases = [(name, base_of(module)) for name, module in modules if isinstance(module, WITH_ADAPTER)]
            loaded[0].update_modules(tree_unflatten(bases))
        raise


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give the caller the random numbers of NumPy and MLX that come without a run, which seeds both."""
    of_numpy, of_mlx = np.random.get_state(), random_seed()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        mx.random.seed(of_mlx)


def _are_sets(entries: list[Any]) -> bool:
    """Whether this is a list of sets to be mixed, not of rows."""
    return bool(entries) and all(
        isinstance(entry, str | os.PathLike) or (isinstance(entry, Mapping) and {*entry} <= {*SET_KEYS})
        for entry in entries
    )


def _check_loaded(model: nn.Module, tokenizer: Tokenizer, settings: RunSettings) -> None:
    """Refuse what is no pair of model and tokenizer, what needs the model's files, and a model that has an adapter."""
    if not hasattr(model, "layers") or not hasattr(tokenizer, "encode"):
        raise ConfigError(
            f"model is a {type(model).__name__} and a {type(tokenizer).__name__} {IN_THE_CALL}, but must be a language "
            "model and its tokenizer, as mlx_lm.load returns them.",
            key="model",
            place=IN_THE_CALL,
        )
    if any("lora_a" in module for module in model.modules()):
        raise ConfigError(
            "The model has an adapter already; load it without one, give its folder and the adapter as "
            "resume_adapter_file, or take the adapter off with mlx_lm.tuner.utils.remove_lora_layers(model).",
            key="model",
            place=IN_THE_CALL,
        )
    if settings.fuse:
        raise ConfigError(
            "fuse needs files of the model, but the call gives a loaded one; give its folder or name, or set "
            "fuse=False.",
            key="fuse",
            place=IN_THE_CALL,
        )


def _result(model: nn.Module, tokenizer: Tokenizer, settings: RunSettings, tested: Values) -> TrainingResult:
    """Gather the result; ``tested`` has the metrics of the test, which are in no file where there is no folder."""
    folder = Path(settings.adapter_path).absolute()
    history: list[Values] = []
    with suppress(ReportError):  # where nothing could be written, the run has said so
        history = [row for row in rows_of_last_run(folder) if row.get("run") == settings.run_identity.id]
    if tested and not any(row["kind"] == "test" for row in history):
        history.append({"kind": "test", "run": settings.run_identity.id, **tested})
    metrics = {
        name: value
        for row in history
        for name, value in row.items()
        if row["kind"] in ("train", "valid", "best", "test") and name not in ("kind", "run", "time", "iteration")
    }
    return TrainingResult(model, tokenizer, folder, metrics, Verdict.from_report(metrics), history)
