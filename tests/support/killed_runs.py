"""What a run leaves on disk when it is killed before any of its file operations, and how it goes on from each of them.

Everything that changes a file or folder below the
run's is an operation: opening for writing, renaming, linking, removing, making folders, flushing, and writing arrays,
which is killed half-way, too. A process that is killed leaves the files as they are, so a copy is taken before each
operation, and operations that change nothing share one.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_cpo_plugin.atomic_files import check_safetensors
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.folder import checkpoints_in, read_checkpoint
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
    "load_best": True,
    "scoring": "plain",
}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.symlink"}
AT_THE_BEGINNING = 40  # states
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def train(folder: Path, resume: str | None = "auto", **changes: Any) -> None:
    """Train to the end, from wherever ``resume`` says."""
    model = add_adapter(build_model(num_hidden_layers=1), dropout=0.2)
    mx.random.seed(7)
    settings = CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), resume=resume, **SETTINGS | changes)
    pairs = build_pairs(7, longest=6)
    train_cpo(model, optimizers.Adam(learning_rate=1e-2), pairs, build_pairs(2, seed=9, longest=6), settings)


def in_a_process(work: Callable[[], None]) -> None:
    """Do ``work`` in a process of its own, which MLX must not have computed anything before."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    try:
        work()
    except BaseException:
        traceback.print_exc()
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


def recorded(folder: Path, states: Path, work: Callable[[], None]) -> None:
    """Do ``work``, and copy the folder into ``states`` before each operation that finds it changed.

    The name of a copy is the number of the operation; a file ``moments`` holds how many operations there were.
    """
    moments = 0
    last: dict[str, bytes] | None = None
    copying = False

    def copy(operation: str) -> None:
        nonlocal moments, last, copying
        if copying:
            return
        copying = True
        moments += 1
        now = {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
        if now != last:
            shutil.copytree(folder, states / f"{moments:04d}") if folder.exists() else (states / "0000").mkdir()
            last = now
        copying = False

    states.mkdir()
    at_each_operation(folder, copy)
    work()
    copying = True
    (states / "moments").write_text(str(moments))


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
    names = ("adapters.safetensors", "best/adapters.safetensors", "best/adapter_config.json", "metrics.jsonl")
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


def torn_best(folder: Path) -> list[str]:
    """What keeps mlx_lm from loading the best adapter, where there is one."""
    if not folder.exists():
        return []
    try:
        json.loads((folder / "adapter_config.json").read_text())
        check_safetensors(folder / "adapters.safetensors")
    except (OSError, ValueError) as error:
        return [f"{folder} cannot be loaded: {error}"]
    return []


def reached(run: Path) -> int:
    """The iteration of the newest whole checkpoint; 0 without one."""
    for checkpoint in checkpoints_in(run / "checkpoints"):
        with suppress(CheckpointError):
            return read_checkpoint(checkpoint).iteration
    return 0


def goes_on(run: Path, before: dict[str, bytes], whole: Path) -> list[str]:
    """What is wrong with a run that goes on from where it was killed."""
    error = ""
    try:
        train(run, "auto")
    except BaseException:
        error = traceback.format_exc()
    if before and not (run / "previous").exists():
        # It had not written yet that it begins: auto meant the earlier run, which is finished, or has another seed.
        return [] if files_of(run) == before else [f"the earlier run was changed {error}"]
    return [error] if error else faults_of(run, whole, before)


def goes_on_from_every_state(base: Path, case: str) -> None:
    """Let a run go on from each state that a kill could leave, and print what is wrong with what becomes of it.

    In a process that has not computed anything with MLX.
    """
    used, arguments = CASES[case]
    run, whole, earlier, other, states = (base / name for name in ("run", "whole", "earlier", "other", "states"))
    in_a_process(partial(train, whole, None))
    before: dict[str, bytes] = {}
    if used:
        # Of the same settings where it is gone on with, and with one more step where it only lies there.
        changes = {} if "checkpoint" in case else {"iters": 5, "seed": 3}
        in_a_process(partial(train, earlier, None, keep_checkpoints=9, **changes))
        in_a_process(partial(train, other, None))
        shutil.copytree(earlier, run)
        before = files_of(run)
    resume = arguments.get("resume", "auto")
    resume = str(base / resume) if resume not in (None, "auto") else resume
    in_a_process(partial(recorded, run, states, partial(train, run, resume)))
    faults: dict[str, list[str]] = {}
    done = 0
    kills = sorted(path for path in states.iterdir() if path.is_dir())
    if used:  # what is otherwise than in an empty folder comes first
        kills = kills[:AT_THE_BEGINNING] + kills[AT_THE_BEGINNING::8]
    for state in kills:
        shutil.rmtree(run)
        state.rename(run)
        done, done_before = 0 if used else reached(run), done  # in a used folder older ones are put aside
        found = [f"iteration {done_before} is lost"] if done < done_before else []
        found += torn_best(run / "best")
        found += goes_on(run, before, whole)
        if found:
            faults[state.name] = found
    moments = int((states / "moments").read_text())
    print(json.dumps({"moments": moments, "states": len(kills), "faults": faults}))


def on_a_full_disk(folder: Path, size: int) -> None:
    """Train where no file can be larger than ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        train(folder)
    except ValueError as error:
        print(type(error).__name__, error, file=sys.stderr)
