"""YAML configuration files: values, and the line on which each key stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_cpo_plugin.errors import ConfigError

FLOAT_TAG = "tag:yaml.org,2002:float"


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that ``1e-5`` is a number and not text."""

    # The parent's table is copied rather than changed, and its resolver of floats left out.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag != FLOAT_TAG]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


SettingsLoader.add_implicit_resolver(
    FLOAT_TAG,
    re.compile(
        r"""[-+]?(?: (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
                   | [0-9][0-9_]*[eE][-+]?[0-9]+
                   | \.(?:inf|Inf|INF)
            )$ | \.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


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
        return f"in {self.file}, line {line}" if line else f"in {self.file}"


def read_yaml(path: str | Path) -> YamlSettings:
    """Read a configuration file with PyYAML's safe types only.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML, holds no mapping, or gives a key twice.
    """
    file = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error.strerror or error}.") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line} holds bytes that are not UTF-8; save the file as UTF-8.") from error
    return _parse(text, file)


def parse_value(text: str) -> Any:
    """Return the value of one piece of YAML, e.g. ``{rank: 8}`` from the command line; bad YAML stays text."""
    try:
        return yaml.load(text, Loader=SettingsLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _parse(text: str, file: str) -> YamlSettings:
    try:
        loader = SettingsLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise ConfigError(f"{file} is empty; write settings such as 'train_mode: cpo' into it.")
            lines: dict[str, int] = {}
            _collect_lines(root, "", lines, file, set())
            values = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else file
        raise ConfigError(f"{where} is not valid YAML: {error.problem or error.context}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{file}, line {line} is not valid YAML: {error.reason}.") from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise ConfigError(f"{file} holds {kind} where 'key: value' lines are expected.")
    return YamlSettings(file, {str(key): value for key, value in values.items()}, lines)


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
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in own:
            raise ConfigError(
                f"{file}, line {line} gives {prefix}{key} again after line {own[key]}; keep one of the two."
            )
        own[key] = line
        lines[prefix + key] = line
        _collect_lines(value_node, f"{prefix}{key}.", lines, file, seen)
