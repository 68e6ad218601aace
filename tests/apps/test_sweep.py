"""``mlx-cpo sweep``: which runs a file asks for, how they are carried out, and what comes of them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.prepared import Prepared, run_module
from support.refusals import refused
from support.tiny import saved_arrays

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.sweep import command, runs
from mlx_cpo_plugin.sweep.plan import PlannedRun, Sweep, random_draws, read_sweep, with_options
from mlx_cpo_plugin.sweep.results import (
    FAILED,
    FINISHED,
    GIVEN_UP,
    RESULT,
    Outcome,
    SettingResult,
    results_of,
    score_of,
    table,
)
from mlx_cpo_plugin.sweep.runs import carry_out, outcomes_of

ITERS, EVERY = 8, 2


@pytest.fixture
def base(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "train_mode"} | {"iters": ITERS}


@pytest.fixture
def write(tmp_path: Path, base: dict[str, Any]) -> Callable[..., Path]:
    """Write a sweep file with these keys; the base stands in it, on one line."""

    def write(**keys: Any) -> Path:
        file = tmp_path / "sweep.yaml"
        lines = [f"{key}: {json.dumps(value)}" for key, value in {"base": base, **keys}.items()]
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


class Pretended:
    """Runs that train nothing: they validate every two iterations, with the figures that ``accuracy`` gives.

    Attributes:
        launched: the configuration of each launch, in order.
        stops: beta -> the validation that ends a run early.
    """

    def __init__(
        self,
        accuracy: Callable[[dict[str, Any], int], float],
        fails: Iterable[int] = (),
        stops: Mapping[float, int] | None = None,
    ) -> None:
        self.accuracy, self.fails, self.stops = accuracy, list(fails), stops or {}
        self.launched: list[dict[str, Any]] = []

    def __call__(self, folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        self.launched.append(config)
        if len(self.launched) in self.fails:
            return 2, "the device is out of memory"
        (folder / "run_settings.yaml").write_text(f"iters: {config['iters']}\n")
        file = folder / "metrics.jsonl"
        done = [json.loads(line)["iteration"] for line in file.read_text().splitlines()] if file.exists() else []
        for iteration in [1, *range(EVERY, config["iters"] + 1, EVERY)]:
            if iteration in done:
                continue
            value = 0.5 if iteration == 1 else self.accuracy(config, iteration)
            row = {"kind": "valid", "run": "r", "iteration": iteration, "val_accuracies": value, "val_loss": 1 - value}
            row |= {"val_nll_loss": 2 - value, "val_margins": value}
            if iteration > 1:
                row |= {"val_verdict": (value > 0.5) - (value < 0.5), "val_accuracies_change": value - 0.5}
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            if is_far_enough():
                return 143, "stopped"
            if iteration == self.stops.get(config.get("beta")):
                break
        return 0, ""


def by_beta(config: dict[str, Any], iteration: int) -> float:
    """The larger beta, the better; each seed a little; the longer, the better."""
    return 0.5 + config.get("beta", 0.1) * iteration / ITERS + 0.01 * config["seed"]


def done(sweep: Sweep, launch: Pretended, said: list[str] | None = None) -> dict[str, Outcome]:
    return carry_out(sweep, launch, ([] if said is None else said).append)


def launches(launch: Pretended, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(config[key] for key in keys) for config in launch.launched]


def options(sweep: Sweep) -> list[tuple[dict[str, Any], int]]:
    return [(run.options, run.seed) for run in sweep.runs]


def test_a_grid_is_every_combination_with_every_seed(write: Callable[..., Path]) -> None:
    sweep = read_sweep(write(grid={"beta": [0.05, 0.1], "lora_parameters.rank": [2, 4]}, seeds=[3, 5]))

    assert options(sweep) == [
        ({"beta": beta, "lora_parameters.rank": rank}, seed)
        for beta in (0.05, 0.1)
        for rank in (2, 4)
        for seed in (3, 5)
    ]
    assert all(run.values["lora_parameters"] == {"rank": run.options["lora_parameters.rank"]} for run in sweep.runs)
    assert len({run.name for run in sweep.runs}) == 8


def test_several_grids_stand_in_a_list_and_what_is_in_two_of_them_is_run_once(write: Callable[..., Path]) -> None:
    of_sigmoid = {"dpo_cpo_loss_type": "sigmoid", "beta": [0.05, 0.1]}
    of_simpo = {"dpo_cpo_loss_type": ["simpo"], "beta": [2.0], "simpo_gamma": [1.0]}

    sweep = read_sweep(write(grid=[of_sigmoid, of_simpo, {**of_sigmoid, "beta": 0.1}]))

    assert [run.options["beta"] for run in sweep.runs] == [0.05, 0.1, 2.0]


def test_null_is_the_default_whatever_the_base_says(write: Callable[..., Path], base: dict[str, Any]) -> None:
    base["max_grad_norm"] = 1.0

    sweep = read_sweep(write(grid={"max_grad_norm": [None, 2.0]}))

    assert [run.values.get("max_grad_norm") for run in sweep.runs] == [None, 2.0]


@given(count=st.integers(1, 6), seed=st.integers(0, 99))
def test_draws_are_in_their_ranges_and_more_of_them_begin_with_those_of_fewer(count: int, seed: int) -> None:
    asked = {"seed": seed, "learning_rate": {"log": [1e-6, 1e-4]}, "beta": {"uniform": [0, 1]}}
    asked |= {"batch_size": {"log": [1, 8]}, "dpo_cpo_loss_type": ["sigmoid", "hinge"]}

    fewer, more = (list(random_draws({"n": n, **asked}, str)) for n in (count, count + 2))

    assert more[:count] == fewer
    for draw in more:
        assert 1e-6 <= draw["learning_rate"] <= 1e-4
        assert 0 <= draw["beta"] <= 1
        assert draw["batch_size"] in range(1, 9)
        assert draw["dpo_cpo_loss_type"] in ("sigmoid", "hinge")


def test_the_base_may_be_a_file_beside_the_sweep(
    write: Callable[..., Path], base: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))

    named, inline = read_sweep(write(base="run.yaml", seeds=2)), read_sweep(write(seeds=2))

    assert [run.digest for run in named.runs] == [run.digest for run in inline.runs]


@pytest.mark.parametrize(
    ("keys", "key", "line"),
    [
        ({"gird": {"beta": [1]}}, "gird", 2),
        ({"grid": {"beta": [0.1, -1]}}, "beta", 2),
        ({"seeds": 2, "grid": {"bate": [0.1]}}, "bate", 3),
        ({"grid": {"lora_parameters.rank": [0]}}, "lora_parameters.rank", 2),
        ({"grid": {"beta": []}}, "grid.beta", 2),
        ({"grid": [{"beta": 0.1}, {"beta": [0.1, 0]}]}, "beta", 2),
        ({"grid": 7}, "grid", 2),
        ({"grid": {"seed": [1, 2]}}, "grid.seed", 2),
        ({"grid": {"adapter_path": ["a", "b"]}}, "grid.adapter_path", 2),
        (
            {"grid": {"lora_parameters.rank": [4], "lora_parameters": [{"rank": 8}, {"rank": 16}]}},
            "grid.lora_parameters.rank",
            2,
        ),
        (
            {"random": {"n": 2, "lora_parameters.rank": [4], "lora_parameters": [{"rank": 8}]}},
            "random.lora_parameters.rank",
            2,
        ),
        ({"random": {"n": 0, "beta": [1]}}, "random.n", 2),
        ({"random": {"n": 2}}, "random", 2),
        ({"random": {"n": 2, "beta": {"uniform": [1, 0]}}}, "random.beta", 2),
        ({"random": {"n": 2, "beta": {"log": [0, 1]}}}, "random.beta", 2),
        ({"random": {"n": 2, "beta": {"normal": [0, 1]}}}, "random.beta", 2),
        ({"seeds": []}, "seeds", 2),
        ({"seeds": [1, -1]}, "seeds.1", 2),
        ({"seeds": 2, "metric": "bleu"}, "metric", 3),
        ({"seeds": 2, "halve_at": [0.5, 1]}, "halve_at.1", 3),
    ],
)
def test_a_mistake_names_its_key_and_its_line(
    write: Callable[..., Path], keys: dict[str, Any], key: str, line: int
) -> None:
    file = write(**keys)

    with refused(ConfigError, key=key, place=f"in {file}, line {line}"):
        read_sweep(file)


def test_an_option_that_is_no_text_is_refused(write: Callable[..., Path]) -> None:
    file = write(grid={"beta": [0.1, 0.2]})
    file.write_text(file.read_text().replace('grid: {"beta":', "grid: {1:"))

    with refused(ConfigError, "must be an option, but not adapter_path", key="grid.1"):
        read_sweep(file)


def test_a_base_that_begins_from_another_run_is_refused(write: Callable[..., Path], base: dict[str, Any]) -> None:
    base["resume"] = "other/adapters"

    with refused(ConfigError, key="resume"):
        read_sweep(write(seeds=2))
    for own in ("auto", True, False, None):
        base["resume"] = own
        assert len(read_sweep(write(seeds=2)).runs) == 2


@pytest.mark.parametrize("grid", [{"min_gap": [None, 0.5]}, {"chosen_feature": ["auto", "nosuch"]}])
def test_what_the_rows_lack_for_a_later_run_is_told_before_the_first(
    write: Callable[..., Path], grid: dict[str, Any]
) -> None:
    (key,) = grid
    with refused(DataError, key=key):
        read_sweep(write(grid=grid))


def test_one_run_is_no_sweep_and_rows_to_validate_on_are_needed(
    write: Callable[..., Path], base: dict[str, Any], data_folder: Path, tmp_path: Path
) -> None:
    with refused(ConfigError, key="grid"):
        read_sweep(write())
    base["val_batches"] = 0
    with refused(DataError, key="val_batches"):
        read_sweep(write(seeds=2))
    base |= {"val_batches": -1, "data": str(data_folder / "train.jsonl")}
    with refused(DataError, key="valid_fraction"):
        read_sweep(write(seeds=2))
    base["valid_fraction"] = 0.2
    assert len(read_sweep(write(seeds=2)).runs) == 2
    with refused(ConfigError, key="output"):
        read_sweep(write(seeds=2, output=str(tmp_path / "sweep.yaml")))


def test_a_model_that_is_not_there_is_told_before_anything_trains(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    file = write(grid={"model": [str(tmp_path / "none"), str(tmp_path / "neither")]})
    with refused(ConfigError, key="model", place=f"in {file}, line 2"):
        read_sweep(file)


def test_rows_that_are_not_there_are_told_with_the_line_that_asks_for_them(
    write: Callable[..., Path], base: dict[str, Any], tmp_path: Path
) -> None:
    file = write(seeds=2, grid={"data": [base["data"], str(tmp_path / "none")]})

    with refused(DataError, key="data", place=f"in {file}, line 3"):
        read_sweep(file)

    (tmp_path / "none").mkdir()
    with refused(DataError, key="data", place=f"in {file}, line 3"):
        read_sweep(file)


def test_each_run_is_the_base_with_its_options_in_a_folder_of_its_own(
    write: Callable[..., Path], base: dict[str, Any]
) -> None:
    launch = Pretended(by_beta)
    base |= {"fuse": True, "push_to_hub": "account/name"}

    outcomes = done(read_sweep(write(grid={"beta": [0.05, 0.1]}, seeds=2)), launch)

    assert launches(launch, "beta", "seed") == [(0.05, 0), (0.05, 1), (0.1, 0), (0.1, 1)]
    assert {outcome.status for outcome in outcomes.values()} == {FINISHED}
    for config in launch.launched:
        own = {"beta", "seed", "adapter_path", "resume", "fuse", "push_to_hub", "train_mode"}
        assert {key: value for key, value in config.items() if key not in own} == {
            key: value for key, value in base.items() if key not in own
        }
        assert (config["resume"], config["fuse"], config["train_mode"]) == ("auto", False, "cpo")
        assert "push_to_hub" not in config
    assert len(set(launches(launch, "adapter_path"))) == 4


def test_a_killed_sweep_goes_on_and_a_changed_one_does_what_is_new(
    write: Callable[..., Path], base: dict[str, Any], data_folder: Path
) -> None:
    class Killed(Exception):
        pass

    def killed(folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
        if len(launch.launched) == 2:
            raise Killed
        return launch(folder, is_far_enough)

    launch = Pretended(by_beta)
    sweep = read_sweep(write(grid={"beta": [0.05, 0.1, 0.2]}))
    with pytest.raises(Killed):
        carry_out(sweep, killed, print)
    done(sweep, launch)
    assert launches(launch, "beta") == [(0.05,), (0.1,), (0.2,)]

    wider = read_sweep(write(grid={"beta": [0.3, 0.1, 0.2], "cpo_alpha": [0.0]}))
    done(wider, launch)
    assert launches(launch, "beta")[3:] == [(0.3,)]
    assert {one.status for one in outcomes_of(wider).values()} == {FINISHED}
    assert command._no_longer_asked_for(wider) == ["note: left out: 1 run of an earlier state of the file or its rows."]

    rows = (data_folder / "train.jsonl").read_text().splitlines()
    (data_folder / "train.jsonl").write_text("\n".join(rows[1:]))
    done(read_sweep(write(grid={"beta": [0.3, 0.1]})), launch)
    assert launches(launch, "beta")[4:] == [(0.3,), (0.1,)]
    base["learning_rate"] = 2e-3
    done(read_sweep(write(grid={"beta": [0.3, 0.1]})), launch)
    assert len(launch.launched) == 8


def test_options_that_differ_in_a_character_are_settings_of_their_own(
    write: Callable[..., Path], base: dict[str, Any], tmp_path: Path
) -> None:
    twice = [str(shutil.copytree(base["data"], tmp_path / name)) for name in ("rows_1", "rows-1")]
    twice_lists = [["self_attn.q_proj"], ["self_attn.v_proj"]]
    sweep = read_sweep(write(grid={"data": twice, "lora_parameters.keys": twice_lists}, seeds=2))

    results = results_of(sweep, done(sweep, Pretended(lambda config, at: 0.5 + ("rows_1" in config["data"]) / 4)))

    assert [len(result.outcomes) for result in results] == [2, 2, 2, 2]
    assert f'data {twice[0]}, lora_parameters.keys ["self_attn.q_proj"]' in [result.name for result in results[:2]]


def test_what_settings_have_not_in_common_before_training_is_not_shown_as_if_they_had() -> None:
    runs_of = [PlannedRun({"data": name}, 0, {}, name) for name in ("a", "b")]
    sweep = Sweep(Path("s"), {}, tuple(runs_of), "accuracy", (), Path())
    before = [{"val_accuracies": 0.25, "val_nll_loss": 2.0}, {"val_accuracies": 0.75, "val_nll_loss": 2.0}]
    outcomes = {
        run.digest: Outcome(run, Path(), FINISHED, before=row, after=row)
        for run, row in zip(runs_of, before, strict=True)
    }

    line = table(sweep, results_of(sweep, outcomes)).splitlines()[2]

    assert [cell.strip() for cell in line.strip("|").split("|")] == ["before training", "", "", "", "2.000"]


def test_what_a_finished_run_was_judged_by_is_kept_though_its_metrics_are_not(write: Callable[..., Path]) -> None:
    sweep = read_sweep(write(grid={"beta": [0.1, 0.2]}))
    before = table(sweep, results_of(sweep, done(sweep, Pretended(by_beta))))

    first, second = (runs.folder_of(sweep, run) / "metrics.jsonl" for run in sweep.runs)
    first.unlink()
    second.write_text(second.read_text().splitlines()[0] + "\n")

    assert table(sweep, results_of(sweep, outcomes_of(sweep))) == before
    done(sweep, again := Pretended(by_beta))
    assert not again.launched


def test_a_run_whose_last_validation_was_not_written_has_not_finished(write: Callable[..., Path]) -> None:
    sweep = read_sweep(write(grid={"beta": [0.1, 0.2]}))
    pretended = Pretended(by_beta, stops={0.2: 6})

    def launch(folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
        code = pretended(folder, is_far_enough)
        mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros(1)}, {"iteration": str(ITERS)})
        return code

    whole, torn = done(sweep, launch).values()

    assert whole.status == FINISHED
    assert torn.status == FAILED
    assert f"lacks the validation of iteration {ITERS}" in torn.reason


@pytest.mark.parametrize("path", ["/full/config.yaml", None])
def test_a_run_whose_files_cannot_be_written_ends_the_sweep_with_a_sentence(
    write: Callable[..., Path], path: str | None
) -> None:
    sweep = read_sweep(write(grid={"beta": [0.1, 0.2]}))

    def launch(folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with refused(match=f"{path or runs.folder_of(sweep, sweep.runs[0])} cannot be written .No space left.*--output"):
        carry_out(sweep, launch, print)


def test_a_run_that_fails_is_a_line_of_the_table_and_is_tried_again(write: Callable[..., Path]) -> None:
    launch, said = Pretended(by_beta, fails=[2]), list[str]()
    sweep = read_sweep(write(grid={"beta": [0.05, 0.3, 0.2]}))

    results = results_of(sweep, done(sweep, launch, said))

    assert [outcome.status for result in results for outcome in result.outcomes] == [FINISHED, FINISHED, FAILED]
    assert "failed: the device is out of memory" in table(sweep, results)
    assert any("the device is out of memory" in line for line in said)
    assert results[0].name == "beta 0.2"
    again = results_of(sweep, done(sweep, launch))
    assert again[0].name == "beta 0.3"
    assert len(launch.launched) == 4


def test_of_settings_that_do_worse_half_way_only_the_better_half_goes_on(write: Callable[..., Path]) -> None:
    launch = Pretended(by_beta)
    sweep = read_sweep(write(grid={"beta": [0.05, 0.4, 0.1, 0.3]}, seeds=2, metric="accuracy", halve_at=[0.25, 0.5]))

    outcomes = done(sweep, launch)

    last = {run.options["beta"]: outcomes[run.digest].after for run in sweep.runs}
    assert {beta: row and row["iteration"] for beta, row in last.items()} == {0.05: 2, 0.1: 2, 0.3: 4, 0.4: ITERS}
    assert len(launch.launched) == 8 + 4 + 2
    status = {run.options["beta"]: outcomes[run.digest].status for run in sweep.runs}
    assert status == {0.05: GIVEN_UP, 0.1: GIVEN_UP, 0.3: GIVEN_UP, 0.4: FINISHED}
    done(sweep, launch)
    assert len(launch.launched) == 14  # nothing is done twice
    assert results_of(sweep, outcomes)[0].name == "beta 0.4"


def test_a_run_that_its_own_validations_stopped_is_judged_at_the_half_by_its_last_one(
    write: Callable[..., Path],
) -> None:
    launch = Pretended(by_beta, stops={0.3: 2})
    sweep = read_sweep(write(grid={"beta": [0.05, 0.2, 0.4, 0.3]}, metric="accuracy", halve_at=0.5))

    outcomes = done(sweep, launch)

    status = {run.options["beta"]: outcomes[run.digest].status for run in sweep.runs}
    assert status == {0.05: GIVEN_UP, 0.2: FINISHED, 0.3: FINISHED, 0.4: FINISHED}
    assert launches(launch, "beta") == [(0.05,), (0.2,), (0.4,), (0.3,), (0.2,), (0.4,)]


def test_a_run_that_fails_before_the_half_is_tried_again_by_the_next_call_and_then_takes_part(
    write: Callable[..., Path],
) -> None:
    launch = Pretended(by_beta, fails=[2])
    sweep = read_sweep(write(grid={"beta": [0.1, 0.4, 0.2]}, metric="accuracy", halve_at=0.5))

    first = [one.status for one in done(sweep, launch).values()]
    again = [one.status for one in done(sweep, launch).values()]

    assert first == [GIVEN_UP, FAILED, FINISHED]
    assert again == [GIVEN_UP, FINISHED, FINISHED]
    assert launches(launch, "beta") == [(0.1,), (0.4,), (0.2,), (0.2,), (0.4,), (0.4,)]


def test_a_run_that_fails_after_a_half_brings_nothing_back_that_was_given_up_there(
    write: Callable[..., Path],
) -> None:
    launch = Pretended(by_beta, fails=[5])
    sweep = read_sweep(write(grid={"beta": [0.05, 0.4, 0.1, 0.3]}, metric="accuracy", halve_at=[0.25, 0.5]))

    outcomes = done(sweep, launch)

    assert launches(launch, "beta") == [(0.05,), (0.4,), (0.1,), (0.3,), (0.4,), (0.3,), (0.3,)]
    assert [one.status for one in outcomes.values()] == [GIVEN_UP, FAILED, GIVEN_UP, FINISHED]


def test_a_run_that_fails_on_its_way_to_a_half_takes_no_place_there(write: Callable[..., Path]) -> None:
    pretended = Pretended(by_beta)

    def launch(folder: Path, is_far_enough: Callable[[], bool]) -> tuple[int, str]:
        ended = pretended(folder, is_far_enough)
        return (2, "the device is out of memory") if pretended.launched[-1]["beta"] == 0.4 else ended

    sweep = read_sweep(write(grid={"beta": [0.1, 0.4]}, metric="accuracy", halve_at=0.5))

    assert [one.status for one in carry_out(sweep, launch, print).values()] == [FINISHED, FAILED]


def outcome(accuracy: float, nll: float = 1.0, verdict: float = 0.0) -> Outcome:
    row = {"val_accuracies": accuracy, "val_nll_loss": nll, "val_verdict": verdict, "val_loss": nll, "val_margins": 1.0}
    return Outcome(PlannedRun({}, 0, {}, ""), Path(), FINISHED, after=row)


def test_settings_are_ordered_by_the_metric_and_what_is_not_finite_is_last() -> None:
    good, sure, lost = outcome(0.9, 1.0), outcome(0.8, 1.0, verdict=1), outcome(math.nan, math.nan)

    def order(metric: str) -> list[Outcome]:
        return sorted([lost, sure, good], key=lambda one: score_of([one], metric), reverse=True)

    assert order("verdict") == [sure, good, lost]
    assert order("accuracy") == [good, sure, lost]
    assert order("nll")[-1] is lost
    assert score_of([outcome(0.5, 1.0)], "nll") > score_of([outcome(0.9, 2.0)], "nll")
    assert score_of([outcome(0.5, 1.0)], "accuracy") > score_of([outcome(0.5, 2.0)], "accuracy")


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_means_over_seeds_have_their_standard_error(values: list[float]) -> None:
    mean = SettingResult(tuple(map(outcome, values))).mean("accuracy")

    assert mean.value == pytest.approx(statistics.fmean(values))
    assert mean.stderr == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, abs=1e-12)


def test_the_command_writes_table_plots_and_a_config_that_trains(
    write: Callable[..., Path],
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta))
    file = write(grid={"beta": [0.05, 0.3]}, seeds=3, metric="accuracy")

    folder = tmp_path / "my sweep"
    assert cli.main(["sweep", str(file), "--output", str(folder)]) == 0

    printed = capsys.readouterr().out
    assert f"--config '{folder / 'best.yaml'}'" in printed
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best == with_options({**base, "train_mode": "cpo"}, {"beta": 0.3})
    assert resolve({"config": str(folder / "best.yaml")}).settings.beta == 0.3
    rows = re.findall(r"^\| (0\.\S+) \| 3 \| better \| (\S+) \((\S+) ± (\S+)\)", printed, flags=re.MULTILINE)
    error = f"{0.01 / 3**0.5:.1%}"
    assert rows == [("0.3", "81.0%", "+31.0%", error), ("0.05", "56.0%", "+6.0%", error)]
    assert "| before training |  |  | 50.0% |" in printed
    assert f"+25.0% ± {math.hypot(0.01, 0.01) / 3**0.5:.1%}" in printed
    assert (folder / "table.md").read_text().splitlines()[0] in printed
    plot = (folder / "plots.svg").read_bytes()
    assert b"<svg" in plot

    assert cli.main(["sweep", str(file), "--no-more-runs"]) == 0
    assert (folder / "plots.svg").read_bytes() == plot


def test_grids_of_other_options_and_seeds_alone_have_their_table_and_their_plots(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta))
    grid = [{"beta": [0.1, 0.2, 0.3]}, {"learning_rate": [2e-3, 1e-2]}, {"dpo_cpo_loss_type": ["hinge"], "beta": None}]

    assert cli.main(["sweep", str(write(grid=grid, output=str(tmp_path / "grids")))]) == 0
    assert cli.main(["sweep", str(write(seeds=2, output=str(tmp_path / "seeds")))]) == 0

    assert (tmp_path / "grids" / "plots.svg").exists()
    assert not (tmp_path / "seeds" / "plots.svg").exists()
    assert len((tmp_path / "grids" / "table.md").read_text().splitlines()) == 3 + 6 + 4 + 2


def test_a_folder_that_another_sweep_is_in_or_that_cannot_be_made_is_refused(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read_sweep(write(seeds=2, output=str(tmp_path / "in_use")))
    (tmp_path / "file").touch()

    def occupied(folder: Path) -> None:
        raise ConfigError("Another run is writing to it.", key="adapter_path")

    for output in (read_sweep(write(seeds=2, output=str(tmp_path / "file" / "inside"))), sweep):
        with refused(ConfigError, key="output", place=str(output.output)):
            done(output, Pretended(by_beta))
        monkeypatch.setattr(runs, "only_run_in", occupied)


def test_results_that_somebody_has_edited_stay_and_the_new_ones_go_beside_them(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta))
    file = write(grid={"beta": [0.05, 0.3]}, metric="accuracy")
    folder = tmp_path / "sweep"
    names = ["best.yaml", "table.md"]
    assert cli.main(["sweep", str(file), "--output", str(folder)]) == 0
    assert cli.main(["sweep", str(file), "--output", str(folder), "--no-more-runs"]) == 0
    assert sorted(path.name for path in folder.iterdir() if path.suffix in {".yaml", ".md"}) == names
    for name in names:
        (folder / name).write_text(f"# Mine\n{(folder / name).read_text()}")
    mine = {name: (folder / name).read_bytes() for name in names}
    capsys.readouterr()

    for _ in range(2):
        assert cli.main(["sweep", str(file), "--output", str(folder), "--no-more-runs"]) == 0

    assert {name: (folder / name).read_bytes() for name in names} == mine
    assert sorted(path.name for path in folder.iterdir() if path.suffix in {".yaml", ".md"}) == [
        *("best-2.yaml", "best.yaml", "table-2.md", "table.md"),
    ]
    assert f"--config {folder / 'best-2.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("runs", "folder"), ("table.md", "file")])
def test_what_is_in_the_way_is_told_before_the_first_run(
    write: Callable[..., Path], tmp_path: Path, name: str, kind: str
) -> None:
    sweep = read_sweep(write(seeds=2, output=str(tmp_path / "used")))
    sweep.output.mkdir()
    (sweep.output / name).mkdir() if kind == "file" else (sweep.output / name).touch()

    with refused(ConfigError, f"no {kind}", key="output", place=str(sweep.output / name)):
        carry_out(sweep, pytest.fail, print)


def test_a_run_that_an_earlier_sweep_has_left_behind_is_waited_for_though_it_is_still_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "console.log").open("ab") as lock:
        runs._wait_until_free(tmp_path, lock)
        left_behind = subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        left_behind.kill()
        left_behind.wait()

    monkeypatch.setattr("time.sleep", wait)
    with (tmp_path / "console.log").open("ab") as lock:
        runs._wait_until_free(tmp_path, lock)
    assert len(waits) == 1


def test_what_a_run_has_started_itself_does_not_keep_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = tmp_path / "starting"
    starting.write_text(
        f"#!{sys.executable} -S\nimport subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
    )
    starting.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(starting))
    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("waits for it")))

    ends = [runs.in_a_process(tmp_path, lambda: False) for _ in range(2)]

    for code, pid in ends:
        assert code == 0
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("only_shown", [False, True])
def test_results_that_cannot_be_written_are_shown_and_an_error_only_where_they_are_to_be_written(
    only_shown: bool, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta))
    words = ["sweep", str(write(seeds=2))]
    assert cli.main(words) == 0

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("mlx_cpo_plugin.atomic_files.flush", full)

    assert cli.main([*words, *["--no-more-runs"] * only_shown]) == (0 if only_shown else 2)

    printed = capsys.readouterr()
    assert "| before training |" in printed.out
    assert "/table.md cannot be written (No space left" in (printed.out if only_shown else printed.err)


def test_nobody_who_reads_is_no_reason_to_lose_the_results(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta))
    monkeypatch.setattr("sys.stdout", Closed())
    cli.main(["sweep", str(write(seeds=2, output=str(tmp_path / "unread")))])

    assert (tmp_path / "unread" / "best.yaml").exists()


def test_where_no_run_finishes_the_command_says_why(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "in_a_process", Pretended(by_beta, fails=[1, 2]))

    assert cli.main(["sweep", str(write(seeds=2))]) == 2

    assert "the device is out of memory" in capsys.readouterr().err


def test_a_metric_whose_scale_differs_between_runs_is_noted(write: Callable[..., Path]) -> None:
    assert "beta" in "".join(read_sweep(write(grid={"beta": [0.1, 0.2]}, metric="loss")).notes)
    assert not read_sweep(write(grid={"beta": [0.1, 0.2]}, metric="nll")).notes
    assert not read_sweep(write(grid={"learning_rate": [0.1, 0.2]}, metric="loss")).notes


@pytest.mark.slow
def test_a_sweep_trains_as_the_host_does_and_a_stopped_one_goes_on_to_the_bit(
    write: Callable[..., Path], base: dict[str, Any], tmp_path: Path, run_main: Callable[..., None]
) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    base |= {"steps_per_eval": 2, "iters": 6, "val_batches": -1}
    file = write(grid={"learning_rate": [1e-3, 3.0]}, halve_at=0.3, metric="nll")

    ended = Prepared(run_module, "mlx_cpo_plugin", "sweep", str(file), output=tmp_path / "told").ended()

    assert ended.code == 0, ended.told
    assert "given up" in ended.printed
    best = tmp_path / "sweep" / "best.yaml"
    adapter = re.search(r"^Adapter: (.*)$", ended.printed, flags=re.MULTILINE)
    assert adapter
    run_main({"config": str(best), "adapter_path": str(tmp_path / "again")})
    files = [Path(folder) / "adapters.safetensors" for folder in (adapter[1], tmp_path / "again")]
    assert saved_arrays(files[0]) == saved_arrays(files[1])
    assert json.loads((Path(adapter[1]) / RESULT).read_text())["status"] == FINISHED
