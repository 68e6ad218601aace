"""Paths of a configuration outside the folder of the page: they are used only once confirmed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.errors import ConfigError

KEYS = ("adapter_path", "data", "hf_dataset", "resume", "resume_adapter_file")


def outside_paths(settings: Mapping[str, Any], root: Path) -> list[str]:
    """Return the key and the absolute path of everything outside ``root`` that a run would read rows or weights from,
    or write to; links and ``~`` are followed, also links that lie in a folder that is named.

    Args:
        settings: by YAML key; paths are relative to ``root``.

    Raises:
        ConfigError: a path cannot be followed.
    """
    root = root.resolve()
    found: dict[str, None] = {}
    for key in KEYS:
        for text in _texts(settings.get(key)):
            try:
                places = list(_places(root / Path(text).expanduser(), root))
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"{key} names {text!r}, which cannot be followed ({error}); change it.", key=key
                ) from error
            found |= {f"{key}: {place}": None for place in places}
    return list(found)


def _places(path: Path, root: Path) -> Iterator[Path]:
    place = path.resolve()
    if not place.is_relative_to(root):
        yield place
    elif place.is_dir():
        with os.scandir(place) as entries:
            links = [Path(entry.path).resolve() for entry in entries if entry.is_symlink()]
        yield from (link for link in links if not link.is_relative_to(root))


def _texts(value: Any) -> Iterator[str]:
    """Return the texts in a setting: ``hf_dataset`` is a list of entries, in which a path may stand anywhere."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)


@dataclass(frozen=True)
class Confirmation:
    """A box to tick before something is done with paths outside the folder.

    Attributes:
        root: the folder of the page.
        box: shown where there is something to confirm.
        asked: the paths that the box was shown for.
    """

    root: Path
    box: gr.Checkbox
    asked: gr.State

    @property
    def parts(self) -> list[Any]:
        """Return the controls, as inputs and outputs of what has to be confirmed."""
        return [self.box, self.asked]

    @property
    def unchanged(self) -> list[Any]:
        """Return updates for ``parts`` that leave them as they are."""
        return [gr.skip(), gr.skip()]

    def ask(self, settings: Mapping[str, Any], ticked: bool, asked: list[str]) -> tuple[str, list[Any]]:
        """Return what has to be confirmed first, as a piece of the page, or nothing; and updates for ``parts``.

        Args:
            ticked, asked: what ``parts`` hold. A tick stands for the paths that it was asked for, and for no others.

        Raises:
            ConfigError: a path cannot be followed.
        """
        paths = outside_paths(settings, self.root)
        if not paths:
            return "", [gr.update(visible=False, value=False), []]
        if ticked and set(paths) <= set(asked):
            return "", self.unchanged
        items = "".join(f"<li>{escape(path)}</li>" for path in paths)
        question = (
            f'<div class="fault" role="alert">Outside {escape(str(self.root))} lie:<ul>{items}</ul>'
            "Tick the box to use them, then press the button again.</div>"
        )
        return question, [gr.update(visible=True, value=False), paths]


def build_confirmation(root: Path, name: str) -> Confirmation:
    """Lay out the box, which is hidden until something is asked."""
    box = gr.Checkbox(
        False, label="Use these paths outside the folder", visible=False, elem_id=f"{name}-outside", container=False
    )
    return Confirmation(root, box, gr.State([]))
