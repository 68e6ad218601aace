"""What a run amounts to, as JSON: ``python -m mlx_cpo_plugin.studio.planning CONFIG OUTPUT``.

A process of its own, since it loads the model. The output, lines of ``mlx-cpo check --time``, is written twice: with
the estimate of memory, and with the measured time.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.commands.check import print_plan
from mlx_cpo_plugin.data import conversion
from mlx_cpo_plugin.data.dataset import Splits, load_splits, require_splits
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import is_on_this_machine
from mlx_cpo_plugin.run.preflight import run_identity
from mlx_cpo_plugin.settings.config import RunSettings, resolve


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
    replace_whole(output, lambda partial: partial.write_text(json.dumps({"lines": lines}), encoding="utf-8"))


def main() -> int:
    """Write the plan into the file that the command line names; what is wrong goes to standard error."""
    conversion.LINE_EVERY = 1.0
    try:
        plan(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
