"""A machine that gives out in the middle of a run: one sentence, exit code 2, and a last checkpoint that goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support import faulty_run
from support.prepared import Ended, Prepared
from support.tiny import TESTS, preference_rows, saved_arrays

from mlx_cpo_plugin.checkpoints.folder import read_checkpoint
from mlx_cpo_plugin.data.batches import BatchSize, training_plan

Settings = dict[str, Any]
RunMain = Callable[..., None]

ROWS = 10
AT = 3  # the iteration after which the machine gives out
SENTENCES = {
    "disk_full_for_a_checkpoint": "cannot be written (",
    "disk_full_for_a_line": "adapters.safetensors cannot be written (",  # the line itself ends nothing
    "read_only": "cannot be written (",
}


@pytest.fixture
def long_run(settings: Settings) -> Settings:
    """Settings of a run that comes to a row far longer than the others after the iteration of the fault."""
    rows = preference_rows(ROWS)
    rows[0]["chosen"] = "There are many apples. " * 150
    (Path(settings["data"]) / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")

    def turn_of_the_long_row(seed: int) -> int:
        plan = training_plan([1] * ROWS, BatchSize(1, None, 1), iters=ROWS, seed=seed, rank=0, world_size=1)
        return [micro_batch.indices[0] for micro_batch in plan].index(0) + 1

    seed = next(seed for seed in count() if turn_of_the_long_row(seed) > AT + 1)
    return settings | {"batch_size": 1, "iters": ROWS, "seed": seed, "save_every": 2, "max_seq_length": 8192}


@pytest.fixture
def short_run(settings: Settings) -> Settings:
    """Settings of a run that goes on for a while after the fault."""
    return settings | {"batch_size": 1, "iters": AT + 3, "save_every": 2}


@pytest.fixture(scope="module")
def whole_runs() -> list[dict[str, bytes]]:
    """The adapter of a short run without a fault, once one was trained."""
    return []


def harmed(fault: str, settings: Settings, folder: Path) -> Ended:
    """Run the command until the fault ends it."""
    config = folder / "config.json"  # which is YAML, too
    config.write_text(json.dumps(settings))
    arguments = [fault, str(AT), settings["adapter_path"], str(config)]
    if os.geteuid() != 0 or fault != "read_only":
        return Prepared(faulty_run.main, *arguments, output=folder / "told").ended()
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to run as a superuser whom permissions bind")
    # Permissions do not bind a superuser who has this capability.
    command = ["setpriv", "--bounding-set=-dac_override", sys.executable, "-m", "support.faulty_run", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=TESTS)
    return Ended(process.returncode, process.stdout, process.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
def test_memory_that_ends_on_a_cpu_was_warned_of_and_costs_nothing_that_was_done(
    long_run: Settings, run_main: RunMain, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = long_run | {"save_every": 100}  # so that only the warning saves
    run_main(settings | {"adapter_path": str(whole)})

    ended = harmed("out_of_memory", settings | {"adapter_path": str(broken)}, tmp_path)

    assert ended.code < 0, ended.printed  # MLX ends the process where a CPU has no memory
    (warning,) = [line for line in ended.printed.splitlines() if line.startswith("Warning: ")]
    assert "GB are free; if the process ends here without a word, lower max_seq_length" in warning
    done = int(re.findall(r"Step (\d+)", warning)[0]) - 1
    assert read_checkpoint(broken / "checkpoints" / f"{done:07d}").iteration == done > AT
    run_main(settings | {"adapter_path": str(broken), "resume": "auto"})
    assert saved_arrays(broken / "adapters.safetensors") == saved_arrays(whole / "adapters.safetensors")


@pytest.mark.parametrize("fault", list(SENTENCES))
@pytest.mark.slow
def test_a_fault_is_one_sentence_and_the_last_checkpoint_goes_on_to_the_bit(
    fault: str, short_run: Settings, run_main: RunMain, tmp_path: Path, whole_runs: list[dict[str, bytes]]
) -> None:
    broken = tmp_path / "broken"
    if not whole_runs:
        run_main(short_run | {"adapter_path": str(tmp_path / "whole")})
        whole_runs.append(saved_arrays(tmp_path / "whole" / "adapters.safetensors"))

    ended = harmed(fault, short_run | {"adapter_path": str(broken)}, tmp_path)

    assert ended.code == 2, ended.told
    assert "Traceback" not in ended.told
    (sentence,) = ended.errors
    assert SENTENCES[fault] in sentence
    newest = max(path for path in (broken / "checkpoints").iterdir() if path.name.isdecimal())
    assert read_checkpoint(newest).iteration >= AT - 1
    assert not [path for path in broken.rglob(".*") if path.name != ".lock"]  # nothing half-written
    for folder in (broken, broken / "checkpoints"):
        folder.chmod(0o755)
    run_main(short_run | {"adapter_path": str(broken), "resume": "auto"})
    assert saved_arrays(broken / "adapters.safetensors") == whole_runs[0]
