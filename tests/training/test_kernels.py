"""A run with the compiled kernels goes on as it began, and runs that they do not suit go without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.optimizers import SGD
from support import faulty_ranks
from support.resumable_runs import metrics, stopped, train
from support.tiny import add_adapter, assert_same, build_model, build_pairs, saved_arrays

from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.training import wiring
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.gradients import gradients_for
from mlx_cpo_plugin.training.objective import objective_for

USED = "Compiled kernels compute"


def test_an_interrupted_run_ends_like_one_that_was_not(
    kernels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole")
    assert USED in capsys.readouterr().out
    stopped(tmp_path / "run", 5)

    assert_same(train(tmp_path / "run", resume="auto"), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_run_that_began_without_goes_on_without(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(library.VARIABLE, library.NONE)
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "run", 5)
    monkeypatch.setenv(library.VARIABLE, library.ALWAYS)

    assert_same(train(tmp_path / "run", resume="auto"), whole)
    assert USED not in capsys.readouterr().out


def test_a_run_that_began_with_them_says_that_they_are_gone(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole", model=add_adapter(build_model()))
    stopped(tmp_path / "run", 5, model=add_adapter(build_model()))
    capsys.readouterr()
    monkeypatch.setenv(library.VARIABLE, library.NONE)

    assert_same(train(tmp_path / "run", model=add_adapter(build_model()), resume="auto"), whole, 1e-2)
    assert "not available here" in "".join(capsys.readouterr())


def test_a_run_that_another_version_began_says_that_its_bits_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(wiring, "ARITHMETIC", wiring.ARITHMETIC - 1)
        stopped(tmp_path / "run", 5)
        train(tmp_path / "run", resume="auto", iters=6)
        assert "another version" not in "".join(capsys.readouterr())

    train(tmp_path / "run", resume="auto")
    assert "another version" in "".join(capsys.readouterr())


def test_with_and_without_them_a_run_learns_the_same(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for value in (library.ALWAYS, library.NONE):
        monkeypatch.setenv(library.VARIABLE, value)
        found.append(train(tmp_path / value, model=add_adapter(build_model()), iters=3, gradient_accumulation_steps=1))

    assert_same(*found, 1e-3)


@pytest.mark.parametrize("arguments", [{"grad_checkpoint": True}, {"seq_step_size": 5}])
def test_what_saves_memory_has_the_same_results(
    arguments: dict[str, object], kernels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, **given: object) -> dict[str, object]:
        return train(tmp_path / name, model=add_adapter(build_model()), iters=3, gradient_accumulation_steps=1, **given)

    plain = run("plain")
    capsys.readouterr()
    assert_same(run("saving", **arguments), plain, 1e-3)
    assert USED in capsys.readouterr().out


def test_checkpointing_saves_memory_of_pairs_in_one_row(kernels: None) -> None:
    model = add_adapter(build_model(hidden_size=64, intermediate_size=256, num_hidden_layers=12))
    pairs = build_pairs(8)
    peaks = []
    for grad_checkpoint in (False, True):
        with (
            wiring.training_environment(model, CPOTrainingArgs(grad_checkpoint=grad_checkpoint)),
            compiled_kernels(model),
        ):
            scorer = choose_scorer(model, pairs, "shared")
            assert scorer is not None
            assert scorer.packs
            method = gradients_for(model, objective_for("sigmoid", {}), scorer, pairs)
            mx.eval(method(pairs, StepTotals.of(pairs)))
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(method(pairs, StepTotals.of(pairs)))
            peaks.append(mx.get_peak_memory() - before)

    assert peaks[1] < 0.6 * peaks[0]


QAT = {"qat_enable": True, "qat_bits": 4, "qat_group_size": 32, "qat_start_step": 2, "qat_interval": 2}


def test_an_interrupted_run_with_fake_quantisation_ends_like_one_that_was_not(
    kernels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole", **QAT)
    assert USED in capsys.readouterr().out
    stopped(tmp_path / "run", 5, **QAT)

    assert_same(train(tmp_path / "run", resume="auto", **QAT), whole)
    assert any((whole[name] != value).any() for name, value in train(tmp_path / "without").items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [{}, {"dora": True}], ids=str)
@pytest.mark.parametrize("packing", [{}, {"qat_bits": 3}, {"qat_quantizer": "host"}], ids=str)
def test_with_and_without_them_a_run_with_fake_quantisation_learns_the_same(
    packing: dict[str, object],
    adapter: dict[str, Any],
    tied: bool,
    kernels: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for value in (library.ALWAYS, library.NONE):
        monkeypatch.setenv(library.VARIABLE, value)
        model = add_adapter(build_model(tie_word_embeddings=tied), **adapter)
        arguments = {**QAT, **packing, "qat_start_step": 1, "qat_interval": 1}
        found.append(train(tmp_path / value, model=model, optimizer=SGD(0.05), iters=6, **arguments))

    assert_same(*found, 1e-3)


@pytest.mark.parametrize("case", ["full", "compiled"])
def test_runs_that_they_do_not_suit_go_without(
    case: str, kernels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model() if case == "full" else add_adapter(build_model())
    arguments = {"full": {}, "compiled": {"compile": True}}[case]

    train(tmp_path, model=model, iters=1, gradient_accumulation_steps=1, **arguments)

    assert USED not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_train_with_them_to_the_same_bits_each_time(kernels: None, tmp_path: Path) -> None:
    adapters = []
    for name in ("first", "second"):
        ranks = faulty_ranks.train(tmp_path / name)
        assert [rank.code for rank in ranks] == [0, 0]
        assert USED in ranks[0].printed
        adapters.append(saved_arrays(tmp_path / name / "adapters.safetensors"))

    assert adapters[0] == adapters[1]
