"""``mlx-cpo bench``: both trainers on the same work, each in its own processes, and what is said about them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.prepared import Prepared, run_module
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.bench import cases, compare, growth, plots, report, runs, worker
from mlx_cpo_plugin.bench.cases import Case, case_of_config, case_of_shape, load_pairs, save_pairs
from mlx_cpo_plugin.bench.compare import Comparison, GradientDifferences, TrainerResult
from mlx_cpo_plugin.bench.job import HOST, PLUGIN, REFERENCE, TRL, Job, Measurement, gradient_file
from mlx_cpo_plugin.bench.reference_gradient import ReferenceLoss, reference_gradient
from mlx_cpo_plugin.bench.runs import MeasurementError, Runs, run_worker
from mlx_cpo_plugin.bench.shapes import Shape, parse_shape
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, UserError
from mlx_cpo_plugin.json_output import check_json
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.selftest import float64_gradient
from mlx_cpo_plugin.termination import stopped_by_termination
from mlx_cpo_plugin.training.objective import objective_for

TINY = Shape(prompt=20, chosen=9, rejected=6, batch=2, vocabulary=80, hidden=64, layers=2)
LONG = Shape(prompt=560, chosen=8, rejected=6, batch=1, vocabulary=80, hidden=64, layers=1, long=True)


def quiet(text: str) -> None:
    """Takes progress and says nothing."""


@pytest.fixture
def prepared_workers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measured processes are ones that start quickly, but for those whose folder has one of these names."""
    started: list[str] = []

    def work(command: Sequence[str], environment: dict[str, str], progress: Callable[[str], None]) -> None:
        _, _, module, folder = command
        if Path(folder).name in started:
            run_worker(command, environment, progress)
            return
        ended = Prepared(run_module, module, folder, output=Path(folder) / "told", **environment).ended()
        if ended.code:
            raise MeasurementError(ended.told)

    monkeypatch.setattr(runs, "run_worker", work)
    return started


def measured(shape: Shape) -> Comparison:
    """The shortest real measurement of a shape."""
    return compare.compare(case_of_shape(shape), iterations=1, repeats=1, say=quiet)


class TestShapes:
    @given(
        st.builds(
            Shape,
            *[st.integers(1, 5000)] * 4,
            vocabulary=st.integers(2, 300_000),
            hidden=st.integers(1, 64).map(lambda heads: heads * 64),
            layers=st.integers(1, 99),
            long=st.booleans(),
            architecture=st.sampled_from(["llama", "qwen3"]),
            dtype=st.sampled_from(["float32", "bfloat16"]),
            bits=st.sampled_from([0, 4]),
        )
    )
    def test_the_text_of_a_shape_makes_the_same_shape(self, shape: Shape) -> None:
        assert parse_shape(str(shape)) == shape

    @given(st.permutations(["P256", "C128", "R96", "B2", "long", "qwen3"]))
    def test_parts_may_stand_in_any_order(self, words: list[str]) -> None:
        assert parse_shape(",".join(words)) == Shape(256, 128, 96, 2, long=True, architecture="qwen3")

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("P256,C128", "has no R; write it like"),
            ("P256,C128,R96,X2", "'X2' is none of P (prompt)"),
            ("P256,C128,R96,", "'' is none of"),
            ("P256,C128,R96,P1", "P1 gives prompt a second time"),
            ("P256,C0,R96", "C0 must be at least 1"),
            ("P256,C128,R96,H100", "H100 must be a multiple of 64"),
            ("P256,C128,R96,V1", "V1 must be at least 2"),
        ],
    )
    def test_a_mistake_is_named(self, text: str, complaint: str) -> None:
        with pytest.raises(ConfigError) as raised:
            parse_shape(text)

        assert complaint in str(raised.value)
        assert text in str(raised.value)

    def test_random_pairs_have_the_lengths_and_answers_that_differ_from_their_first_token_on(self) -> None:
        shape = replace(TINY, vocabulary=2)

        pairs = shape.pairs(50)

        assert {(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs} == {(20, 9, 6)}
        assert all(pair.chosen[0] != pair.rejected[0] for pair in pairs)
        assert all((pair.prompt == again.prompt).all() for pair, again in zip(pairs, shape.pairs(50), strict=True))


def test_pairs_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    pairs = build_pairs(7)
    pairs[3].chosen_scored[0] = False

    save_pairs(tmp_path / "pairs.npz", pairs)

    for pair, loaded in zip(pairs, load_pairs(tmp_path / "pairs.npz"), strict=True):
        for part in ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored"):
            assert np.array_equal(getattr(pair, part), getattr(loaded, part))
            assert getattr(pair, part).dtype == getattr(loaded, part).dtype


@pytest.mark.slow
class TestMeasuring:
    def test_a_config_is_measured_from_end_to_end(
        self, settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], prepared_workers: list[str]
    ) -> None:
        prepared_workers.append(f"{HOST}, count")
        config, figures = tmp_path / "my.yaml", tmp_path / "figures.json"
        plugin_only = {"cpo_alpha": 0.5, "label_smoothing": 0.1}
        config.write_text(yaml.safe_dump(settings | plugin_only | {"gradient_accumulation_steps": 4, "test": True}))
        words = ["--config", str(config), "--rows", "6", "--iters", "2", "--repeats", "1", "--json", str(figures)]

        assert cli.main(["bench", *words]) == 0

        printed = capfd.readouterr()
        assert f"{config}: {HOST}, count" in printed.err
        (case,) = json.loads(figures.read_text())["cases"]
        assert case["rows"] == 6
        assert case["gradient_difference"]["reference"] == REFERENCE
        assert 0 < case["gradient_difference"]["host"] < 1e-5
        assert 0 < case["gradient_difference"]["plugin"] < 1e-5
        for trainer in ("host", "plugin"):
            assert np.shape(case[trainer]["seconds"]) == (1, 2)
            assert case[trainer]["pairs"] == [2, 2]
            assert 0 < case[trainer]["peak_memory"] < case[trainer]["peak_resident"]
        # The host pads both answers of the second batch to the longest of them, and leaves out the last token.
        read = case_of_config(config, 6)
        batch = [read.pairs[index] for index in read.batches(2)[1]]
        expected = 2 * len(batch) * (max(pair.length for pair in batch) - 1)
        assert case["host"]["backbone_tokens"] == case["host"]["head_positions"] == expected
        assert 0 < case["plugin"]["backbone_tokens"] <= expected + 2 * len(batch) * 32
        assert f"{case['speed_ratio']:.2f} x as fast" in printed.out
        assert (
            "dropout, gradient accumulation, max_grad_norm, fake quantisation, cpo_alpha and label_smoothing are off"
            in printed.out
        )

    def test_rows_that_differ_between_the_two_are_noticed(self, prepared_workers: list[str]) -> None:
        class Reordered(Case):
            def batches(self, iterations: int) -> list[list[int]]:
                return super().batches(iterations)[::-1]

        case = case_of_shape(replace(TINY, batch=1))
        mixed = Reordered(case.name, case.settings, build_pairs(4, vocabulary=80), case.model_config)

        with pytest.raises(MeasurementError, match="did not train on the same rows"):
            compare.compare(mixed, iterations=2, repeats=1, say=quiet)

    def test_long_context_is_held_against_the_gradient_of_the_whole_pair(self, prepared_workers: list[str]) -> None:
        comparison = measured(replace(LONG, architecture="qwen3"))

        assert comparison.gradients.plugin is not None
        assert comparison.gradients.plugin < 1e-5
        assert comparison.gradients.host is not None
        assert comparison.gradients.host > 0.01

    def test_a_shape_has_the_work_of_arithmetic_and_where_the_hosts_long_context_fails_it_runs_without(
        self, prepared_workers: list[str]
    ) -> None:
        comparison = measured(LONG)

        assert comparison.gradients.plugin is not None
        assert comparison.gradients.plugin < 1e-5
        assert comparison.host.backbone_tokens == 2 * (560 + 8 - 1)
        assert comparison.lengths == {"prompt": 560, "chosen": 8, "rejected": 6}
        # The layer: queries and output 64 x 64, keys and values 64 x 64 on the one head, three of 64 x 170, two norms.
        layer = 4 * 64 * 64 + 3 * 64 * 170 + 2 * 64
        assert comparison.least_work == 4 * (574 * layer + 14 * 80 * 64)
        assert any("runs without efficient_long_context" in note for note in comparison.notes)

    def test_a_process_that_fails_is_quoted(self, tmp_path: Path) -> None:
        with pytest.raises(MeasurementError, match=r"failed with exit code 1: FileNotFoundError.*job\.json"):
            run_worker([sys.executable, "-c", "open('job.json')", str(tmp_path)], {}, quiet)

    def test_a_process_that_is_killed_hints_at_memory(self, tmp_path: Path) -> None:
        script = tmp_path / "killed"
        script.write_text("#!/bin/sh\nkill -9 $$\n")
        script.chmod(0o755)

        with pytest.raises(MeasurementError, match="ended by signal 9, most likely out of memory"):
            run_worker([str(script), str(tmp_path)], {}, quiet)


@pytest.mark.slow
def test_sigterm_ends_the_process_that_is_being_measured_too() -> None:
    command = [sys.executable, "-m", "mlx_cpo_plugin", "bench", "--shape", "P512,C256,R256,B4", "--iters", "50"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as bench:
        assert bench.stderr is not None
        assert "mlx-lm-lora, count" in bench.stderr.readline()
        while subprocess.run(["pgrep", "-P", str(bench.pid)], stdout=subprocess.DEVNULL, check=False).returncode:
            assert bench.poll() is None
        bench.terminate()
        returncode = bench.wait(timeout=60)

    assert returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(bench.pid, 0)


def test_sigterm_while_a_process_is_started_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = subprocess.Popen._execute_child  # type: ignore[attr-defined]  # within which no other code runs

    def interrupted(process: subprocess.Popen[str], *given: Any) -> None:
        start(process, *given)
        started.append(process.pid)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", interrupted)
    with pytest.raises(SystemExit), stopped_by_termination():
        run_worker(["sleep", "60"], {}, quiet)

    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def mean_loss(model: nn.Module, pairs: Sequence[PreferencePair], loss_type: str, options: dict[str, float]) -> float:
    """The mean of the registered loss from float64 logits, all but the forward pass in numpy."""
    objective = objective_for(loss_type, options)

    def logp(pair: PreferencePair, answer: np.ndarray) -> float:
        with mx.stream(mx.cpu):
            logits = np.array(model(mx.array(np.concatenate([pair.prompt, answer]))[None])[0])
        logits = logits[len(pair.prompt) - 1 : -1]
        logps = logits[np.arange(len(answer)), answer] - np.log(np.exp(logits).sum(-1))
        return float(logps.mean() if objective.length_normalised else logps.sum())

    scores = [[logp(pair, pair.chosen) for pair in pairs], [logp(pair, pair.rejected) for pair in pairs]]
    with mx.stream(mx.cpu):
        return float(objective.fn(*(mx.array(side, dtype=mx.float64) for side in scores), **objective.options).mean())


class TestReference:
    @pytest.mark.parametrize("loss_type", cases.HOST_LOSSES)
    def test_the_loss_falls_along_the_gradient_as_fast_as_the_gradient_is_long(self, loss_type: str) -> None:
        model, pairs, options = add_adapter(build_model()), build_pairs(3, seed=1), {"beta": 0.3, "delta": 5.0}
        step = 1e-3

        gradient = reference_gradient(model, pairs, ReferenceLoss(loss_type, **options), finished=lambda _: None)

        values = {name: np.array(value) for name, value in gradient.items()}
        length = np.sqrt(sum(np.square(value).sum() for value in values.values()))
        start = {name: np.array(value) for name, value in by_name(model.trainable_parameters()).items()}
        losses = []
        for way in (step, -step):
            moved = {name: start[name] + way * value / length for name, value in values.items()}
            model.load_weights(
                [(name, mx.array(value, dtype=mx.float64)) for name, value in moved.items()], strict=False
            )
            losses.append(mean_loss(model, pairs, loss_type, options))
        assert length > 0
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(length, rel=3e-4)

    def test_tokens_that_are_not_scored_do_not_count(self) -> None:
        (pair,) = build_pairs(1, seed=3)
        cut = replace(pair, chosen=pair.chosen[:-1], chosen_scored=pair.chosen_scored[:-1])
        pair.chosen_scored[-1] = False

        whole, shorter = (
            reference_gradient(add_adapter(build_model()), [each], ReferenceLoss("ipo", 0.1, 0.0), lambda _: None)
            for each in (pair, cut)
        )

        for name, value in whole.items():
            assert np.allclose(np.array(value), np.array(shorter[name]), rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("loss_type", cases.HOST_LOSSES)
    @pytest.mark.parametrize("gap", [-20.0, -1.0, 0.5, 3.0, 4.0, 20.0])
    def test_the_slope_is_that_of_the_registered_loss(self, loss_type: str, gap: float) -> None:
        options = {"beta": 0.3, "delta": 5.0}
        objective = objective_for(loss_type, options)

        slope = ReferenceLoss(loss_type, **options).slope(gap)

        registered = mx.grad(lambda chosen: objective.fn(chosen, mx.zeros(1), **objective.options).sum())
        assert slope == pytest.approx(registered(mx.array([gap])).item(), rel=1e-5)

    def test_the_slope_of_a_hopeless_pair_is_finite(self) -> None:
        assert ReferenceLoss("sigmoid", 1.0, 0.0).slope(-1e5) == -1.0
        assert ReferenceLoss("sigmoid", 1.0, 0.0).slope(1e5) == 0.0

    def test_quantised_weights_are_refused(self) -> None:
        model = build_model()
        nn.quantize(model, group_size=32, bits=4)

        with pytest.raises(ValueError, match="quantised"):
            float64_gradient.convert(model)

    def test_a_model_that_memory_would_not_hold_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(float64_gradient, "physical_memory", lambda: 10_000)

        with pytest.raises(ValueError, match="more than the memory of this machine"):
            float64_gradient.convert(build_model())

    def test_a_model_that_leaves_float64_is_refused(self) -> None:
        class Leaving(type(build_model())):  # type: ignore[misc]  # the class of the tiny model
            def __call__(self, tokens: mx.array) -> mx.array:
                return super().__call__(tokens).astype(mx.float32)

        model = build_model()
        model.__class__ = Leaving

        with pytest.raises(ValueError, match=r"turns float64 into mlx\.core\.float32"):
            reference_gradient(model, build_pairs(1), ReferenceLoss("sigmoid", 0.1, 0.0), lambda _: None)


@pytest.fixture
def gradients_of_workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float] | None]:
    """What each worker leaves as its gradient, by the beginning of its folder's name; ``None``: the worker fails."""
    gradients: dict[str, list[float] | None] = {}

    def work(command: Sequence[str], environment: dict[str, str], progress: Callable[[str], None]) -> None:
        folder = Path(command[-1])
        (gradient,) = [gradients[name] for name in gradients if folder.name == name]
        if gradient is None:
            raise MeasurementError(f"{folder.name} failed.")
        progress("1")
        mx.save_safetensors(str(gradient_file(folder)), {"weight": mx.array(gradient)})
        Measurement([1.0, 1.0], [1.0, 1.0], [9, 9], 1, 1).save(folder)

    for trainer in (HOST, PLUGIN):
        gradients |= {f"{trainer}, count": [3.0, 4.0], f"{trainer}, time 1 of 1": [0.0]}
    gradients[f"{REFERENCE}, {compare.REFERENCE_TASK}"] = [3.0, 4.0]
    monkeypatch.setattr(runs, "run_worker", work)
    return gradients


@pytest.mark.parametrize("trainer", [HOST, PLUGIN])
def test_both_trainers_multiply_with_the_same_blas(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(trainer, "time", {}, None, [], "").save(tmp_path)
    steps: list[str] = []
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    monkeypatch.setattr(worker, "use_fast_blas", lambda: steps.append("blas"))

    def measure(job: Job, folder: Path) -> Any:
        steps.append(job.trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        worker.main()

    assert steps == ["blas", trainer]


class TestGradientDifferences:
    @pytest.mark.parametrize(
        ("at_fault", "expected"),
        [(HOST, GradientDifferences(REFERENCE, 0.2, 0.0)), (PLUGIN, GradientDifferences(REFERENCE, 0.0, 0.2))],
    )
    def test_a_wrong_gradient_is_told_of_the_trainer_that_is_at_fault(
        self, gradients_of_workers: dict[str, list[float] | None], at_fault: str, expected: GradientDifferences
    ) -> None:
        gradients_of_workers[f"{at_fault}, count"] = [3.0, 5.0]

        comparison = measured(TINY)

        assert comparison.gradients == expected
        assert comparison.notes == ()

    def test_without_float64_the_host_is_the_reference_and_a_note_says_so(
        self, gradients_of_workers: dict[str, list[float] | None]
    ) -> None:
        gradients_of_workers[f"{REFERENCE}, {compare.REFERENCE_TASK}"] = None
        gradients_of_workers[f"{PLUGIN}, count"] = [3.0, 5.0]

        comparison = measured(TINY)

        assert comparison.gradients == GradientDifferences(HOST, None, 0.2)
        assert comparison.gradients.host_is_reference
        assert any("could not be computed in float64" in note for note in comparison.notes)
        assert "the gradient is compared with that of mlx-lm-lora" in comparison.notes

    def test_without_float64_long_context_is_held_against_a_host_that_takes_whole_pairs(
        self, gradients_of_workers: dict[str, list[float] | None]
    ) -> None:
        gradients_of_workers[f"{REFERENCE}, {compare.REFERENCE_TASK}"] = None
        gradients_of_workers[f"{HOST}, count"] = [0.0, 4.0]
        gradients_of_workers[f"{HOST}, count without efficient_long_context"] = [3.0, 4.0]

        comparison = measured(LONG)

        assert comparison.gradients == GradientDifferences(HOST, 0.6, 0.0)
        assert not comparison.gradients.host_is_reference

    def test_without_float64_and_without_whole_pairs_nothing_is_known(
        self, gradients_of_workers: dict[str, list[float] | None]
    ) -> None:
        gradients_of_workers[f"{REFERENCE}, {compare.REFERENCE_TASK}"] = None
        gradients_of_workers[f"{HOST}, count without efficient_long_context"] = None

        comparison = measured(LONG)

        assert comparison.gradients == GradientDifferences(None, None, None)
        assert any("no gradient to compare with" in note for note in comparison.notes)

    def test_progress_counts_the_pairs_of_the_reference(
        self, gradients_of_workers: dict[str, list[float] | None]
    ) -> None:
        said: list[str] = []

        compare.compare(case_of_shape(TINY), iterations=1, repeats=1, say=said.append)

        assert f"{TINY.title}: {REFERENCE}, gradient of the first batch, pair 1 of 2" in said

    @pytest.mark.slow
    def test_a_quantised_model_is_measured_against_the_host(
        self, settings: dict[str, Any], tmp_path: Path, prepared_workers: list[str]
    ) -> None:
        model, config = quantised_copy(Path(settings["model"]), tmp_path / "model"), tmp_path / "my.yaml"
        config.write_text(yaml.safe_dump(settings | {"model": str(model)}))

        comparison = compare.compare(case_of_config(config, 4), iterations=1, repeats=1, say=quiet)

        assert comparison.gradients.host_is_reference
        assert comparison.gradients.plugin is not None
        assert comparison.gradients.plugin < 1e-5
        assert any("the model has quantised weights" in note for note in comparison.notes)


def quantised_copy(folder: Path, target: Path) -> Path:
    """A model folder with weights of 4 bits."""
    from mlx_lm.convert import convert

    convert(str(folder), str(target), quantize=True, q_group_size=32, q_bits=4)
    return target


class TestCases:
    def test_pairs_with_tokens_that_only_one_trainer_would_score_are_left_out(
        self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pairs = build_pairs(5)
        pairs[1].rejected_scored[:1] = False
        monkeypatch.setattr(cases, "load_dataset", lambda *_: (pairs, [], []))
        config = tmp_path / "my.yaml"
        config.write_text(yaml.safe_dump(settings))

        case = case_of_config(config, None)

        assert list(case.pairs) == [pairs[0], *pairs[2:]]
        assert any(note.startswith("1 pairs left out") for note in case.notes)

    def test_what_needs_validation_or_changes_the_gradient_is_off(
        self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cases, "load_dataset", lambda *_: (build_pairs(4), [], []))
        config = tmp_path / "my.yaml"
        more = {"load_best": True, "early_stopping_patience": 2, "steps_per_eval": 5, "max_grad_norm": 0.01}
        config.write_text(yaml.safe_dump({**settings, **more}))

        resolved = case_of_config(config, None).settings

        assert not resolved.load_best
        assert (resolved.save_best, resolved.early_stopping_patience, resolved.max_grad_norm) == (None, None, None)

    def test_a_loss_that_the_host_lacks_is_refused(
        self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cases, "HOST_LOSSES", ("hinge",))
        config = tmp_path / "my.yaml"
        config.write_text(yaml.safe_dump(settings))

        with pytest.raises(ConfigError, match="has no loss 'sigmoid' to compare with"):
            case_of_config(config, None)

    def test_the_suite_adds_real_rows_where_model_and_data_are_given(self, shared: Path, tmp_path: Path) -> None:
        for name, _ in cases.REAL_SUITE:
            lines = (shared / "data" / name).read_text(encoding="utf-8").splitlines()
            (tmp_path / name).write_text("\n".join(lines[:40]), encoding="utf-8")

        alone = cases.suite(None, None, rows=2)
        with_real_rows = cases.suite(shared / "models" / "stories260k-chat", tmp_path, rows=20)

        assert len(with_real_rows) == len(alone) + 2
        assert [len(case.pairs) for case in alone] == [2] * len(alone)
        assert all(case.model_config is None and case.pairs for case in with_real_rows[len(alone) :])

    def test_the_suite_wants_both_model_and_data(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="belong together"):
            cases.suite(tmp_path, None, rows=2)


@pytest.fixture
def comparison() -> Comparison:
    """A host that takes twice the seconds and four times the memory."""
    host = TrainerResult([[2.0, 4.0], [2.0, 2.0]], [[3.0, 6.0], [3.0, 3.0]], [1, 2], 4_000_000, 9_000_000, 200, 200, 2)
    plugin = TrainerResult([[1.0, 2.0], [1.0, 1.0]], [[2.0, 4.0], [2.0, 2.0]], [1, 2], 1_000_000, 3_000_000, 120, 60, 2)
    lengths = {"prompt": 20.0, "chosen": 9.0, "rejected": 6.0}
    gradients = GradientDifferences(REFERENCE, 1.5e-4, 2.5e-7)
    return Comparison(case_of_shape(TINY), host, plugin, 2, 2, lengths, 3e9, gradients, ("this was patched",))


class TestReport:
    def test_the_table_has_every_figure_of_both_trainers(self, comparison: Comparison) -> None:
        lines = report.table(comparison).splitlines()

        assert lines[0] == TINY.title
        words = {line.strip().split("  ")[0]: line.split() for line in lines}
        spreads = {label: " ".join(line) for label, line in words.items()}
        assert spreads["seconds per pair"] == "seconds per pair 2 (1 to 2) 1 (0.5 to 1) 2.00 x as fast"
        assert spreads["processor seconds per pair"].endswith(" 3 (1.5 to 3) 2 (1 to 2) 1.50 x as fast")
        assert words["peak memory, MB"][-3:] == ["4", "1", "0.25"]
        assert words["tokens through layers, a pair"][-3:] == ["100", "60", "0.60"]
        assert words["positions through head, a pair"][-3:] == ["100", "30", "0.30"]
        # Six pairs in ten seconds, and in five.
        assert words["needed GFLOP/s"][-3:] == ["1.8", "3.6", "2.00"]
        assert spreads["gradient differs by"] == "gradient differs by 1.5e-04 2.5e-07 relative to float64"
        assert lines[-2:] == [f"  processor: {report.processor_name()}", "  note: this was patched"]

    def test_what_is_not_known_is_called_unknown(self, comparison: Comparison) -> None:
        unknown = GradientDifferences(None, None, None)

        text = report.table(replace(comparison, least_work=None, gradients=unknown))

        (line,) = [line for line in text.splitlines() if "gradient differs by" in line]
        assert line.split()[-2:] == ["unknown", "unknown"]
        assert "GFLOP" not in text

    def test_a_host_that_is_itself_the_reference_has_no_difference(self, comparison: Comparison) -> None:
        text = report.table(replace(comparison, gradients=GradientDifferences(HOST, None, 2.5e-7)))

        (line,) = [line for line in text.splitlines() if "gradient differs by" in line]
        assert line.split() == f"gradient differs by reference 2.5e-07 relative to {HOST}".split()

    def test_a_head_that_no_one_watched_has_no_share(self, comparison: Comparison) -> None:
        unseen = replace(comparison.host, head_positions=0)

        text = report.table(replace(comparison, host=unseen, plugin=unseen))

        (line,) = [line for line in text.splitlines() if "positions through head" in line]
        assert line.split()[-3:] == ["0", "0", "unknown"]

    def test_the_summary_has_a_line_for_each_case(self, comparison: Comparison) -> None:
        lines = report.summary([comparison, comparison]).splitlines()

        assert lines[1:] == [f"{TINY.title}     2.00x    0.25    0.60    0.30   2.5e-07"] * 2

    def test_json_holds_the_figures_the_settings_and_the_failures(self, comparison: Comparison) -> None:
        written = json.loads(report.as_json([comparison], {"other": "too large"}))

        (case,) = written["cases"]
        assert case["speed_ratio"] == 2.0
        assert case["host"]["seconds_per_pair"] == {"median": 2.0, "least": 1.0, "most": 2.0}
        assert case["settings"]["batch_size"] == 2
        assert case["gradient_difference"] == {"reference": "float64", "host": 1.5e-4, "plugin": 2.5e-7}
        assert written["failures"] == {"other": "too large"}
        assert written["environment"]["mlx-lm-lora"]


class TestCommand:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--shape", "P3"], "has no C and no R"),
            (["--shape", "P3,C2,R2", "--model", "m"], "--model and --data belong to --suite"),
            (["--shape", "P3,C2,R2", "--json", "no/such/folder/file.json"], "there is no folder no/such/folder"),
            (["--shape", "P3,C2,R2", "--json", "/"], "--json '/' is a folder"),
            (["--config", "missing.yaml"], "missing.yaml"),
            (["--growth", "plot.gif"], "plot.gif: the plot is written as .svg or .png"),
            (["--growth", "no/such/folder/plot.svg"], "there is no folder no/such/folder"),
            (["--growth", "plot.svg", "--json", "figures.json"], "--growth takes no --json"),
            (["--growth", "plot.svg", "--rows", "3"], "--growth takes no --rows"),
            (["--growth", "plot.svg", "--iters", "9"], "--growth takes no --iters"),
        ],
    )
    def test_a_mistake_is_one_sentence_and_exit_code_2(
        self, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["bench", *words]) == 2

        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert complaint in error

    def test_what_cannot_be_written_is_told_before_anything_is_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "plot.svg").mkdir()
        with pytest.raises(ConfigError, match="is a folder"):
            plots.check_plot_file("--growth", tmp_path / "plot.svg")
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        for check in (partial(plots.check_plot_file, "--growth"), lambda file: check_json(str(file))):
            with pytest.raises(ConfigError, match="permission denied"):
                check(tmp_path / "other.svg")

    @pytest.mark.parametrize("words", [[], ["--suite", "--shape", "P3,C2,R2"], ["--suite", "--iters", "0"]])
    def test_arguments_that_do_not_go_together_end_with_exit_code_2(self, words: list[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *words])

        assert ended.value.code == 2

    def test_a_case_that_fails_leaves_the_others_and_sets_the_exit_code(
        self, comparison: Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        too_large = case_of_shape(replace(TINY, prompt=4000))
        monkeypatch.setattr(cases, "suite", lambda *_: [too_large, comparison.case])

        def measure(case: Case, **_: Any) -> Comparison:
            if case is too_large:
                raise MeasurementError("it was killed.")
            return comparison

        monkeypatch.setattr(compare, "compare", measure)

        assert cli.main(["bench", "--suite", "--json", "-"]) == 1

        printed = capsys.readouterr()
        written = json.loads(printed.out)
        assert [case["name"] for case in written["cases"]] == [comparison.case.name]
        assert written["failures"] == {too_large.name: "it was killed."}
        assert f"error: {too_large.name}: it was killed." in printed.err


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that are measured; an iteration takes the host a second for each of its tokens, the plugin half."""
    measured_cases: list[Case] = []

    def measure(
        self: Runs, trainers: Sequence[str], batches: Sequence[Sequence[int]], repeats: int
    ) -> dict[str, list[Measurement]]:
        measured_cases.append(self.case)
        seconds = [sum(float(self.case.pairs[index].length) for index in batch) for batch in batches]
        # The first one is to warm up.
        halves = [1e6, *(each / 2 for each in seconds[1:])]
        found = {HOST: Measurement([1e6, *seconds[1:]], [], [], 4, 9), PLUGIN: Measurement(halves, [], [], 1, 3)}
        found[TRL] = Measurement([1e6, *(3 * each for each in seconds[1:])], [], [], None, 7)
        return {trainer: [found[trainer]] * repeats for trainer in trainers}

    monkeypatch.setattr(Runs, "time_in_turn", measure)
    return measured_cases


@pytest.mark.slow
class TestGrowth:
    def test_each_curve_doubles_its_own_size_and_tells_the_cost_of_its_own_unit(
        self, timed: list[Case], tmp_path: Path
    ) -> None:
        plot = tmp_path / "growth.svg"

        growth.run_growth(plot, replace(TINY, rejected=9), [HOST], {}, repeats=2, say=quiet, doublings=2)

        curves = json.loads(plot.with_suffix(".json").read_text())["curves"]
        sizes = {name: [point["size"] for point in points] for name, points in curves.items()}
        assert sizes == {
            "rows": [8, 16, 32],
            "prompt": [20, 40, 80],
            "answers": [9, 18, 36],
            "batch": [2, 4, 8],
            "layers": [2, 4, 8],
        }
        seconds = {name: [point["seconds"][PLUGIN] for point in points] for name, points in curves.items()}
        pair = (20 + 9) / 2
        assert seconds == {
            "rows": [8 * pair, 16 * pair, 32 * pair],
            "prompt": [pair, (40 + 9) / 2, (80 + 9) / 2],
            "answers": [pair, (20 + 18) / 2, (20 + 36) / 2],
            "batch": [2 * pair, 4 * pair, 8 * pair],
            "layers": [pair, pair, pair],
        }
        drawn = plot.read_text()
        for label in (HOST, PLUGIN, *(label for labels in growth.PANELS.values() for label in labels)):
            assert f">{label}<" in drawn

    def test_trainers_of_other_projects_have_lines_and_read_each_size_from_a_folder(
        self, timed: list[Case], tmp_path: Path
    ) -> None:
        plot = tmp_path / "growth.svg"

        growth.run_growth(plot, TINY, [HOST, TRL], {TRL: "python"}, repeats=1, say=quiet, doublings=0)

        curves = json.loads(plot.with_suffix(".json").read_text())["curves"]
        assert all(point["seconds"][TRL] == 6 * point["seconds"][PLUGIN] for (point,) in curves.values())
        # Torch does not tell what it allocates.
        assert curves["prompt"][0]["peak_memory"] == {HOST: 4, TRL: 7, PLUGIN: 1}
        assert f">{TRL}<" in plot.read_text()
        assert all(case.model_config is None and len(case.rows) == len(case.pairs) for case in timed)

    def test_the_same_figures_give_the_same_plot(self, timed: list[Case], tmp_path: Path) -> None:
        for name in ("first.svg", "second.svg"):
            growth.run_growth(tmp_path / name, TINY, [HOST], {}, repeats=1, say=quiet, doublings=0)

        assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()

    def test_a_missing_matplotlib_is_told_before_anything_is_measured(
        self, timed: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plots, "find_spec", lambda name: None)

        with pytest.raises(UserError, match=r"pip install 'mlx-cpo-plugin\[bench\]'"):
            growth.run_growth(tmp_path / "growth.svg", TINY, [HOST], {}, repeats=1, say=quiet)

        assert timed == []
