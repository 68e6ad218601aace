"""Ranks of one run, each in a process of its own on this machine, of which chosen ones come to harm.

Each process is told which rank it is by the environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from support.prepared import Ended, Prepared


def ring(ranks: int, folder: Path) -> str:
    """Write the file that names the ranks' addresses, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    return str(hostfile)


def prepared(ranks: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """Let ``function`` be called once a rank, in processes that start quickly, and wait for the end."""
    hostfile = ring(ranks, folder)
    processes = [
        Prepared(function, *arguments, output=folder / f"rank-{rank}", MLX_HOSTFILE=hostfile, MLX_RANK=str(rank))
        for rank in range(ranks)
    ]
    return [process.ended() for process in processes]


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def train(folder: Path, ranks: int = 2, faults: dict[int, str] | None = None, at: int = 5) -> list[Ended]:
    """Train with one of the faults of :func:`harm` at the given micro-batch of some ranks, and wait for the end."""
    return prepared(ranks, folder, train_as_a_rank, folder, faults or {}, at)


def train_as_configured(folder: Path) -> int:
    """Run the command with the file that is this rank's."""
    from mlx_cpo_plugin import cli

    return cli.main(["train", "--config", str(folder / f"rank{os.environ['MLX_RANK']}.json")])


def harm(fault: str, factor: list[float]) -> None:
    """Let something happen to this process."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "loss":
        factor[0] = float("nan")
    elif fault == "crash":
        raise RuntimeError("a fault of this rank alone")
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)


def train_as_a_rank(folder: Path, faults: dict[int, str], at: int) -> None:
    """Train as the rank that the environment says."""
    import mlx.core as mx
    import mlx.optimizers as optimizers

    from mlx_cpo_plugin.errors import UserError
    from mlx_cpo_plugin.losses import sigmoid_loss
    from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
    from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo
    from support.tiny import add_adapter, build_model, build_pairs

    fault = faults.get(mx.distributed.init().rank(), "")
    factor, calls, add = [1.0], count(1), OptimizerStep.add

    def add_or_be_harmed(self: OptimizerStep, *arguments: Any) -> Any:
        if next(calls) == at:
            harm(fault, factor)
        return add(self, *arguments)

    def loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float) -> mx.array:
        return factor[0] * sigmoid_loss(chosen_logps, rejected_logps, beta)

    OptimizerStep.add = add_or_be_harmed  # type: ignore[method-assign]  # the fault
    settings = CPOTrainingArgs(
        iters=8,
        batch_size=4,
        gradient_accumulation_steps=3,
        beta=0.3,
        steps_per_report=1,
        steps_per_save=1,
        resume="auto",
        adapter_file=str(folder / "adapters.safetensors"),
    )
    try:
        train_cpo(add_adapter(build_model()), optimizers.SGD(0.05), build_pairs(12), None, settings, loss_fn=loss)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
