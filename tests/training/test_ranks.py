"""A rank that dies or fails stops the others at their next exchange, with one sentence and whole checkpoints."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from support.faulty_ranks import prepared, train, train_as_configured
from support.tiny import saved_arrays

from mlx_cpo_plugin.checkpoints.folder import read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity, RunRecord
from mlx_cpo_plugin.training import exits
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.exits import StopRequest
from mlx_cpo_plugin.training.outputs import Outputs

pytestmark = pytest.mark.slow

LOST = "error: another rank was killed or ended with an error of its own, so rank {} stops, too; the checkpoints so far"


def adapter(folder: Path) -> dict[str, bytes]:
    return saved_arrays(folder / "adapters.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [rank.code for rank in train(folder)] == [0, 0]
    return adapter(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_both_go_on_to_the_bit(
    tmp_path: Path, victim: int, undisturbed: dict[str, bytes]
) -> None:
    survivor = 1 - victim

    run = train(tmp_path, faults={victim: "killed"})

    assert [run[victim].code, run[survivor].code] == [-signal.SIGKILL, 2]
    (sentence,) = run[survivor].errors
    assert sentence.startswith(LOST.format(survivor))
    assert "Traceback" not in run[survivor].told
    for folder in ("checkpoints", "checkpoints-rank-1"):
        assert read_checkpoint(tmp_path / folder / "0000004").iteration == 4
        assert not (tmp_path / folder / "0000005").exists()
    resumed = train(tmp_path)
    assert [rank.code for rank in resumed] == [0, 0]
    assert "Resuming after iteration 4" in resumed[0].printed
    assert adapter(tmp_path) == undisturbed


def test_an_error_of_one_rank_is_told_by_it_and_ends_the_other(tmp_path: Path) -> None:
    run = train(tmp_path, faults={1: "loss"})

    assert [rank.code for rank in run] == [2, 2]
    (own,), (of_the_other,) = run[1].errors, run[0].errors
    assert own.startswith("error: Step 2: the loss of row ")
    assert of_the_other.startswith(LOST.format(0))


def test_an_error_of_all_ranks_is_told_by_each_and_nothing_else(tmp_path: Path) -> None:
    run = train(tmp_path, faults={0: "loss", 1: "loss"})

    assert [rank.code for rank in run] == [2, 2]
    for rank in run:
        (own,) = rank.errors
        assert own.startswith("error: Step 2: the loss of row ")


def test_a_crash_of_one_rank_ends_the_other(tmp_path: Path) -> None:
    run = train(tmp_path, faults={0: "crash"})

    assert [rank.code for rank in run] == [1, 2]
    assert run[0].told.rstrip().endswith("RuntimeError: a fault of this rank alone")
    assert run[1].errors[0].startswith(LOST.format(1))


@pytest.mark.parametrize("ranks", [3, 4])
def test_the_end_of_a_rank_goes_round_the_ring(tmp_path: Path, ranks: int) -> None:
    run = train(tmp_path, ranks=ranks, faults={0: "killed"}, at=2)

    assert [rank.code for rank in run] == [-signal.SIGKILL] + [2] * (ranks - 1)
    for rank in range(1, ranks):
        assert run[rank].errors[0].startswith(LOST.format(rank))


def test_a_stop_is_agreed_on_and_no_loss_of_a_rank(tmp_path: Path) -> None:
    run = train(tmp_path, faults={1: "stopped"})

    assert [rank.code for rank in run] == [128 + signal.SIGTERM] * 2
    for rank in run:
        (sentence,) = rank.errors
        assert sentence.startswith("error: stopped after iteration 5,")


def test_a_stop_that_is_asked_for_while_ranks_agree_counts_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest()

    def exchange(mine: int) -> list[int]:
        request.signal_number = signal.SIGTERM
        return [mine, 0]

    monkeypatch.setattr(exits, "gather", exchange)

    assert [request.agreed(), request.agreed()] == [False, True]


@pytest.mark.parametrize(("size", "keep", "kept"), [(1, 1, 1), (2, 1, 2), (2, 3, 3)])
def test_several_ranks_keep_the_checkpoint_that_all_of_them_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, keep: int, kept: int
) -> None:
    world = SimpleNamespace(rank=lambda: 0, size=lambda: size)
    monkeypatch.setattr(mx.distributed, "init", lambda: world)

    args = CPOTrainingArgs(keep_checkpoints=keep, adapter_file=str(tmp_path / "adapters.safetensors"))
    nothing: Any = None
    outputs = Outputs(nothing, nothing, nothing, args, RunRecord(RunIdentity.new()), {"extends_from": 0}, print)
    assert outputs.checkpoints.keep == kept


def test_rows_that_are_missing_on_one_machine_end_the_run_on_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    missing = str(tmp_path / "nowhere")
    for rank, data in enumerate((settings["data"], missing)):
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(settings | {"data": data}))  # which is YAML, too

    run = prepared(2, tmp_path, train_as_configured, tmp_path)

    assert [rank.code for rank in run] == [2, 2]
    assert missing in run[1].errors[0]
    assert run[0].errors[0].startswith(LOST.format(0))
