"""What was typed into the form and not saved; it is there again after a reload and after a restart of the server."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from mlx_cpo_plugin.atomic_files import replace_whole

MOST_DRAFTS = 20


@dataclass(frozen=True)
class Draft:
    """A configuration as the form holds it.

    Attributes:
        name: its file, relative to the folder of the page; empty where it has none yet.
        opened: the file as it was opened or saved last, or the new document that the form began with.
        text: the YAML of the form.
    """

    name: str
    opened: str
    text: str


class Drafts:
    """The drafts of a folder, in a file of the user's own, outside the folder.

    Args:
        root: the folder of the page.
    """

    def __init__(self, root: Path) -> None:
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        digest = sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self._lock = Lock()
        self.file = Path(state) / "mlx-cpo-studio" / f"{digest}.json"

    @property
    def current(self) -> str | None:
        """The name of what was last in the form; ``None`` where nothing was."""
        current = self._read().get("current")
        return current if isinstance(current, str) else None

    def get(self, name: str) -> Draft | None:
        """Return the draft of a file; ``None`` where all of it is saved."""
        with suppress(KeyError, TypeError):
            texts = self._read()["drafts"][name]
            return Draft(name, str(texts["opened"]), str(texts["text"]))
        return None

    def keep(self, draft: Draft, is_saved: bool) -> None:
        """Write down what the form holds; of what is saved, the name alone."""
        with self._lock:
            drafts = self._read().get("drafts")
            drafts = dict(drafts) if isinstance(drafts, dict) else {}
            drafts.pop(draft.name, None)
            if not is_saved:
                drafts[draft.name] = {"opened": draft.opened, "text": draft.text}
            self._write({"current": draft.name, "drafts": dict(list(drafts.items())[-MOST_DRAFTS:])})

    def turn_to(self, name: str) -> None:
        """Make a file the one that the form is to hold; drafts stay as they are."""
        with self._lock:
            self._write(self._read() | {"current": name})

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write(self, values: dict[str, Any]) -> None:
        with suppress(OSError):  # the form works without
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(self.file, lambda partial: partial.write_text(json.dumps(values), encoding="utf-8"))
