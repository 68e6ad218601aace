"""What a pass costs beside its tokens is measured once for a long run, kept, recorded, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.resumable_runs import policy, stopped, train
from support.tiny import assert_same, build_pairs

from mlx_cpo_plugin.atomic_files import cache_folder
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training import calibration
from mlx_cpo_plugin.training.objective import objective_for


class Device:
    """Takes ``start + tokens * by_token`` seconds for a pass, and longer for the first of each length."""

    def __init__(self, start: float, by_token: float, first: float = 0.0) -> None:
        self.start, self.by_token, self.first = start, by_token, first
        self.passes: list[int] = []

    def seconds_of(self, tokens: int) -> float:
        compiling = 0.0 if tokens in self.passes else self.first
        self.passes.append(tokens)
        return self.start + tokens * self.by_token + compiling


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / calibration.FILE


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is long enough."""
    monkeypatch.setattr(calibration, "LEAST_WORK", 0)


def scorer_of(model: nn.Module) -> SharedPromptScorer:
    scorer = choose_scorer(model, build_pairs(4), "shared")
    assert scorer is not None
    return scorer


def recorded(folder: Path) -> object:
    return yaml.safe_load((folder / "run_settings.yaml").read_text()).get("pass_overhead")


@given(st.floats(10, 4000), st.floats(1e-7, 2e-4), st.sampled_from([0.0, 2.0]))
def test_of_a_time_with_a_constant_part_it_is_this_part_in_tokens(
    overhead: float, by_token: float, first: float
) -> None:
    found = calibration.measured(Device(overhead * by_token, by_token, first).seconds_of)

    assert found is not None
    assert 2**-0.27 < found / overhead < 2**0.27


def test_where_more_tokens_take_no_longer_as_many_as_possible_are_to_share_a_pass() -> None:
    assert calibration.measured(Device(0.01, 0.0).seconds_of) == 8192


def test_where_few_tokens_take_long_or_no_more_have_room_it_is_not_known() -> None:
    slow = Device(10.0, 0.1)

    assert calibration.measured(slow.seconds_of) is None
    assert set(slow.passes) == {16}
    assert len(slow.passes) == 2
    assert calibration.measured(Device(0.01, 0.001).seconds_of, sizes=(16,)) is None


def test_it_is_measured_with_the_model_once_and_leaves_no_trace_there(cache: Path) -> None:
    model, objective = policy(), objective_for("sigmoid", {"beta": 0.1})
    model.train()
    scorer, random = scorer_of(model), [key.tolist() for key in mx.random.state]
    grouping = scorer.grouping

    def overhead(clock: Callable[[], float]) -> int | None:
        return calibration.overhead(model, objective, scorer, build_pairs(4), compiled=False, most=300, clock=clock)

    cache.parent.mkdir(parents=True)
    cache.write_text("torn")
    found = overhead(iter(np.cumsum(np.arange(1000)) * 1e-5).__next__)  # each reading is later by more
    assert found is not None
    assert overhead(lambda: pytest.fail("measured again")) == found
    assert json.loads(cache.read_text()) == {calibration._key(model, False): found}

    assert model.training
    assert scorer.grouping is grouping
    assert [key.tolist() for key in mx.random.state] == random


def test_another_model_or_way_to_compute_is_another_measurement() -> None:
    keys = {calibration._key(policy(), compiled) for compiled in (False, True)}
    frozen = policy()
    frozen.freeze()

    assert len(keys | {calibration._key(frozen, False)}) == 3
    assert calibration._key(policy(), False) in keys


def test_a_long_run_records_what_it_measured_and_goes_on_with_it(
    always: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "overhead", lambda *_, **__: 16)
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "run", 5)
    assert "pass_overhead: 16" in capsys.readouterr().out
    monkeypatch.setattr(calibration, "overhead", lambda *_, **__: pytest.fail("a resumed run measures nothing"))

    assert_same(train(tmp_path / "run", resume="auto"), whole)
    assert recorded(tmp_path / "run") == recorded(tmp_path / "whole") == 16


def test_the_setting_goes_before_a_measurement_and_a_short_run_takes_neither(
    always: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "overhead", lambda *_, **__: pytest.fail("nothing is to be measured"))
    train(tmp_path / "given", pass_overhead=3)
    monkeypatch.setattr(calibration, "LEAST_WORK", 1e14)
    train(tmp_path / "short")

    assert recorded(tmp_path / "given") == 3
    assert recorded(tmp_path / "short") is None
