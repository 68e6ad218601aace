"""Ranks of one run, each in a process of its own on this machine, of which chosen ones come to harm.

Tests call :func:`start`; each process then runs this module with what is to happen in the environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from support.tiny import TESTS

SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """What a process left."""

    code: int
    printed: str
    told: str

    @property
    def errors(self) -> list[str]:
        """The sentences that end a run; MLX may have begun their line."""
        return [line[line.index("error: ") :] for line in self.told.splitlines() if "error: " in line]


def start(ranks: int, folder: Path, commands: list[list[str]], **variables: str) -> list[subprocess.Popen[str]]:
    """Start one process a rank, connected by the ring backend.

    Args:
        commands: one a rank, or one for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hostfile), "PYTHONUNBUFFERED": "1", **variables}
    return [
        subprocess.Popen(
            commands[rank % len(commands)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"MLX_RANK": str(rank)},
            cwd=TESTS,
        )
        for rank in range(ranks)
    ]


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def ended(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for all of them; one that hangs fails the test, and none is left behind."""
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def train(folder: Path, ranks: int = 2, faults: dict[int, str] | None = None, at: int = 5) -> list[Ended]:
    """Train with one of the faults of :func:`harm` at the given micro-batch of some ranks, and wait for the end."""
    return ended(start_training(folder, ranks, faults, at))


def start_training(
    folder: Path, ranks: int = 2, faults: dict[int, str] | None = None, at: int = 5, iters: int = 8
) -> list[subprocess.Popen[str]]:
    """Start what :func:`train` waits for."""
    wanted = json.dumps({"folder": str(folder), "faults": faults or {}, "at": at, "iters": iters})
    return start(ranks, folder, [[sys.executable, "-m", "support.faulty_ranks", wanted]])


def harm(fault: str, factor: list[float]) -> None:
    """Let something happen to this process."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "loss":
        factor[0] = float("nan")
    elif fault == "crash":
        raise RuntimeError("a fault of this rank alone")


def main() -> None:
    """Train as the rank that the environment says."""
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    import mlx.core as mx
    import mlx.optimizers as optimizers

    from mlx_cpo_plugin.errors import UserError
    from mlx_cpo_plugin.losses import sigmoid_loss
    from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
    from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo
    from support.tiny import add_adapter, build_model, build_pairs

    wanted = json.loads(sys.argv[1])
    rank = mx.distributed.init().rank()
    fault, factor, calls, add = wanted["faults"].get(str(rank), ""), [1.0], count(1), OptimizerStep.add

    def add_or_be_harmed(self: OptimizerStep, *arguments: Any) -> Any:
        if next(calls) == wanted["at"]:
            harm(fault, factor)
        return add(self, *arguments)

    def loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
        return factor[0] * sigmoid_loss(chosen_logps, rejected_logps, beta)

    OptimizerStep.add = add_or_be_harmed  # type: ignore[method-assign]  # the fault
    settings = CPOTrainingArgs(
        iters=wanted["iters"],
        batch_size=4,
        gradient_accumulation_steps=3,
        beta=0.3,
        steps_per_report=1,
        steps_per_save=1,
        resume="auto",
        adapter_file=f"{wanted['folder']}/adapters.safetensors",
    )
    try:
        train_cpo(add_adapter(build_model()), optimizers.SGD(0.05), build_pairs(12), None, settings, loss_fn=loss)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
