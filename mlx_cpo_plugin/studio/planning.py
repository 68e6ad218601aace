"""What a run amounts to, as JSON: ``python -m mlx_cpo_plugin.studio.planning CONFIG OUTPUT``.

A process of its own, since it loads the model. The output, lines of ``mlx-cpo check --time``, is written twice: with
the estimate of memory, and with the measured time.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from mlx_cpo_plugin.commands.check import print_plan
from mlx_cpo_plugin.data.dataset import Splits, load_splits, require_splits
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import is_on_this_machine
from mlx_cpo_plugin.run.preflight import run_identity
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.studio.child import leave, work_on_config


def plan(config: Path, output: Path) -> None:
    """Write steps, memory and time of a run of a configuration.

    Raises:
        UserError: whatever the run would refuse.
    """
    settings = resolve({"train": True}, config).settings
    settings.run_identity = run_identity(settings)
    settings.begun = settings.run_identity.begun
    print("Reading and tokenising the rows.", file=sys.stderr, flush=True)
    splits = load_splits(settings, load_chat_tokenizer(settings.model), ("train", "valid", "test"))
    require_splits(settings, splits)
    _write(_lines(settings, splits, timed=False), output)
    if is_on_this_machine(settings.model):
        print("Measuring the time of two of its iterations.", file=sys.stderr, flush=True)
        _write(_lines(settings, splits, timed=True), output)


def _lines(settings: RunSettings, splits: Splits, timed: bool) -> list[str]:
    printed = io.StringIO()
    print_plan(settings, splits, timed, printed)
    return [line for line in printed.getvalue().splitlines() if line]


def _write(lines: list[str], output: Path) -> None:
    leave({"lines": lines}, output)


if __name__ == "__main__":
    sys.exit(work_on_config(plan))
