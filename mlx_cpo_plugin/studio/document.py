"""The YAML that a form stands for: an opened file keeps its comments, its order and the keys without a field."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.settings.config import Resolved, resolve
from mlx_cpo_plugin.settings.options import PRECISIONS
from mlx_cpo_plugin.settings.validation import check
from mlx_cpo_plugin.settings.yaml_settings import dump_settings, parse_settings, parse_value, read_yaml
from mlx_cpo_plugin.studio.form import (
    LOSS_KEY,
    MODE,
    PRESET_KEY,
    QUANTISATION,
    Content,
    Field,
    form_fields,
    loss_of_preset,
)

SUFFIXES = (".yaml", ".yml")
UNSAVED = "the form"


def new_document() -> str:
    """Return the text of a file that trains, with nothing set."""
    return f"train: true\ntrain_mode: {MODE}\n"


def read_document(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigError: it cannot be read or is not YAML, is for another train mode or for testing alone, or holds what no
            control of the form can.
    """
    settings = read_yaml(path)
    mode = settings.values.get("train_mode", MODE)
    if mode != MODE:
        place = settings.place("train_mode")
        message = f"train_mode is {mode!r} {place}; this page is for {MODE}."
        raise ConfigError(message, key="train_mode", place=place, allowed=MODE)
    if not settings.values.get("train") and settings.values.get("test"):
        place = settings.place("test")
        message = f"test is true {place}, and train is not: this page is for training; test with mlx_lm_lora.train."
        raise ConfigError(message, key="train", place=place, allowed="true")
    for field in form_fields():  # a tick or a choice cannot show what is neither
        value = _looked_up(settings.values, field.key) if field.is_tick or field.option.choices else None
        if value is not None:
            check(field.option, value, lambda key: settings.place(key.partition(".")[0]), field.key)
    return path.read_text(encoding="utf-8")


def contents_of(text: str, fields: Iterable[Field]) -> dict[str, Content]:
    """Return what each control holds for a file, by key; the loss is that of a preset where the file names no other."""
    values = parse_settings(text, UNSAVED).values
    contents = {field.key: field.content_of(_looked_up(values, field.key)) for field in fields}
    if values.get(LOSS_KEY) is None and (loss := loss_of_preset(contents.get(PRESET_KEY))):
        contents[LOSS_KEY] = loss
    return contents


def with_contents(text: str, contents: Mapping[str, Content], fields: Iterable[Field]) -> str:
    """Return ``text`` changed as far as the controls hold something else than it says.

    Args:
        text: the file as it was opened, or a new one.
        contents: what each control holds, by key.
    """
    fields = list(fields)
    editor = _editor()
    document = editor.load(text) or CommentedMap()
    document["train"] = True
    document["train_mode"] = MODE
    # The editor and a run may read a value differently, such as no: what counts is what a run reads.
    before = contents_of(text, fields)
    for field in fields:
        content = contents.get(field.key)
        if field.key == LOSS_KEY and document.get(LOSS_KEY) is None:  # then a preset decides
            before[LOSS_KEY] = loss_of_preset(contents.get(PRESET_KEY)) or field.default
        if content != before[field.key]:
            _set(document, field, content)
    for field in fields:
        if _goes_unread(field, contents):
            _set(document, field, None)
    stream = io.StringIO()
    editor.dump(document, stream)
    return stream.getvalue()


def resolved(text: str) -> Resolved:
    """Return the settings that a run of this file would have.

    Raises:
        ConfigError: the first thing that is wrong with it.
    """
    return resolve({}, parse_settings(text, UNSAVED))


def adapter_folder(text: str, root: Path) -> Path:
    """Return where a run of this file leaves its adapter.

    Args:
        root: what paths in the file are relative to.
    """
    return root / Path(resolved(text).settings.adapter_path).expanduser()


def path_in(root: Path, name: str) -> Path:
    """Return the file of this name below ``root``.

    Raises:
        ConfigError: it lies elsewhere, or is called otherwise.
    """
    name = name.strip()
    if not name:
        raise ConfigError("Give the file a name, such as my.yaml.")
    try:
        path = (root / Path(name).expanduser()).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # fails where a name is too long; exists() does not in every version of Python
    except (OSError, ValueError, RuntimeError) as error:  # the last where there is no such home
        raise ConfigError(f"{name!r} is not a valid file name ({error}); give another.") from error
    if not path.is_relative_to(root.resolve()):
        raise ConfigError(
            f"{name} lies outside {root}, where this page may not read or write; give a name inside it.",
            place=str(path),
            allowed=str(root),
        )
    if path.suffix not in SUFFIXES:
        endings = " or ".join(SUFFIXES)
        raise ConfigError(f"{name} does not end in {endings}; give it that ending.", allowed=endings)
    return path


def is_edited(text: str, opened: str) -> bool:
    """Whether a text says something else than the file that was opened, however the form writes that."""
    return not (is_same(text, opened) or is_same(text, _as_the_form_writes(opened)))


@lru_cache(maxsize=8)
def _as_the_form_writes(text: str) -> str:
    fields = form_fields()
    try:
        return with_contents(text, contents_of(text, fields), fields)
    except (UserError, ValueError, YAMLError):
        return text


def is_same(text: str, other: str) -> bool:
    """Whether two texts are the same file, whatever line breaks end it."""
    return text.rstrip("\n") == other.rstrip("\n")


def save_document(text: str, path: Path) -> None:
    """Write a configuration file atomically, with a line break at its end.

    A new file has the permissions that the process gives; one that was there keeps its own, and its line breaks.

    Raises:
        ConfigError: it cannot be written.
    """

    def write(partial: Path) -> None:
        is_there = path.exists()
        line_break = "\r\n" if is_there and b"\r\n" in path.read_bytes() else "\n"
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline=line_break)
        if is_there:
            shutil.copymode(path, partial)

    try:
        replace_whole(path, write)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); give another name, or free space.", place=str(path)
        ) from error


def _editor() -> YAML:
    editor = YAML(typ="rt")
    editor.preserve_quotes = True
    editor.width = 4096
    return editor


def _looked_up(values: Mapping[str, Any], key: str) -> Any:
    if key == QUANTISATION.name:
        return next((name for name in PRECISIONS if values.get(name) is True), None)
    name, _, inner = key.partition(".")
    value = values.get(name)
    if inner:
        return value.get(inner) if isinstance(value, Mapping) else None
    return value


def _set(document: CommentedMap, field: Field, content: Content | None) -> None:
    """Write a setting where it differs from what is there; take it out where the control is empty."""
    if field.option is QUANTISATION:
        for precision in PRECISIONS:
            if precision != content:
                _remove(document, precision)
        if content:
            document[content] = True
        return
    name, _, inner = field.key.partition(".")
    holder = document
    if inner:
        held = document.get(name)
        holder = held if isinstance(held, CommentedMap) else CommentedMap()
    key = inner or name
    value = field.value_of(content)
    if value is None:
        is_last = inner and list(holder) in ([], [key])
        _remove(document if is_last else holder, name if is_last else key)
        return
    holder[key] = _as_typed(content, value)
    if holder is not document and holder is not document.get(name):
        document[name] = holder


def _remove(document: CommentedMap, key: str) -> None:
    """Take a setting out, and leave the lines of comments that stand behind it."""
    if key not in document:
        return
    names = list(document)
    place = names.index(key)
    lines = _comment_before(document, key) + _comment_inside(document, key)
    del document[key]
    if not lines.strip():
        return
    if place + 1 < len(names):
        lines += _comment_before(document, names[place + 1])
        document.yaml_set_comment_before_after_key(names[place + 1], before=_without_marks(lines))
    elif place:
        holder, last = _end_of(document, names[place - 1])
        kept = _comment_behind(holder, last) or "\n"
        holder.ca.items.setdefault(last, [None] * 4)[2] = CommentToken(kept + lines, CommentMark(0), None)


def _end_of(document: CommentedMap, key: str) -> tuple[CommentedMap, str]:
    """Return the last setting inside a setting, and what holds it: what stands behind both stands behind that one."""
    value = document[key]
    return _end_of(value, list(value)[-1]) if isinstance(value, CommentedMap) and value else (document, key)


def _comment_before(document: CommentedMap, key: str) -> str:
    """Return the lines of comments that stand before a setting and are no other one's."""
    tokens = document.ca.items.get(key) or [None] * 4
    return "".join(token.value for token in tokens[1] or ())


def _comment_inside(document: CommentedMap, key: str) -> str:
    """Return the lines of comments inside a setting and behind it."""
    value = document[key]
    if not (isinstance(value, CommentedMap) and value):
        return _comment_behind(document, key).partition("\n")[2]
    stream = io.StringIO()
    _editor().dump(value, stream)
    return "".join(line for line in stream.getvalue().splitlines(True) if line.lstrip().startswith("#"))


def _comment_behind(document: CommentedMap, key: str) -> str:
    """Return the comment that stands behind a setting, from its own line on."""
    holder, last = _end_of(document, key)
    token = (holder.ca.items.get(last) or [None] * 4)[2]
    return token.value if token else ""


def _without_marks(lines: str) -> str:
    return "\n".join(re.sub(r"^\s*# ?", "", line) for line in lines.strip("\n").split("\n"))


def _goes_unread(field: Field, contents: Mapping[str, Content]) -> bool:
    """Whether the loss does not read what its hidden control still holds, which a run would refuse."""
    unread = bool(field.read_by) and contents.get(LOSS_KEY) not in field.read_by
    return unread and field.value_of(contents.get(field.key)) not in (None, field.option.default)


def _as_typed(content: Content | None, value: Any) -> Any:
    """Keep a number as it was typed, so that 5e-6 does not become 5e-06; quote text that YAML reads otherwise."""
    if isinstance(value, float) and isinstance(content, str):
        typed = YAML(typ="rt").load(content.strip())
        return typed if isinstance(typed, float) and _written_value(typed) == value else value
    return _quoted(value)


def _written_value(typed: float) -> Any:
    """Return what is read where the editor has written a number, which loses the last digits of some."""
    stream = io.StringIO()
    _editor().dump({"value": typed}, stream)
    return parse_value(stream.getvalue())["value"]


def _quoted(value: Any) -> Any:
    if isinstance(value, str):
        is_plain = dump_settings([value], flow=True, width=math.inf) == f"[{value}]\n"
        return value if is_plain else DoubleQuotedScalarString(value)
    if isinstance(value, dict):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    return [_quoted(item) for item in value] if isinstance(value, list) else value
