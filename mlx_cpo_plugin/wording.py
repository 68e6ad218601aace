"""Values and names from outside in messages: always one printable line of a readable length."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST_VALUE = 60
LONGEST_NAME = 300


class _ShortRepr(reprlib.Repr):
    """``repr`` that takes no longer for values which are huge once their aliases are followed."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxdeque = 8
        self.maxstring = self.maxother = 4 * LONGEST_VALUE

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to write out an integer of thousands of digits."""
        return repr(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"


_short = _ShortRepr()


def shown(value: Any) -> str:
    """Return a value as YAML would write it, cut to fit a sentence."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = printable(_short.repr(value))
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def named(name: object, longest: int = LONGEST_NAME) -> str:
    """Return the name of a key, file or column as it stands, but printable and cut in the middle."""
    text = printable(name if isinstance(name, str) else shown(name))
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"


def printable(text: str) -> str:
    """Return ``text`` with escapes in place of line breaks, control characters and halves of characters."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
