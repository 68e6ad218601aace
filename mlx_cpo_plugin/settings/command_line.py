"""The command line of a registered train mode, and the settings that a call gives explicitly."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mlx_cpo_plugin.atomic_files import is_stream
from mlx_cpo_plugin.errors import ConfigError, named
from mlx_cpo_plugin.plugins import claimed_mode, loss_types, option_origins, train_modes
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS, GROUPS, LOSS
from mlx_cpo_plugin.settings.validation import KEYS_OF_OTHERS, as_key, refused, unknown
from mlx_cpo_plugin.settings.yaml_settings import NOT_YAML, dump_settings, parse_value, read_yaml
from mlx_cpo_plugin.types import LossType, Option, TrainMode, Values

HOST_DEFAULT_MODE = "sft"
_DESCRIPTION = """\
Fine-tune a model. The options up to the last group are those of train_mode cpo.
Each is also a key of the configuration file; the command line takes precedence."""
# Flags of mlx-lm-lora that no option stands for and every mode has -> how the help shows them.
_TEXTS = {
    "help": (None, "Show this help and exit."),
    "config": ("FILE", "Configuration file in YAML."),
    "train_mode": (None, "How to train; cpo is preference training without a reference model. (default: sft)"),
}
IN_THE_CALL, ON_THE_COMMAND_LINE = "in the call", "on the command line"

Call = Sequence[str] | Values | argparse.Namespace
"""A command line, the mapping of ``main({...})``, or the namespace of ``run(namespace)``."""


class CommandLineParser(argparse.ArgumentParser):
    """A parser that raises ``ConfigError``."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Leave out abbreviations that have another meaning to other trainers, such as ``--lr``."""
        found = super()._get_option_tuples(option_string)
        meant = KEYS_OF_OTHERS.get(as_key(option_string.partition("=")[0]))
        return [each for each in found if meant is None or each[0].dest == meant.partition(",")[0]]

    def error(self, message: str) -> NoReturn:
        message = named(" ".join(message.split()))
        flag = re.search(r"--([\w-]+)", message)
        raise ConfigError(
            f"Command line: {message}; --help lists what is allowed.",
            key=as_key(flag[1]) if flag else "",
            place=ON_THE_COMMAND_LINE,
        )


def build_parser(other_modes: bool = True) -> CommandLineParser:
    """Return the parser of a flag for every registered option, in groups, and of mlx-lm-lora's flags.

    The parsed namespace contains only what was given. Values of the plugin's own options that do not fit their type are
    kept as text, for :func:`mlx_cpo_plugin.settings.config.resolve` to refuse.

    Args:
        other_modes: whether it has the flags that only mlx-lm-lora's other train modes use.
    """
    modes, losses = train_modes(), loss_types()
    options = known_options(modes.values(), losses.values())
    host = host_parser()
    parser = CommandLineParser(
        prog=host.prog,
        usage="%(prog)s --config FILE [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    flags, of_other_modes = {}, []
    for action in host._actions:
        flags[action.dest] = action.option_strings
        if action.dest in options:
            continue
        action.default = argparse.SUPPRESS
        if action.dest == "train_mode":
            action.choices = list(dict.fromkeys([*(action.choices or ()), *modes]))
        if action.dest in _TEXTS:
            action.metavar, action.help = _TEXTS[action.dest]
            parser._add_action(action)
        else:
            of_other_modes.append(action)
    for heading, members in _grouped(options.values()).items():
        group = parser.add_argument_group(heading, _listed(losses.values()) if heading == LOSS else None)
        for option in members:
            _add(group, option, flags.get(option.name, [option.flag]))
    if other_modes:
        group = parser.add_argument_group("other train modes of mlx-lm-lora")
        for action in of_other_modes:
            group._add_action(action)
    return parser


def _grouped(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Return the options by the headings of the help, those of other distributions last."""
    origins = option_origins()
    own = [option.name for mode in train_modes().values() for option in (*COMMON_OPTIONS, *mode.options)]
    order = {name: number for number, name in enumerate(dict.fromkeys(own))}
    groups: dict[str, list[Option]] = {heading: [] for heading in GROUPS}
    for option in sorted(options, key=lambda option: order.get(option.name, len(order))):
        heading = f"from {origins[option.name]}" if option.name in origins else option.group
        groups.setdefault(heading, []).append(option)
    return {heading: members for heading, members in groups.items() if members}


def _listed(losses: Iterable[LossType]) -> str:
    """Return the losses with their formulas, as the text of their group."""
    known = list(losses)
    width = max(len(loss.name) for loss in known)
    lines = [
        textwrap.fill(f"{loss.name:<{width}}  {loss.formula}", 76, subsequent_indent=" " * (width + 2))
        for loss in known
    ]
    return "With logits = log-prob of the chosen minus log-prob of the rejected answer:\n" + "\n".join(lines)


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
    help = f"{option.help} (default: {_shown(option.default)})".replace("%", "%%")
    arguments: Values = {"dest": option.name, "default": argparse.SUPPRESS, "help": help}
    if option.type is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **arguments)
        return
    arguments["metavar"] = option.name.upper()
    if option.choices:
        arguments["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
    parser.add_argument(*flags, type=_reader(option), **arguments)


def _shown(default: object) -> str:
    if isinstance(default, Mapping):
        default = {key: value for key, value in default.items() if value != {}} or None
    return (
        "none" if default is None else dump_settings(default, flow=True, width=math.inf).removesuffix("...\n").strip()
    )


def _reader(option: Option) -> Callable[[str], object]:
    """Return the function that parses a command-line argument; what does not parse stays text.

    ``null`` is the default, as in YAML.
    """
    read = _list_or_text if option.listed else _reader_of(option.type)
    return lambda text: None if text == "null" else read(text)


def _reader_of(kind: type) -> Callable[[str], object]:
    def number(text: str) -> object:
        try:
            return kind(text)
        except ValueError:
            return text

    return str if kind is str else number if kind in (int, float) else parse_value


def _list_or_text(text: str) -> object:
    value = parse_value(text) if text.startswith("[") else text
    return value if isinstance(value, list) else text


def host_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of mlx-lm-lora."""
    from mlx_lm_lora.train import build_parser as build_host_parser

    parser: argparse.ArgumentParser = build_host_parser()
    return parser


def host_defaults() -> Values:
    """Return every setting of mlx-lm-lora with its default."""
    from mlx_lm_lora.train import CONFIG_DEFAULTS

    parsed = vars(host_parser().parse_args([]))
    return parsed | CONFIG_DEFAULTS | {key: value for key, value in parsed.items() if value is not None}


def explicit(call: Call) -> Values:
    """Return the settings that a call gives, without any default.

    None in a mapping means not given, and so does the default of mlx-lm-lora's parser in a namespace.

    Raises:
        ConfigError: the command line contains an unknown option or one without its value.
    """
    if isinstance(call, Sequence):
        parser = build_parser()
        values, rest = parser.parse_known_args(list(call))
        if rest:
            name, known = rest[0].partition("=")[0], parser._option_string_actions
            read = build_parser(other_modes=False)._option_string_actions
            raise unknown("option", name, known, ON_THE_COMMAND_LINE, read=read)
        return vars(values)
    defaults = {} if isinstance(call, Mapping) else vars(host_parser().parse_args([]))
    given = call if isinstance(call, Mapping) else vars(call)
    found = {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}
    if not isinstance(call, Mapping) and is_stream(str(found.get("config", ""))):
        del found["config"]  # mlx-lm-lora has read it: all that was in it is here
    return found


def asks_for_all_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for help, and names neither a mode nor a file that may."""
    try:
        values = _leniently(words)
    except ConfigError:
        return False
    return bool(values.get("help")) and not (values.get("train_mode") or values.get("config"))


def requested_mode(call: Call) -> TrainMode | None:
    """Return the registered train mode that a call asks for, or None to leave the call to mlx-lm-lora.

    The call's own ``train_mode`` takes precedence over that of its YAML file. Nothing is printed or raised here: errors
    are for whatever handles the call then, mlx-lm-lora or :func:`mlx_cpo_plugin.settings.config.resolve`.
    """
    try:
        values = _leniently(call)
    except ConfigError:
        return None
    mode = values.get("train_mode") or _mode_in_yaml(values.get("config")) or HOST_DEFAULT_MODE
    return claimed_mode(mode) if isinstance(mode, str) else None


def refuse_mistakes(words: Sequence[str]) -> None:
    """Refuse a command line that would end in a traceback of mlx-lm-lora, whichever mode it asks for.

    Raises:
        ConfigError: mlx-lm-lora cannot read the YAML file, or the file misspells a registered train mode,
            or gives something else than a name.
    """
    try:
        values = _leniently(words)
    except ConfigError:
        return  # mlx-lm-lora's parser says what is wrong
    file = values.get("config")
    if not file or values.get("help") or is_stream(file):
        return
    try:
        with open(file) as stream:  # as mlx-lm-lora does, which takes files that read_yaml refuses
            mode = yaml.safe_load(stream).get("train_mode")
    except (OSError, AttributeError, *NOT_YAML):
        read_yaml(file)
        return
    of_the_host = next((action.choices for action in host_parser()._actions if action.dest == "train_mode"), None)
    known = [*(of_the_host or ()), *train_modes()]
    near = not isinstance(mode, str) or get_close_matches(mode.lower(), train_modes(), n=1)
    if mode is not None and mode not in known and near and not values.get("train_mode"):
        allowed = f"one of {', '.join(dict.fromkeys(known))}"
        raise refused("train_mode", mode, read_yaml(file).place("train_mode"), allowed)


def _leniently(call: Call) -> Values:
    """Return the settings of a call; a command line may give any value to each flag, and prints no help."""
    if isinstance(call, Mapping):
        return call
    if not isinstance(call, Sequence):
        return vars(call)
    parser = CommandLineParser(add_help=False)
    for action in host_parser()._actions:
        action.type = action.choices = None
        is_help = isinstance(action, argparse._HelpAction)
        parser._add_action(argparse._StoreTrueAction(action.option_strings, "help") if is_help else action)
    return vars(parser.parse_known_args(list(call))[0])


def _mode_in_yaml(file: str | Path | None) -> object:
    """Return the ``train_mode`` of a YAML file, also of one that :func:`read_yaml` refuses.

    What can be read only once is left to mlx-lm-lora, whose ``run`` is called with what it has found there.
    """
    if is_stream(str(file)):
        return None
    try:
        values = parse_value(Path(file or "").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, TypeError):
        return None
    return values.get("train_mode") if isinstance(values, dict) else None
