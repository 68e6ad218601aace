"""Trains short runs that are killed at each of their file operations in turn, and goes on with each.

Started by tests as ``python -m support.killed_runs FOLDER CASE``. Everything that changes a file or folder below the
run's is an operation: opening for writing, renaming, linking, removing, making folders, flushing, and writing arrays,
which is killed half-way, too. Processes are forked before MLX has computed anything, since its threads do not survive
a fork.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo
from support.tiny import add_adapter, build_model, build_pairs

SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "iters": 3,
    "steps_per_report": 2,
    "steps_per_eval": 2,
    "steps_per_save": 1,
    "keep_checkpoints": 1,
    "loss_type": "ipo",
    "beta": 0.5,
    "save_best": "margin",
    "scoring": "plain",
}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def train(folder: Path, resume: str | None = "auto", **changes: Any) -> None:
    """Train to the end, from wherever ``resume`` says."""
    model = add_adapter(build_model(), dropout=0.2)
    mx.random.seed(7)
    settings = CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), resume=resume, **SETTINGS | changes)
    pairs = build_pairs(7, longest=6)
    train_cpo(model, optimizers.Adam(learning_rate=1e-2), pairs, build_pairs(2, seed=9, longest=6), settings)


def in_a_process(work: Callable[[], None]) -> int:
    """Do ``work`` in a process of its own; return the number of the signal that ended it, 0, or minus its exit code."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) or -os.WEXITSTATUS(status)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        work()
    except BaseException as error:
        (Path(sys.argv[1]) / "error.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def at_each_operation(folder: Path, do: Callable[[str], None]) -> None:
    """Call ``do`` before each file operation below ``folder``, from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and str(path).startswith(str(folder)):
                do(f"open {path}")
        elif event in EVENTS and str(folder) in str(arguments[0]):
            do(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    save, fsync = mx.save_safetensors, os.fsync

    def saved(file: str, *arguments: Any) -> None:
        do(f"save {file}")
        save(file, *arguments)
        whole = os.path.getsize(file)
        os.truncate(file, whole // 2)  # an operation by itself: killed after it, the file is torn
        do(f"save the rest of {file}")
        save(file, *arguments)

    def flushed(descriptor: int) -> None:
        do(f"fsync {descriptor}")
        fsync(descriptor)

    mx.save_safetensors, os.fsync = saved, flushed


def killed_at(moment: int, folder: Path, work: Callable[[], None]) -> None:
    """Do ``work``, and be killed before the given operation."""
    operations = count(1)

    def kill(operation: str) -> None:
        if next(operations) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_operation(folder, kill)
    work()


def content(file: Path) -> Any:
    """What a file holds, without what it says of the run that wrote it."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        return header, data[end:]
    if file.name == "metrics.jsonl":
        clocks = ("run", "time", "iterations_per_second", "tokens_per_second", "val_time", "peak_memory")
        return [{key: row[key] for key in row if key not in clocks} for row in map(json.loads, data.splitlines())]
    return data


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a run by their paths, without what every new run changes."""
    left_out = (".lock", "run.json", "adapter_config.json")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out
    }


def faults_of(run: Path, whole: Path, used: dict[str, bytes]) -> list[str]:
    """What is wrong with a run that got to its end after all."""
    names = ("adapters.safetensors", "best_adapters.safetensors", "metrics.jsonl")
    faults = [f"{name} differs" for name in names if content(run / name) != content(whole / name)]
    kept: dict[str, set[bytes]] = {}
    for aside in (run / "previous").glob("*"):
        for name, data in files_of(aside).items():
            kept.setdefault(name, set()).add(data)
    faults += [f"{name} of the earlier run is lost" for name, data in used.items() if data not in kept.get(name, set())]
    hidden = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    return faults + [f"{name} is left over" for name in hidden]


# What is in the folder before, and what is killed there; all of it goes on with resume: auto.
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "in an empty folder": (False, {}),
    "anew in a used folder": (True, {"resume": None}),
    "from an earlier checkpoint": (True, {"resume": "run/checkpoints/0000002"}),
    "from another folder into a used one": (True, {"resume": "other"}),
}


def main() -> None:
    """Kill a run at each of its operations, and print what is wrong with what becomes of it."""
    base, case = Path(sys.argv[1]), sys.argv[2]
    used, arguments = CASES[case]
    whole, earlier, other = base / "whole", base / "earlier", base / "other"
    assert in_a_process(partial(train, whole, None)) == 0
    if used:
        # Of the same settings where it is gone on with, and with one more step where it only lies there.
        changes = {} if "checkpoint" in case else {"iters": 5, "seed": 3}
        assert in_a_process(partial(train, earlier, None, keep_checkpoints=9, **changes)) == 0
        assert in_a_process(partial(train, other, None)) == 0
    resume = arguments.get("resume", "auto")
    faults: dict[str, list[str]] = {}
    for moment in count(1):
        run = base / "run"
        shutil.rmtree(run, ignore_errors=True)
        if used:
            shutil.copytree(earlier, run)
        before = files_of(run) if used else {}
        wanted = str(base / resume) if resume not in (None, "auto") else resume
        ended = in_a_process(partial(killed_at, moment, run, partial(train, run, wanted)))
        if ended == 0:
            break
        again = -1 if ended != signal.SIGKILL else in_a_process(partial(train, run, "auto"))
        if used and not (run / "previous").exists():
            # It had not written yet that it begins: auto meant the earlier run, which is finished, or has another seed.
            found = [] if files_of(run) == before else ["the earlier run was changed"]
        elif again != 0:
            found = [f"ended with {ended}, {again}: {(base / 'error.txt').read_text()}"]
        else:
            found = faults_of(run, whole, before)
        if found:
            faults[f"{moment}"] = found
    print(json.dumps({"moments": moment - 1, "faults": faults}))


if __name__ == "__main__":
    main()
