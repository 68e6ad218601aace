"""Two ranks on this machine, connected by the ring backend, do what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.faulty_ranks import prepared
from support.prepared import Ended, Prepared
from support.tiny import assert_same

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]

CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
import mlx.core as mx, mlx.optimizers as optimizers
from support.tiny import add_adapter, build_model, build_pairs
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

# A folder of its own for each rank, so that it shows who writes; or one that they share.
folder = {folder!r} + "-of-another-rank" * mx.distributed.init().rank() * {apart}
dies = {dies!r}
if mx.distributed.init().rank() in dies:
    from itertools import count
    from mlx_cpo_plugin.training import trainer

    real, calls = trainer.scored_tokens, count(1)
    trainer.scored_tokens = lambda pairs: os._exit(9) if next(calls) == dies["at"] else real(pairs)
train_cpo(
    add_adapter(build_model()),
    optimizers.SGD(0.05),
    build_pairs({rows}),
    build_pairs(5, seed=1),
    CPOTrainingArgs(
        iters={iters}, batch_size={batch_size}, gradient_accumulation_steps={accumulation}, beta=0.3, cpo_alpha=0.5,
        steps_per_report=1, steps_per_save=1, resume={resume!r}, adapter_file=folder + "/adapters.safetensors",
    ),
)
"""


def free_port() -> int:
    """The first of two neighbouring ports that nobody listens on."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def script_of(
    folder: Path, dies: dict[Any, int] | None = None, resume: str | None = "auto", apart: bool = False, **arguments: int
) -> str:
    """Write what each rank runs, some of which may die at an iteration."""
    script = folder.with_suffix(".py")
    script.write_text(
        CHILD.format(tests=str(TESTS), folder=str(folder), dies=dies or {}, resume=resume, apart=apart, **arguments)
    )
    return str(script)


def launched(script: str) -> str:
    """Let MLX's launcher run two ranks to the end, and return what they print."""
    launcher = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    hosts = ["--hosts", "127.0.0.1", "--starting-port", str(free_port())]
    command = [*launcher, "-n", "2", "--backend", "ring", *hosts, sys.executable, script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr
    # The launcher ends well even where a rank did not.
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout


def two_prepared(script: str) -> str:
    """Let two processes that start quickly run the ranks to the end, and return what they print."""
    ranks = prepared(2, Path(script).with_suffix(".ring"), run_path, script)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    return "".join(rank.printed for rank in ranks)


def prepared_ranks(folder: Path, resume: str | None, dies: dict[Any, int] | None = None) -> list[Ended]:
    """Two ranks of a run whose last step is half filled, in processes that start quickly."""
    script = script_of(folder, dies, resume, rows=9, batch_size=2, accumulation=3, iters=8)
    return prepared(2, folder.with_suffix(".ring"), run_path, script)


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "iters", "start"),
    [(7, 4, 1, 4, launched), (5, 2, 2, 6, two_prepared)],
    ids=["a tail of three, by MLX's launcher", "accumulation with an empty rank at the tail"],
)
def test_two_ranks_train_the_adapter_that_one_rank_does(
    tmp_path: Path, rows: int, batch_size: int, accumulation: int, iters: int, start: Callable[[str], str]
) -> None:
    arguments = {"rows": rows, "batch_size": batch_size, "accumulation": accumulation, "iters": iters}

    alone = Prepared(run_path, script_of(tmp_path / "alone", **arguments), output=tmp_path / "told").ended()
    assert alone.code == 0, alone.told
    together = start(script_of(tmp_path / "together", apart=True, **arguments))

    one, two = (dict(mx.load(str(tmp_path / name / "adapters.safetensors"))) for name in ("alone", "together"))
    as_numpy = [{name: np.array(value) for name, value in tree.items()} for tree in (two, one)]
    assert_same(*as_numpy, tolerance=1e-4)
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    ]
    assert len(metrics[0]) == len(metrics[1])
    for left, right in zip(*metrics, strict=True):
        for key in left:
            if key.endswith(("_loss", "_accuracies", "_margins", "_logps", "_norm")):
                assert left[key] == pytest.approx(right[key], rel=1e-3), key
    of_another_rank = [path.name for path in (tmp_path / "together-of-another-rank").iterdir()]
    assert of_another_rank == ["checkpoints-rank-1"]  # what it needs to go on, and no adapter
    assert together.count("Saved final weights") == alone.printed.count("Saved final weights") == 1


def test_ranks_that_die_in_the_middle_of_a_step_go_on_from_their_own_parts_to_the_bit(tmp_path: Path) -> None:
    prepared_ranks(tmp_path / "whole", resume=None)
    died = prepared_ranks(tmp_path / "run", resume=None, dies={0: 1, 1: 1, "at": 5})
    assert 9 in [rank.code for rank in died]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not (checkpoints / "0000005").exists()

    elsewhere, *_ = prepared_ranks(tmp_path / "elsewhere", resume=str(checkpoints / "0000004"))
    in_place, *_ = prepared_ranks(tmp_path / "run", resume="auto")

    whole = mx.load(str(tmp_path / "whole" / "adapters.safetensors"))
    for run, rank in (("elsewhere", elsewhere), ("run", in_place)):
        assert "Resuming after iteration 4" in rank.printed
        adapter = mx.load(str(tmp_path / run / "adapters.safetensors"))
        assert_same(*({key: np.array(value) for key, value in arrays.items()} for arrays in (whole, adapter)))
