"""The command line of a registered train mode, and the settings that a call gives explicitly."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from mlx_cpo_plugin.errors import ConfigError, named
from mlx_cpo_plugin.plugins import claimed_mode, loss_types, train_modes
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS
from mlx_cpo_plugin.settings.validation import unknown
from mlx_cpo_plugin.settings.yaml_settings import parse_value, read_yaml
from mlx_cpo_plugin.types import LossType, Option, TrainMode

HOST_DEFAULT_MODE = "sft"
IN_THE_CALL, ON_THE_COMMAND_LINE = "in the call", "on the command line"

Call = Sequence[str] | Mapping[str, Any] | argparse.Namespace | SimpleNamespace


class CommandLineParser(argparse.ArgumentParser):
    """A parser that raises ``ConfigError`` and reads abbreviations as mlx-lm-lora does."""

    host_flags: frozenset[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        message = named(" ".join(message.split()))
        raise ConfigError(f"Command line: {message}; --help lists what is allowed.", place=ON_THE_COMMAND_LINE)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Keep abbreviations of mlx-lm-lora's flags valid where a flag of a plugin begins likewise."""
        matches = super()._get_option_tuples(option_string)
        of_the_host = [match for match in matches if match[1] in self.host_flags]
        return of_the_host or matches


def build_parser(host_parser: argparse.ArgumentParser, mode: TrainMode | None = None) -> CommandLineParser:
    """Return the command line of ``mode``: mlx-lm-lora's flags, and one for every registered option.

    The parsed namespace contains only what was given. Values of the plugin's own options that do not fit their type are
    kept as text, for :func:`mlx_cpo_plugin.settings.config.resolve` to refuse.

    Args:
        host_parser: a fresh parser of mlx-lm-lora, whose actions are taken over and changed.
        mode: the train mode; every registered one when it is None.
    """
    modes = train_modes()
    losses = loss_types()
    options = known_options([mode] if mode else modes.values(), losses.values())
    parser = CommandLineParser(prog=host_parser.prog, description=host_parser.description, add_help=False)
    parser.host_flags = frozenset(flag for action in host_parser._actions for flag in action.option_strings)
    for action in host_parser._actions:
        option = options.pop(action.dest, None)
        if option is not None:
            _add(parser, option, action.option_strings)
            continue
        action.default = argparse.SUPPRESS
        if action.dest == "train_mode":
            action.choices = list(dict.fromkeys([*(action.choices or ()), *modes]))
        parser._add_action(action)
    group = parser.add_argument_group("options of mlx-cpo-plugin")
    for option in options.values():
        _add(group, option, [option.flag])
    return parser


def known_options(modes: Iterable[TrainMode], losses: Iterable[LossType]) -> dict[str, Option]:
    """Return the options of the modes, of the losses they can use, and those that all modes share, by name."""
    modes, losses = list(modes), list(losses)
    options: dict[str, Option] = {}
    if any(mode.has(LOSS_OPTION) for mode in modes):
        options |= {option.name: option for loss in reversed(losses) for option in reversed(loss.options)}
    options |= {option.name: option for mode in modes for option in mode.options}
    if LOSS_OPTION in options:
        options[LOSS_OPTION] = replace(options[LOSS_OPTION], choices=tuple(loss.name for loss in losses))
    return options | {option.name: option for option in COMMON_OPTIONS}


def _add(parser: argparse._ActionsContainer, option: Option, flags: Sequence[str]) -> None:
    help = option.help if option.default is None else f"{option.help} (default: {option.default})"
    arguments: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if option.type is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **arguments)
        return
    arguments["metavar"] = option.name.upper()
    if option.choices:
        arguments["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
    parser.add_argument(*flags, type=_reader(option.type), **arguments)


def _reader(kind: type) -> Callable[[str], Any]:
    """Return the function that parses a command-line argument; what does not parse stays text."""
    if kind is str:
        return str
    if kind not in (int, float):
        return parse_value

    def number(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return number


def host_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of mlx-lm-lora."""
    from mlx_lm_lora.train import build_parser as build_host_parser

    parser: argparse.ArgumentParser = build_host_parser()
    return parser


def host_defaults() -> dict[str, Any]:
    """Return every setting of mlx-lm-lora with its default."""
    from mlx_lm_lora.train import CONFIG_DEFAULTS

    parsed = vars(host_parser().parse_args([]))
    return {**parsed, **CONFIG_DEFAULTS, **{key: value for key, value in parsed.items() if value is not None}}


def explicit(call: Call, mode: TrainMode | None = None) -> dict[str, Any]:
    """Return the settings that a call gives, without any default.

    Args:
        call: the arguments of a command line; the mapping of ``main({...})``, where None means not given; or the
            namespace of ``run(namespace)``, where an attribute at the default of mlx-lm-lora's parser is not given.
        mode: the train mode whose options the command line has; every registered one when it is None.

    Raises:
        ConfigError: the command line contains an unknown option or one without its value.
    """
    if isinstance(call, Sequence):
        parser = build_parser(host_parser(), mode)
        values, rest = parser.parse_known_args(list(call))
        if rest:
            raise unknown("option", rest[0].partition("=")[0], parser._option_string_actions, ON_THE_COMMAND_LINE)
        return vars(values)
    defaults = {} if isinstance(call, Mapping) else vars(host_parser().parse_args([]))
    given = call if isinstance(call, Mapping) else vars(call)
    return {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}


def requested_mode(call: Call) -> TrainMode | None:
    """Return the registered train mode that a call asks for, or None to leave the call to mlx-lm-lora.

    The call's own ``train_mode`` takes precedence over that of its YAML file. Nothing is printed or raised here: errors
    are for whatever handles the call then, mlx-lm-lora or :func:`mlx_cpo_plugin.settings.config.resolve`.
    """
    try:
        return claimed_mode(_requested_name(call))
    except ConfigError:
        return None


def _requested_name(call: Call) -> str:
    if isinstance(call, Sequence):
        call = _lenient_parser().parse_known_args(list(call))[0]
    values = call if isinstance(call, Mapping) else vars(call)
    mode = values.get("train_mode") or _mode_in_yaml(values.get("config")) or HOST_DEFAULT_MODE
    return mode if isinstance(mode, str) else ""


def _lenient_parser() -> CommandLineParser:
    """Return a parser of mlx-lm-lora's flags that takes any value for each, and prints no help."""
    parser = CommandLineParser(add_help=False)
    for action in host_parser()._actions:
        action.type = action.choices = None
        is_help = isinstance(action, argparse._HelpAction)
        parser._add_action(argparse._StoreTrueAction(action.option_strings, "help") if is_help else action)
    return parser


def _mode_in_yaml(file: Any) -> str | None:
    """Return the ``train_mode`` of a YAML file, even of one that is not valid YAML."""
    if not isinstance(file, str | Path) or not file:
        return None
    try:
        mode = read_yaml(file).values.get("train_mode")
        return mode if isinstance(mode, str) else None
    except ConfigError:
        pass
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    found = re.search(r"""^train_mode\s*:\s*["']?([\w-]+)""", text, re.MULTILINE)
    return found.group(1) if found else None
