"""Work in a process of its own that leaves JSON behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.errors import UserError


class ChildError(UserError):
    """A worker process of the page failed; says why."""


def json_of(words: Sequence[str], root: Path) -> dict[str, Any]:
    """Run ``python -m WORDS FILE`` in ``root`` and return what it wrote into the file.

    Raises:
        ChildError: it failed; the last line that it printed is quoted.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-studio-") as folder:
        output = Path(folder) / "output.json"
        finished = subprocess.run(
            [sys.executable, "-m", *words, str(output)],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if not output.exists():
            lines = [line for line in finished.stderr.splitlines() if line.strip()]
            raise ChildError(lines[-1].removeprefix("error: ") if lines else f"exit code {finished.returncode}")
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result
