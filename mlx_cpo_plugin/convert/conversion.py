"""What is read from another program's configuration, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from mlx_cpo_plugin.errors import ConfigError, shown
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings
from mlx_cpo_plugin.types import Option

_DEFAULTS = {option.name: option.default for option in COMMON_OPTIONS}

# What OmegaConf and Hydra put values in the place of.
_INTERPOLATION = re.compile(r"\$\{[^{}]+\}")

KeyPath = tuple[str | int, ...]
"""A key inside mappings and lists, e.g. ``("datasets", 0, "path")``."""


class Source:
    """A configuration of another program; keeps account of the keys that were read, inside mappings, too.

    Args:
        settings: the file as read.
        path: where these values stand in the file.
    """

    def __init__(self, settings: YamlSettings, path: KeyPath = ()) -> None:
        self.settings = settings
        self.values = settings.values
        self._path = path
        self._read: set[str] = set()
        self._inside: dict[str, list[Source]] = {}

    def gives(self, key: str) -> bool:
        """Whether a key has a value; null is none."""
        return self.values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether a key is there without a value."""
        self._read.add(key)
        return key in self.values and not self.gives(key)

    def raw(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands, or ``default`` where it is missing or null."""
        self._read.add(key)
        if not self.gives(key):
            return default
        value = self.values[key]
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, str) and _INTERPOLATION.search(part) for part in parts):
            raise self.refuse(key, "what stands in ${} is known to its own program alone: write the value")
        return value

    def as_it_is(self, key: str) -> Any:
        """Return a value, or None, in which ${} may stand for something else than with Hydra."""
        self._read.add(key)
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a float.

        Raises:
            ConfigError: it is something else.
        """
        return self._checked(key, float, default)

    def count(self, key: str, default: int | None = None, least: int | None = None) -> Any:
        """Return an integer.

        Raises:
            ConfigError: it is something else, or below ``least``.
        """
        value = self._checked(key, int, default)
        if least is not None and value is not None and value < least:
            raise self.refuse(key, f"it must be at least {least}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value.

        Raises:
            ConfigError: it is something else.
        """
        return bool(self._checked(key, bool, default))

    def text(self, key: str, default: str | None = None) -> Any:
        """Return a string.

        Raises:
            ConfigError: it is something else.
        """
        return self._checked(key, str, default)

    def inside(self, key: str) -> Source:
        """Return the mapping that a key holds as a source of its own, empty where it is missing.

        Raises:
            ConfigError: it is something else.
        """
        return self._children(key, [((), self._checked(key, dict, {}))])[0]

    def entries(self, key: str, marks: tuple[str, ...] = ("path",)) -> list[Source]:
        """Return the mappings of the list that a key holds as sources of their own.

        Args:
            marks: keys of which each mapping must have one, with text.

        Raises:
            ConfigError: it is something else.
        """
        entries = self.raw(key, [])
        if not isinstance(entries, list) or not all(
            isinstance(entry, Mapping) and any(isinstance(entry.get(mark), str) for mark in marks) for entry in entries
        ):
            raise self.refuse(key, f"it must be a list of mappings, each with a {' or '.join(marks)}")
        return self._children(key, [((number,), dict(entry)) for number, entry in enumerate(entries)])

    def refuse(self, key: str, allowed: str, default: Any = None) -> ConfigError:
        """Return the error for a value that has no counterpart: where it stands, and what would have."""
        value, place = (self.values[key], self.settings.place(key)) if self.gives(key) else (default, "by default")
        name = in_words((*self._path, key))
        return ConfigError(f"{name} is {shown(value)} {place}, but {allowed}.", key=name, place=place)

    def unread(self) -> list[KeyPath]:
        """Return the keys that nobody asked for, in the order of the file, inside mappings that were read, too."""
        return [path for path, was_read in self._keys() if not was_read]

    def read(self) -> list[KeyPath]:
        """Return the keys that were asked for, each mapping by the keys inside it."""
        return [path for path, was_read in self._keys() if was_read]

    def value_at(self, path: KeyPath) -> Any:
        """Return what a key of :meth:`unread` or :meth:`read` holds."""
        value: Any = self.values
        for part in path:
            value = value[part]
        return value

    def without(self, path: KeyPath) -> Source:
        """Return the same configuration without one key, as nobody has read it yet."""
        values = deepcopy(self.values)
        holder: Any = values
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]
        return Source(YamlSettings(self.settings.file, values, self.settings.lines))

    def _keys(self) -> Iterator[tuple[KeyPath, bool]]:
        for key in self.values:
            children = self._inside.get(key, [])
            if not any(child.values for child in children):
                yield (*self._path, key), key in self._read
            for child in children:
                yield from child._keys()

    def _children(self, key: str, parts: Iterable[tuple[KeyPath, dict[str, Any]]]) -> list[Source]:
        if key not in self._inside:
            self._inside[key] = []
            for path, values in parts:
                start = ".".join(map(str, (key, *path))) + "."
                lines = {name.removeprefix(start): line for name, line in self.settings.lines.items()}
                settings = YamlSettings(self.settings.file, values, lines)
                self._inside[key].append(Source(settings, (*self._path, key, *path)))
        return self._inside[key]

    def _checked(self, key: str, kind: type, default: Any) -> Any:
        value = self.raw(key, default)
        if value is None:
            return None
        name = in_words((*self._path, key))
        return check(Option(name, kind, default, ""), value, lambda _: self.settings.place(key))


def in_words(path: KeyPath) -> str:
    """Return a key inside mappings and lists as one name, e.g. ``datasets.0.path``."""
    return ".".join(map(str, path))


@dataclass
class Conversion:
    """A configuration of this plugin in the making, and what there is to tell of it.

    Attributes:
        source_name: of the other program, e.g. ``TRL``.
        settings: the keys and values to write, in order.
        changed: sentences on what changes its meaning.
        defaulted: keys that the file does not give, written since the defaults of the two programs differ.
        left_out: keys of other files that it refers to which have no counterpart.
        held_out: rows of the training set that are validated on, where their number is known.
    """

    source_name: str
    settings: dict[str, Any] = field(default_factory=lambda: {"train_mode": "cpo", "train": True})
    changed: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    held_out: int = 0

    def put(self, key: str, value: Any, given: bool) -> None:
        """Set a key, unless it is left out in the file and both programs have the same default."""
        if not given:
            if key in _DEFAULTS and value == _DEFAULTS[key]:
                return
            self.defaulted.append(key)
        self.settings[key] = value

    def tell(self, sentence: str) -> None:
        """Take note of something that changes its meaning."""
        self.changed.append(sentence)


Converter = Callable[[Source, int | None, bool], Conversion]
"""``(source, rows, drop_reference)`` to the conversion; see :data:`mlx_cpo_plugin.convert.command.SOURCES`."""


@dataclass(frozen=True)
class Account:
    """What became of the keys that do not stand in the result, so that each key of the file is accounted for.

    Attributes:
        dropped: keys without a counterpart.
        ineffective: keys that were read, and without which the result would be the same.
        off: keys without a counterpart that are empty or switched off.
    """

    dropped: list[str]
    ineffective: list[str]
    off: list[str]


def account(source: Source, conversion: Conversion, convert: Callable[[Source], Conversion]) -> Account:
    """Find out by trial which keys count: the file is converted again without each of them.

    Args:
        source: the file, after its conversion.
        convert: what converted it.
    """
    unread = {path: is_off(source.value_at(path)) for path in source.unread()}

    def counts(path: KeyPath) -> bool:
        try:
            return convert(source.without(path)) != conversion
        except ConfigError:
            return True

    return Account(
        [*(in_words(path) for path, off in unread.items() if not off), *conversion.left_out],
        [in_words(path) for path in source.read() if not is_off(source.value_at(path)) and not counts(path)],
        [in_words(path) for path, off in unread.items() if off],
    )


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing, so that leaving its key out loses nothing."""
    return value is None or value is False or value in ("", "no", "none", "off") or value in ([], {})


def given_keys(source: Source, keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that the file gives and does not switch off."""
    return [key for key in keys if not is_off(source.values.get(key))]


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mappings in one, without values that are None."""
    return {key: value for mapping in mappings for key, value in mapping.items() if value is not None}
