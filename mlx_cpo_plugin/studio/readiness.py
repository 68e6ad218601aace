"""Whether a configuration can be trained as it stands: its values, the paths that it names, and the first pairs."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

from mlx_cpo_plugin.checkpoints.run_identity import run_in
from mlx_cpo_plugin.data.files import SUFFIXES
from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.missing_paths import looks_like_path, nearest_path
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.confirmation import outside_paths
from mlx_cpo_plugin.studio.messages import fault_html, note_html
from mlx_cpo_plugin.studio.pickers import PairText, first_pairs, is_cached, sets_named

READY = "Ready to train."
READY_ONCE_FETCHED = "Ready to train once this has been fetched from the Hugging Face hub:"


class Readiness(NamedTuple):
    """What stands in the way of a run, what there is to know of it, and the first pairs of its data.

    Attributes:
        fetched: what is not on this machine, in words.
        pairs: ``None`` where they cannot be shown without reading all data.
    """

    faults: list[str]
    notes: list[str]
    fetched: list[str]
    pairs: list[PairText] | None = None

    def html(self) -> str:
        """Return faults, or else that there are none, and notes."""
        ready = f"{READY_ONCE_FETCHED} {' and '.join(self.fetched)}." if self.fetched else READY
        said = [fault_html(fault) for fault in self.faults] or [f'<p class="ready">{escape(ready)}</p>']
        return "".join(said + [note_html(note) for note in self.notes])

    def pairs_html(self) -> str:
        """Return the first pairs side by side."""
        return "".join(
            f'<article class="pair"><p class="prompt">{escape(pair.prompt)}</p><div class="sides">'
            f"<div><p><strong>Chosen</strong></p><p>{escape(pair.chosen)}</p></div>"
            f"<div><p><strong>Rejected</strong></p><p>{escape(pair.rejected)}</p></div></div></article>"
            for pair in self.pairs or ()
        )


def readiness(text: str, root: Path) -> Readiness:
    """Return how a configuration stands; nothing is loaded or fetched.

    Args:
        root: what paths in the configuration are relative to, the working directory of the page.
    """
    from mlx_cpo_plugin.run.preflight import check_destinations

    try:
        settings, advice = document.resolved(text)
    except ConfigError as error:
        return Readiness([str(error)], [], [])
    notes, faults, fetched, pairs = list(advice), [], [], None
    for look in (_model_to_fetch, _data_to_fetch):
        try:
            fetched += look(settings, root)
        except (UserError, OSError, ValueError) as error:
            faults.append(str(error))
    try:
        check_destinations(settings)
        if run_in(root / settings.adapter_path) is not None:
            notes.append(f"{settings.adapter_path} holds a run already; Start asks what to do with it.")
    except (UserError, OSError, ValueError) as error:
        faults.append(str(error))
    try:
        if not outside_paths({"data": settings.data}, root):
            pairs = first_pairs(settings, root)
    except (UserError, OSError, ValueError) as error:
        faults.append(str(error))
    return Readiness(faults, notes, fetched, pairs)


def _model_to_fetch(settings: RunSettings, root: Path) -> list[str]:
    from mlx_cpo_plugin.run.building import is_on_this_machine

    model, folder = settings.model, root / settings.model
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"model names the folder {model!r}, which holds no config.json; pick a model.", key="model")
    if folder.is_dir() or is_on_this_machine(model):
        return []
    if model == RunSettings().model:
        raise ConfigError("No model is chosen; pick one, or name one on the Hugging Face hub.", key="model")
    _refuse_missing("model", model, nearest_path(folder), looks_like_path(model))
    return [f"the model {model}"]


def _data_to_fetch(settings: RunSettings, root: Path) -> list[str]:
    missing = [] if settings.hf_dataset else [name for name in sets_named(settings) if not (root / name).exists()]
    if missing == [RunSettings().data]:
        raise ConfigError("No data is chosen; pick a folder or file, or name a data set on the hub.", key="data")
    for name in missing:
        near = nearest_path(root / name, lambda other: other.exists())
        _refuse_missing("data", name, near, looks_like_path(name, SUFFIXES))
    return [f"the data set {name}" for name in missing if not is_cached(name)]


def _refuse_missing(key: str, name: str, near: str | None, is_path: bool) -> None:
    if near is not None or is_path:
        advice = f"did you mean {near}?" if near else "pick another."
        raise ConfigError(f"{key} names {name!r}, which does not exist: {advice}", key=key, allowed=near or "")
