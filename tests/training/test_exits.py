"""Whatever ends a run, at whatever point: what was done is saved, and the run goes on from it to the same bits."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.checkpoints.folder import read_checkpoint
from mlx_cpo_plugin.errors import StoppedError, TrainingError
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.training import exits, optimizer_step, outputs, wiring
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.exits import stop_requests
from mlx_cpo_plugin.training.trainer import train_cpo

ITERS = 4
# Where a fault may strike: at the beginning of each call of a function of these modules.
MODULES = (
    *("trainer", "resumption", "reporting", "optimizer_step", "metrics", "validation", "held_out", "outputs", "exits"),
    *("folder", "adapter"),
)
# They only look something up, many times.
LOOK_UPS = {"iteration", "run", "state", "_describe", "_fault", "_hash", "_read", "_seconds", "_tree", "checkpoints_in"}
LOOK_UPS |= {"figure"}
# They are called once more when a run is over, to undo things.
ENDS = {"saved_on_failure", "out_of_memory_explained", "training_environment", "stop_requests"}
Arrays = dict[str, np.ndarray]
Strike = Callable[..., None]


def train(folder: Path, callback: TrainingCallback | None = None, rate: float = 1e-2, **more: Any) -> None:
    model = add_adapter(build_model(num_hidden_layers=1), dropout=0.2)
    mx.random.seed(7)
    settings: dict[str, Any] = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "iters": ITERS,
        "steps_per_report": 2,
        "steps_per_eval": 2,
        "steps_per_save": 3,
        "scoring": "plain",
        "resume": "auto",
        **more,
    }
    train_cpo(
        model,
        optimizers.Adam(learning_rate=rate),
        build_pairs(7),
        build_pairs(2, seed=9),
        CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), **settings),
        training_callback=callback,
    )


def weights(folder: Path) -> Arrays:
    return {name: np.array(value) for name, value in mx.load(str(folder / "adapters.safetensors")).items()}


def same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return weights(folder)


@cache
def _is_point(code: CodeType) -> bool:
    file, name = Path(code.co_filename), code.co_name
    return "mlx_cpo_plugin" in file.parts and file.stem in MODULES and name[0] != "<" and name not in LOOK_UPS | ENDS


class Points:
    """The calls of a run's functions, of which one is struck.

    Attributes:
        passed: points that were passed, as names of functions.
        done: micro-batches that were complete when the point was struck.
    """

    def __init__(self, strike_at: int, strike: Strike) -> None:
        self.strike_at, self.strike = strike_at, strike
        self.passed: list[str] = []
        self.done = 0
        self.struck = False
        self.inside = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not _is_point(frame.f_code):
            return
        name = frame.f_code.co_name
        # From the entry into the context of a run to its end; what undoes things is not struck.
        self.inside |= name == "begin"
        if not self.inside or self.struck:
            return
        if name == "count_iteration":
            self.done += 1
        self.passed.append(name)
        if len(self.passed) == self.strike_at:
            self.struck = True
            self.strike()

    @contextmanager
    def watched(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def raising(error: BaseException) -> Strike:
    def strike(*_: Any) -> None:
        raise error

    return strike


def points_of_a_run(folder: Path) -> list[str]:
    points = Points(0, lambda: None)
    with points.watched():
        train(folder)
    return points.passed


def each_point(
    tmp_path: Path, make_strike: Callable[[], Strike], first: int, every: int
) -> Iterator[tuple[Path, Points]]:
    """Let every so many points of a run, from a first one on, be struck, each in a folder of its own."""
    total = len(points_of_a_run(tmp_path / "counted"))
    assert total > 100
    for strike_at in range(first, total + 1, every):
        yield tmp_path / str(strike_at), Points(strike_at, make_strike())


def named_checkpoints(text: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"(\S+/checkpoints/\d+)", text)]


@pytest.mark.parametrize(
    ("number", "first", "every"),
    [
        (signal.SIGINT, 1, 61),
        (signal.SIGHUP, 31, 71),
        (signal.SIGTERM, 1, 11),
    ],
)
@pytest.mark.slow
def test_a_signal_at_any_point_stops_the_run_which_goes_on_to_the_same_bits(
    number: signal.Signals, first: int, every: int, tmp_path: Path, uninterrupted: Arrays
) -> None:
    for folder, points in each_point(tmp_path, lambda: lambda: signal.raise_signal(number), first, every):
        with points.watched(), pytest.raises(StoppedError) as stopped:
            train(folder)

        where = f"at {points.passed[-1]}, {len(points.passed)}: {stopped.value}"
        assert stopped.value.exit_code == 128 + number, where
        (done,) = re.findall(
            r"stopped (?:after iteration (\d+), which is saved|before iteration 1);", str(stopped.value)
        )
        if done:
            newest = max(path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
            assert read_checkpoint(newest).iteration == int(done) >= points.done, where
            assert (folder / "adapters.safetensors").exists(), where
        else:
            assert points.done == 0, where
        train(folder)
        assert same(weights(folder), uninterrupted), where


@pytest.mark.parametrize(
    ("error", "first", "every"),
    [
        (MemoryError(), 6, 11),  # between the points of SIGTERM
        (RuntimeError("[metal::malloc] Unable to allocate"), 11, 61),
        (LookupError("a fault"), 41, 71),
    ],
)
@pytest.mark.slow
def test_an_error_at_any_point_leaves_what_was_done_and_the_run_goes_on_to_the_same_bits(
    error: Exception,
    first: int,
    every: int,
    tmp_path: Path,
    uninterrupted: Arrays,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, points in each_point(tmp_path, lambda: raising(error), first, every):
        with points.watched(), pytest.raises((TrainingError, LookupError)) as ended:
            train(folder)

        told = capsys.readouterr().out + str(ended.value)
        where = f"at {points.passed[-1]}, {len(points.passed)}, {points.done} done: {told[-500:]}"
        if isinstance(error, LookupError):
            assert ended.value is error, where
        else:
            assert str(ended.value).startswith("The device is out of memory; lower max_seq_length"), where
        for checkpoint in named_checkpoints(told):
            if folder not in checkpoint.parents:  # printed when the one before went on
                continue
            assert read_checkpoint(checkpoint).iteration >= points.done - 1, where
        if points.done > 1:
            assert (folder / "adapters.safetensors").exists(), where
            assert list((folder / "checkpoints").glob("0*")) or "no checkpoint could be written" in told, where
        train(folder)
        assert same(weights(folder), uninterrupted), where


class Failing(TrainingCallback):
    """Raises at a report of a kind and an iteration."""

    def __init__(self, kind: str, iteration: int) -> None:
        self.kind, self.iteration = kind, iteration

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._fail("train", train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._fail("valid", val_info)

    def _fail(self, kind: str, info: dict[str, Any]) -> None:
        if (kind, info["iteration"]) == (self.kind, self.iteration):
            raise KeyError("a callback of the user")


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_what_a_callback_raises_comes_out_after_everything_is_saved(
    kind: str, tmp_path: Path, uninterrupted: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="a callback of the user"):
        train(tmp_path, Failing(kind, 2))

    (checkpoint,) = named_checkpoints(capsys.readouterr().out)
    assert read_checkpoint(checkpoint).iteration == 2
    reports = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [report["iteration"] for report in reports if report["kind"] == "train"] == [2]
    train(tmp_path)
    assert same(weights(tmp_path), uninterrupted)
    reports = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [report["iteration"] for report in reports if report["kind"] == "train"] == [2, 4]


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_a_validation_that_a_callback_prevented_or_interrupted_counts_when_the_run_goes_on(
    kind: str, tmp_path: Path
) -> None:
    def validated(folder: Path) -> list[tuple[int, float]]:
        reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(report["iteration"], report["val_loss"]) for report in reports if report["kind"] == "valid"]

    def best(folder: Path) -> tuple[str, Arrays]:
        arrays, said = mx.load(str(folder / "best" / "adapters.safetensors"), return_metadata=True)
        return said["iteration"], {name: np.array(value) for name, value in arrays.items()}

    # At a rate of zero the first validation is the best.
    flat = {"save_best": "loss", "rate": 0.0}
    train(tmp_path / "whole", **flat)

    with pytest.raises(KeyError, match="a callback of the user"):
        train(tmp_path / "run", Failing(kind, 2), **flat)
    train(tmp_path / "run", **flat)

    assert validated(tmp_path / "run") == validated(tmp_path / "whole")
    assert best(tmp_path / "run")[0] == best(tmp_path / "whole")[0] == "2"
    assert same(best(tmp_path / "run")[1], best(tmp_path / "whole")[1])


def test_the_advice_after_a_validation_is_printed_though_the_callback_raises_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        wiring.Judge, "news", lambda self, iteration, verdict: (verdict and f"Advice at {iteration}.", None)
    )

    with pytest.raises(KeyError, match="a callback of the user"):
        train(tmp_path, Failing("valid", 2))

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines if line["kind"] == "warning"] == ["Advice at 2."]


def test_a_best_adapter_that_the_user_moves_elsewhere_ends_no_run(tmp_path: Path) -> None:
    best_file = tmp_path / "best" / "adapters.safetensors"

    class MovedAndStopped(TrainingCallback):
        def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
            if val_info["iteration"] == 2:
                best_file.rename(tmp_path / "mine.safetensors")
                signal.raise_signal(signal.SIGTERM)

    settings = {"save_best": "loss", "rate": 0.0}
    with pytest.raises(StoppedError):
        train(tmp_path, MovedAndStopped(), **settings)
    train(tmp_path, **settings)

    assert (tmp_path / "mine.safetensors").exists()
    assert not best_file.exists()  # there was no better one


@pytest.mark.parametrize("stop_at_the_end", [False, True])
def test_a_run_that_stops_where_patience_ends_trains_no_further(
    stop_at_the_end: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class StopAtTheEnd(TrainingCallback):
        def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
            if val_info["iteration"] == 3:
                signal.raise_signal(signal.SIGTERM)

    settings = {"early_stopping_patience": 2, "steps_per_eval": 1, "iters": 9, "rate": 0.0}
    if stop_at_the_end:
        with pytest.raises(StoppedError):
            train(tmp_path, StopAtTheEnd(), **settings)
    train(tmp_path, **settings)

    assert "Iter 3: stopping, no validation since 1 was better." in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "0000003"
    train(tmp_path, **settings | {"iters": 12})
    assert "finished at iteration 3: nothing was changed; raise early_stopping_patience" in capsys.readouterr().out
    train(tmp_path, **settings | {"early_stopping_patience": 4})
    assert "Iter 5: stopping, no validation since 1 was better." in capsys.readouterr().out


def test_a_signal_writes_nothing_where_standard_error_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(exits.os, "write", lambda *arguments: pytest.fail("it is another file's number"))
    passed_on = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: passed_on.append(number))
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert passed_on == [signal.SIGTERM]


def test_an_update_that_fails_half_way_leaves_the_weights_from_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Arrays
) -> None:
    train(tmp_path / "two", iters=2)
    steps = count(1)

    def update_fails(self: optimizer_step.OptimizerStep) -> float:
        if next(steps) == 2:
            update = self._update

            def half(*arguments: Any) -> None:
                update(*arguments)
                raise MemoryError

            self._update = half
        return apply(self)

    apply = optimizer_step.OptimizerStep.apply
    monkeypatch.setattr(optimizer_step.OptimizerStep, "apply", update_fails)
    with pytest.raises(TrainingError, match=r"The weights after iteration 3 are saved in .*/adapters.safetensors\.$"):
        train(tmp_path / "broken")
    monkeypatch.undo()

    assert same(weights(tmp_path / "broken"), weights(tmp_path / "two"))
    train(tmp_path / "broken")
    assert same(weights(tmp_path / "broken"), uninterrupted)


def test_where_nothing_can_be_saved_the_sentence_says_so_and_the_error_is_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            monkeypatch.setattr(outputs, "save_adapter", raising(OSError(28, "No space left on device")))
            monkeypatch.setattr(outputs.CheckpointFolder, "save", raising(OSError(28, "No space left on device")))
            raise TrainingError("First.")

    with pytest.raises(TrainingError) as ended:
        train(tmp_path, Full())

    assert re.match(r"First\. The weights after iteration 2 could not be saved \(.*No space left", str(ended.value))
    assert "no checkpoint could be written" in str(ended.value)
    assert not (tmp_path / "adapters.safetensors").exists()


def test_before_the_first_micro_batch_nothing_is_saved_and_nothing_is_said_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError):
        train(tmp_path, Failing("valid", 1))

    assert "saved" not in capsys.readouterr().out
    assert not (tmp_path / "adapters.safetensors").exists()


def test_a_second_signal_ends_the_run_at_once_and_saves_nothing(tmp_path: Path) -> None:
    class Twice(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Twice())

    assert not (tmp_path / "adapters.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    class HangUp(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path, HangUp())  # to the end
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_are_told_once_and_the_run_goes_on(
    tmp_path: Path, uninterrupted: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(TrainingCallback):
        def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
            metrics = tmp_path / "metrics.jsonl"
            if not metrics.is_symlink():
                metrics.unlink()
                metrics.symlink_to("/dev/full")

    train(tmp_path, Full())

    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl cannot be written" in line]
    assert "the run goes on" in warning
    assert same(weights(tmp_path), uninterrupted)
