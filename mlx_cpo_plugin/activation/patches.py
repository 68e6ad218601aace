"""Replacements for functions of mlx-lm-lora, put in place once it is imported.

``mlx_lm_lora.train``: ``main`` and ``run`` answer for the registered train modes and pass every other call on.
``mlx_lm_lora.trainer.cpo_trainer``: ``train_cpo``, ``evaluate_cpo`` and ``CPOTrainingArgs`` are the plugin's.
``mlx_lm_lora.trainer.datasets``: the loaders answer for CPO with the plugin's reader, and pass every other call on.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_cpo_plugin import blas
from mlx_cpo_plugin._version import NEWEST_TESTED_HOST, OLDEST_TESTED_HOST, __version__, host_version
from mlx_cpo_plugin.activation import hook_state, loaders
from mlx_cpo_plugin.console import lasting_output
from mlx_cpo_plugin.errors import ConfigError, PluginError, UserError
from mlx_cpo_plugin.types import TrainMode

if TYPE_CHECKING:
    from mlx_cpo_plugin.settings.command_line import Call
    from mlx_cpo_plugin.settings.config import RunSettings

TRAINER_NAMES = ("train_cpo", "evaluate_cpo", "CPOTrainingArgs")


def apply(module: ModuleType) -> None:
    """Hook one of :data:`hook_state.TARGETS`, which has just been imported.

    Raises:
        PluginError: the host is too old, or the module lacks a function that has to be replaced.
        Exception: whatever importing the rest of the plugin raises.
    """
    with suppress(ConfigError):  # a run of a registered mode says so, the host's own modes go on
        blas.use_fast_blas()
    if module.__name__ == hook_state.DATASETS_MODULE:
        for name in loaders.LOADERS:
            if hasattr(module, name):  # what a version of the host lacks nobody calls
                _replace(module, name, loaders.answering_for_cpo(name, getattr(module, name)))
        return
    for name, replacement in _replacements(module).items():
        _replace(module, name, replacement)
        if name not in hook_state.active:
            hook_state.active.append(name)


def _replacements(module: ModuleType) -> dict[str, object]:
    """Return what takes the place of the functions of the host's trainer, or of its command, by name."""
    of_trainer = module.__name__ == hook_state.CPO_MODULE
    if of_trainer and (fault := too_old(host_version())):
        raise PluginError(f"{fault}; the imported one is in {Path(str(module.__file__)).parents[1]}")
    missing = [name for name in (*TRAINER_NAMES, *(() if of_trainer else ("main", "run"))) if not hasattr(module, name)]
    if missing:
        raise PluginError(f"{module.__name__} of mlx-lm-lora {host_version()} has no {', '.join(missing)}")
    if of_trainer:
        trainer = import_module("mlx_cpo_plugin.training.trainer")
        return {name: getattr(trainer, name) for name in TRAINER_NAMES}
    import_module("mlx_cpo_plugin.settings.config")  # now, so that a fault in it is known before anything runs
    return {"main": wrapped_main(module.main), "run": wrapped_run(module.run)}


def _replace(module: ModuleType, name: str, replacement: object) -> None:
    """Put ``replacement`` in the place of what ``module`` calls ``name``, and of all copies of it in the host."""
    original = getattr(module, name)
    setattr(module, f"_host_{name}", original)
    setattr(module, name, replacement)
    # By name and identity: the host's CPOTrainingArgs is its DPOTrainingArgs, which must stay.
    for path, other in list(sys.modules.items()):
        if path.startswith("mlx_lm_lora.") and other and vars(other).get(name) is original:
            setattr(other, name, replacement)


def wrapped_main(host_main: Callable[..., object]) -> Callable[..., object]:
    """Return ``main`` for the registered train modes; it calls ``host_main`` as it was called for all others."""

    @functools.wraps(host_main)
    def main(*positional: object, **named: object) -> object:
        args = _first(positional, named)
        on_console = args is None
        call = sys.argv[1:] if on_console else args
        mode = None
        try:
            mode = _mode_of(call)
            if mode is None:
                if on_console:
                    _help_with_all(call)
                    _refuse_mistakes(call)
                return host_main(*positional, **named)
            signature(host_main).bind(*positional, **named)  # raises what the host would
            with lasting_output(of_process=on_console, speaks=_is_first_rank()):
                # The host prints its banner and summary, then calls `run`; the YAML file is not read a second time.
                return host_main(vars(resolved_settings(call)))
        except UserError as error:
            if on_console:
                exit_with(f"error: {error}", error.exit_code)
            raise
        except KeyboardInterrupt:
            if on_console and mode is not None:
                exit_with("\ninterrupted: the adapter that was saved last, if any, is in adapter_path.", 130)
            raise

    return main


def wrapped_run(host_run: Callable[..., object]) -> Callable[..., object]:
    """Return ``run`` for the registered train modes; it calls ``host_run`` as it was called for all others."""

    @functools.wraps(host_run)
    def run(*positional: Any, **named: Any) -> object:
        args = _first(positional, named)
        mode = _mode_of(args)
        if mode is None:
            return host_run(*positional, **named)
        signature(host_run).bind(*positional, **named)  # raises what the host would
        callback = positional[1] if len(positional) > 1 else named.get("training_callback")
        with lasting_output(speaks=_is_first_rank()):
            from mlx_cpo_plugin.run.mode import push_run, run_mode
            from mlx_cpo_plugin.settings.config import RunSettings

            # Those that `main` gave to the host come back from there.
            is_resolved = getattr(args, "plugin_resolved", False)
            settings = RunSettings.of(vars(args)) if is_resolved else resolved_settings(args)
            announce(mode)
            run_mode(settings, mode, callback)
            push_run(settings)
            return None

    return run


def _is_first_rank() -> bool:
    from mlx_cpo_plugin.exchange import is_first_rank  # not before the BLAS has been loaded: it imports MLX

    return is_first_rank()


def _first(positional: Sequence[object], named: Mapping[str, object]) -> Any:
    """Return the argument ``args`` of a call of ``main`` or ``run``, None where it is left out."""
    return positional[0] if positional else named.get("args")


def _mode_of(call: Call) -> TrainMode | None:
    """Return the registered train mode that a call of ``main`` or ``run`` asks for; None for the host's own modes."""
    from mlx_cpo_plugin.settings import command_line

    try:
        mode = command_line.requested_mode(call)
    except Exception as fault:
        hook_state.record_fault(__name__, fault)
        mode = None
    if mode is None:
        hook_state.refuse_if_cpo(call)
    elif hook_state.faults:
        hook_state.refuse_cpo()
    return mode


def _help_with_all(words: Sequence[str]) -> None:
    """Print the help of all modes and exit, if that is asked for; after a fault mlx-lm-lora prints its own."""
    from mlx_cpo_plugin.settings import command_line

    if hook_state.faults:
        return
    try:
        text = command_line.build_parser().format_help() if command_line.asks_for_all_help(words) else ""
    except Exception as fault:
        hook_state.record_fault(__name__, fault)
        return
    if text:
        print(text, end="")
        raise SystemExit(0)


def _refuse_mistakes(words: Sequence[str]) -> None:
    """Refuse what mlx-lm-lora would end in a traceback; no other fault may stop its own modes."""
    from mlx_cpo_plugin.settings import command_line

    try:
        command_line.refuse_mistakes(words)
    except ConfigError:
        raise
    except Exception as fault:
        hook_state.record_fault(__name__, fault)


def resolved_settings(call: Call) -> RunSettings:
    """Return the settings of the run that a call asks for, after printing what is to be noted about them."""
    from mlx_cpo_plugin.settings import config

    resolved = config.resolve(call)
    for note in resolved.notes:
        print(f"note: {note}")
    return resolved.settings


def exit_with(message: str, code: int) -> NoReturn:
    """End the command with an exit code and one sentence on standard error."""
    with lasting_output(of_process=True):
        print(message, file=sys.stderr)
    raise SystemExit(code)


def announce(mode: TrainMode) -> None:
    """Print one line: versions, active hooks and, on a Linux CPU, the BLAS; warn once if the host is untested."""
    blas.use_fast_blas()
    products = blas.description()
    print(
        f"mlx-cpo-plugin {__version__} runs {mode.name} in mlx-lm-lora {host_version()}; "
        f"hooks active: {', '.join(hook_state.active)}{products and f'; BLAS: {products}'}"
    )
    if advice := blas.advice():
        print(f"note: matrix products are slow here: {advice}.")
    if warning := untested_host_warning(host_version()):
        _warn_once(warning)


@functools.cache
def _warn_once(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr)


def too_old(version: str) -> str:
    """Return what to do about a host older than the tested range; empty for any other, or an unknown version."""
    if not _numbers(version) or _numbers(version) >= _numbers(OLDEST_TESTED_HOST):
        return ""
    return f"mlx-lm-lora {version} is too old for mlx-cpo-plugin: pip install 'mlx-lm-lora>={OLDEST_TESTED_HOST}'"


def untested_host_warning(version: str) -> str:
    """Return what to say about a host outside the tested range; empty inside it."""
    if _numbers(OLDEST_TESTED_HOST) <= _numbers(version) <= _numbers(NEWEST_TESTED_HOST):
        return ""
    tested = f"{OLDEST_TESTED_HOST} to {NEWEST_TESTED_HOST}"
    return f"mlx-lm-lora {version} is outside the range that mlx-cpo-plugin is tested with, {tested}."


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
