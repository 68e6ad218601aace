"""YAML configuration files: values, and the line on which each key stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_cpo_plugin.errors import ConfigError, first_line, named, printable, shown
from mlx_cpo_plugin.types import Values

FLOAT_TAG, INTEGER_TAG, DATE_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp"))

Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]

_FLOAT = re.compile(
    r"""[-+]?(?: (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
               | [0-9][0-9_]*[eE][-+]?[0-9]+
               | \.(?:inf|Inf|INF)
        )$ | \.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[-+]?(?:0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0|[1-9][0-9_]*)$")


def _without(resolvers: Resolvers, *tags: str) -> Resolvers:
    return {first: [entry for entry in entries if entry[0] not in tags] for first, entries in resolvers.items()}


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, in which ``1e-5`` is a number, and ``12:30``, ``010`` and a date are text.

    YAML 1.1 reads 750, 8 and a date, so that a typo would train with a number that nobody wrote.
    """

    yaml_implicit_resolvers = _without(yaml.SafeLoader.yaml_implicit_resolvers, FLOAT_TAG, INTEGER_TAG, DATE_TAG)


class SettingsDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that :class:`SettingsLoader` would read as a number."""

    yaml_implicit_resolvers = _without(yaml.SafeDumper.yaml_implicit_resolvers)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape every kind of line break: PyYAML writes some of them as they stand, and reads them back as blanks."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


SettingsLoader.add_implicit_resolver(FLOAT_TAG, _FLOAT, list("-+0123456789."))
SettingsLoader.add_implicit_resolver(INTEGER_TAG, _INTEGER, list("-+0123456789"))
SettingsDumper.add_representer(str, SettingsDumper.represent_str)
SettingsDumper.add_implicit_resolver(FLOAT_TAG, _FLOAT, list("-+0123456789."))


def dump_settings(values: object, *, flow: bool = False, width: float = 80) -> str:
    """Return YAML, with ``flow`` on one line, that any program with PyYAML reads back as the same values."""
    text: str = yaml.dump(
        values, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow
    )
    return text


@dataclass(frozen=True)
class YamlSettings:
    """A configuration file as read.

    Attributes:
        lines: key -> line, counted from 1; keys of nested mappings and lists are joined by dots, e.g.
            ``lora_parameters.rank`` or ``hf_dataset.0.path``.
    """

    file: str
    values: Values
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
        ConfigError: the file cannot be read, is not UTF-8 or not YAML, holds no mapping, or gives a key twice.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _refused(path, line, "holds bytes that are not UTF-8; save the file as UTF-8") from error
    return parse_settings(text, path)


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a configuration file; raises ``ConfigError`` where it cannot be read."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"config is {shown(path)}, but must be the path of a YAML file.", key="config")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"The configuration file {named(str(path))} cannot be read ({reason}); check the path.",
            key="config",
            place=str(path),
        ) from error


def parse_value(text: str) -> Any:
    """Return the value of one piece of YAML, e.g. ``{rank: 8}`` from the command line; bad YAML stays text."""
    try:
        return yaml.load(text, SettingsLoader)
    except NOT_YAML:
        return text


# Beside its own errors, PyYAML raises these for a value that does not fit its tag, such as `!!bool x`.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def parse_settings(text: str, path: str | Path) -> YamlSettings:
    """Parse the text of a configuration file; ``path`` is its name in messages. Raises as :func:`read_yaml` does."""
    lines: dict[str, int] = {}
    try:
        loader = SettingsLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise _refused(path, None, "is empty; write settings such as 'train_mode: cpo' into it")
        _collect_lines(root, "", lines, path)
        values = loader.construct_document(root)
    except ConfigError:
        raise
    except NOT_YAML as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line + 1 if mark else None
        if isinstance(error, yaml.reader.ReaderError):
            line, problem = text.count("\n", 0, error.position) + 1, error.reason
        problem = printable(" ".join(str(problem or first_line(error)).split()))[:200].rstrip(".")
        raise _refused(path, line, f"is not valid YAML: {problem}") from error
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise _refused(path, None, f"holds {kind} where 'key: value' lines are expected")
    return YamlSettings(str(path), {key if isinstance(key, str) else named(key): values[key] for key in values}, lines)


def _refused(path: str | Path, line: int | None, fault: str, key: str = "") -> ConfigError:
    place = named(str(path)) + (f", line {line}" if line else "")
    return ConfigError(f"{place} {fault}.", key=key, place=f"in {place}")


def _collect_lines(node: yaml.Node, prefix: str, lines: dict[str, int], path: str | Path) -> None:
    """Collect the line of every key under ``node``, and refuse duplicate keys."""
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            lines[f"{prefix}{position}"] = item.start_mark.line + 1
            _collect_lines(item, f"{prefix}{position}.", lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refused(path, line, "has a list or a mapping as a key; write the name of a setting")
        key = prefix + key_node.value
        if key in own:
            fault = f"gives {named(key)} again after line {own[key]}; keep one of the two"
            raise _refused(path, line, fault, key)
        own[key] = lines[key] = line
        _collect_lines(value_node, f"{key}.", lines, path)
