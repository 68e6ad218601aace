"""What is read from another program's configuration, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.options import SUBSTRATE_OPTIONS
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings
from mlx_cpo_plugin.types import Option
from mlx_cpo_plugin.wording import shown

_DEFAULTS = {option.name: option.default for option in SUBSTRATE_OPTIONS}


class Source:
    """A configuration of another program; keeps account of the keys that were read.

    Args:
        settings: the file as read.
    """

    def __init__(self, settings: YamlSettings) -> None:
        self.settings = settings
        self.values = settings.values
        self._read: set[str] = set()

    def gives(self, key: str) -> bool:
        """Whether a key has a value; null is none."""
        return self.values.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands, or ``default`` where it is missing or null."""
        self._read.add(key)
        return self.values[key] if self.gives(key) else default

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a float.

        Raises:
            ConfigError: it is something else.
        """
        return self._checked(key, float, default)

    def count(self, key: str, default: int | None = None) -> Any:
        """Return an integer.

        Raises:
            ConfigError: it is something else.
        """
        return self._checked(key, int, default)

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
        values = self._checked(key, dict, {})
        return Source(YamlSettings(self.settings.file, values, {}))

    def refuse(self, key: str, allowed: str, default: Any = None) -> ConfigError:
        """Return the error for a value that has no counterpart: where it stands, and what would have."""
        value, place = (self.values[key], self.settings.place(key)) if self.gives(key) else (default, "by default")
        return ConfigError(f"{key} is {shown(value)} {place}, but {allowed}.")

    def unread(self) -> list[str]:
        """Return the keys that nobody asked for, in the order of the file."""
        return [key for key in self.values if key not in self._read]

    def _checked(self, key: str, kind: type, default: Any) -> Any:
        value = self.raw(key, default)
        return None if value is None else check(Option(key, kind, default, ""), value, self.settings.place)


@dataclass
class Conversion:
    """A configuration of this plugin in the making, and what there is to tell of it.

    Attributes:
        source_name: of the other program, e.g. ``TRL``.
        settings: the keys and values to write, in order.
        changed: sentences on what changes its meaning.
        defaulted: keys that the file does not give, written since the defaults of the two programs differ.
    """

    source_name: str
    settings: dict[str, Any] = field(default_factory=lambda: {"train_mode": "cpo", "train": True})
    changed: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)

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


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing, so that leaving its key out loses nothing."""
    return value is None or value is False or value in ("", "no", "none", "off") or value in ([], {})


def given_keys(source: Source, keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that the file gives and does not switch off."""
    return [key for key in keys if not is_off(source.values.get(key))]


def split_unread(source: Source) -> tuple[list[str], list[str]]:
    """Return the keys without a counterpart: those that ask for something, and those that are empty or off."""
    unread = source.unread()
    off = [key for key in unread if is_off(source.values[key])]
    return [key for key in unread if key not in off], off


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mappings in one, without values that are None."""
    return {key: value for mapping in mappings for key, value in mapping.items() if value is not None}
