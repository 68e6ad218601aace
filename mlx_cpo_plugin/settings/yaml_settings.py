"""YAML configuration files: values, and the line on which each key stands."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.wording import named, printable, shown

FLOAT_TAG, INTEGER_TAG, DATE_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp"))
# Far above what settings need; below what aliases of aliases, brackets without end, or a wrong file make of them.
LARGEST_FILE = 256 * 1024
MOST_VALUES = 100_000
DEEPEST = 32
MOST_BITS = 1024


_FLOAT = re.compile(
    r"""[-+]?(?: (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
               | [0-9][0-9_]*[eE][-+]?[0-9]+
               | \.(?:inf|Inf|INF)
        )$ | \.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[-+]?(?:0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0|[1-9][0-9_]*)$")


def _without(resolvers: dict[Any, Any], *tags: str) -> dict[Any, Any]:
    return {first: [entry for entry in entries if entry[0] not in tags] for first, entries in resolvers.items()}


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, in which ``1e-5`` is a number, and ``12:30``, ``010`` and a date are text.

    YAML 1.1 would read 750, 8 and a date, so that a slip trains with a number that nobody wrote.
    """

    yaml_implicit_resolvers = _without(yaml.SafeLoader.yaml_implicit_resolvers, FLOAT_TAG, INTEGER_TAG, DATE_TAG)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build the value of ``node``, and refuse one such as ``!!bool x``, at which PyYAML breaks."""
        try:
            value = super().construct_object(node, deep)
        except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
            problem = f"the value does not fit its tag {node.tag!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > MOST_BITS:  # Python would refuse to print it
            problem = f"the number has more than {MOST_BITS} bits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


class SettingsDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the text that :class:`SettingsLoader` would read as a number."""

    yaml_implicit_resolvers = _without(yaml.SafeDumper.yaml_implicit_resolvers)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape every kind of line break: PyYAML writes some of them as they stand, and reads them back as blanks."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


SettingsLoader.add_implicit_resolver(FLOAT_TAG, _FLOAT, list("-+0123456789."))
SettingsLoader.add_implicit_resolver(INTEGER_TAG, _INTEGER, list("-+0123456789"))
SettingsDumper.add_representer(str, SettingsDumper.represent_str)
SettingsDumper.add_implicit_resolver(FLOAT_TAG, _FLOAT, list("-+0123456789."))


def dump_settings(values: Any, *, flow: bool = False, width: float = 80) -> str:
    """Return YAML that this plugin, mlx-lm-lora and any program with PyYAML read back as the same values.

    Args:
        flow: on one line, as a value behind its key.
    """
    text: str = yaml.dump(
        values, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow
    )
    return text


@dataclass(frozen=True)
class YamlSettings:
    """A configuration file as read.

    Attributes:
        file: the path as it was given.
        values: key -> value.
        lines: key -> line, counted from 1; keys of nested mappings and lists are joined by dots, e.g.
            ``lora_parameters.rank`` or ``hf_dataset.0.path``.
    """

    file: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """Return where a key stands in words, e.g. ``in my.yaml, line 3``; a nested key falls back to its parent."""
        while key not in self.lines and "." in key:
            key = key.rpartition(".")[0]
        line = self.lines.get(key)  # none for a key that a merge brought in
        return f"in {named(self.file)}, line {line}" if line else f"in {named(self.file)}"


def read_yaml(path: str | Path) -> YamlSettings:
    """Read a configuration file with PyYAML's safe types only.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML, holds no mapping, gives a key twice, or is
            larger or deeper than settings are.
    """
    content = read_bytes(path)
    file = named(str(path))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line} holds bytes that are not UTF-8; save the file as UTF-8.") from error
    return parse_settings(text, str(path))


def parse_settings(text: str, path: str) -> YamlSettings:
    """Read settings that stand, or are to stand, in the file ``path``; raises as :func:`read_yaml` does."""
    return YamlSettings(path, *_parse(text, named(path)))


def read_bytes(path: str | Path) -> bytes:
    """Return what is in a configuration file.

    Raises:
        ConfigError: it is no path, no file, too large or cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"config is {shown(path)}, but must be the path of a YAML file.")
    file = named(str(path))
    try:
        if os.stat(path).st_size > LARGEST_FILE:
            raise ConfigError(f"{file} is larger than {LARGEST_FILE // 1024} KiB; give a file of settings only.")
        if not os.path.isdir(path) and not os.path.isfile(path):  # a pipe or device may have no end
            raise ConfigError(f"{file} is no file; write the settings into one.")
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error.strerror or error}.") from error
    except ConfigError:
        raise
    except ValueError as error:  # NUL, or half of a character, in the path
        raise ConfigError(f"The configuration file {file} cannot be read: its name cannot be a path.") from error


def parse_value(text: str) -> Any:
    """Return the value of one piece of YAML, e.g. ``{rank: 8}`` from the command line; bad YAML stays text."""
    try:
        loader = SettingsLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _measure(root, "the value", {})
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _parse(text: str, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a file, and the lines of their keys."""
    try:
        loader = SettingsLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise ConfigError(f"{file} is empty; write settings such as 'train_mode: cpo' into it.")
            _measure(root, file, {})
            lines: dict[str, int] = {}
            _collect_lines(root, "", lines, file, set())
            values = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else file
        raise ConfigError(f"{where} is not valid YAML: {_in_short(error.problem or error.context)}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{file}, line {line} is not valid YAML: {error.reason}.") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply; write its values out in fewer levels.") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid YAML: {_in_short(error)}.") from error
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise ConfigError(f"{file} holds {kind} where 'key: value' lines are expected.")
    return {key if isinstance(key, str) else named(key): value for key, value in values.items()}, lines


def _in_short(problem: object) -> str:
    return printable(" ".join(str(problem).split()))[:200].rstrip(".")


def _measure(node: yaml.Node, file: str, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values stand under ``node``, and in how many levels, with each alias written out.

    Raises:
        ConfigError: they are more than settings can need.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (1, 1)  # for an alias inside what it names
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size, depth = 1, 0
    for child in children:
        child_size, child_depth = _measure(child, file, known)
        size, depth = size + child_size, max(depth, child_depth)
        if size > MOST_VALUES or depth >= DEEPEST:
            excess = f"more than {MOST_VALUES} values" if size > MOST_VALUES else f"more than {DEEPEST} levels"
            where = f"{file}, line {node.start_mark.line + 1}"
            raise ConfigError(f"{where} holds {excess} once aliases are written out; remove what is not read.")
    known[id(node)] = (size, depth + 1)
    return size, depth + 1


def _collect_lines(node: yaml.Node, prefix: str, lines: dict[str, int], file: str, seen: set[int]) -> None:
    """Note the line of every key under ``node`` and refuse a key that one mapping gives twice."""
    if id(node) in seen:  # an alias: its keys stand where the anchor is
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            lines[f"{prefix}{position}"] = item.start_mark.line + 1
            _collect_lines(item, f"{prefix}{position}.", lines, file, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{file}, line {line} has a list or a mapping as a key; write the name of a setting.")
        key = key_node.value
        if key in own:
            name = named(f"{prefix}{key}")
            raise ConfigError(f"{file}, line {line} gives {name} again after line {own[key]}; keep one of the two.")
        own[key] = line
        lines[prefix + key] = line
        _collect_lines(value_node, f"{prefix}{key}.", lines, file, seen)
