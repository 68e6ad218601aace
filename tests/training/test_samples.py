"""Answers while a run trains: those of the model as it is, to prompts as training has them, and nothing notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx_lm import generate, load
from support.tiny import add_adapter, preference_rows

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.sample_prompts import held_out_prompts, own_prompts
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.report.page import as_html
from mlx_cpo_plugin.report.record import RunRecord, answers_over_time
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.settings.nested import MOST_PROMPTS
from mlx_cpo_plugin.trackers import RunDescription, TensorboardTracker, TrackerCallback
from mlx_cpo_plugin.training import samples
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.call import pairs_of
from mlx_cpo_plugin.training.samples import Sample
from mlx_cpo_plugin.training.trainer import train_cpo

Rows = list[dict[str, Any]]


class Reports:
    """A training callback that keeps what it is told of validations and samples."""

    def __init__(self) -> None:
        self.valid: Rows = []
        self.samples: Rows = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        pass

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.valid.append(info)

    def on_sample_report(self, report: dict[str, Any]) -> None:
        self.samples.append(report)


class Trained:
    """A run on a few rows: its model, its reports, and what its folder holds."""

    def __init__(self, model_folder: Path, folder: Path, **settings: Any) -> None:
        self.folder, self.reports = folder, Reports()
        self.model, self.tokenizer = load(str(model_folder))[:2]
        mx.random.seed(7)
        add_adapter(self.model, dropout=settings.pop("dropout", 0.0))
        tokenizer = settings.pop("tokenizer", self.tokenizer)
        rows, valid = preference_rows(6), preference_rows(9)[6:]
        arguments = {"batch_size": 2, "iters": 4, "steps_per_eval": 2, "seed": 0, "max_seq_length": 128, **settings}
        train_cpo(
            self.model,
            optimizers.Adam(learning_rate=1e-2),
            pairs_of(rows, 128, self.tokenizer) if tokenizer is None else rows,
            pairs_of(valid, 128, self.tokenizer) if tokenizer is None else valid,
            CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), **arguments),
            training_callback=self.reports,
            tokenizer=tokenizer,
        )

    @property
    def rows(self) -> Rows:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == "sample"]

    def weights(self) -> dict[str, bytes]:
        arrays: Any = mx.load(str(self.folder / "adapters.safetensors"))
        return {name: np.array(value).tobytes() for name, value in arrays.items()}


@pytest.fixture(autouse=True)
def _short_answers_and_time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SECONDS", 1e9)
    monkeypatch.setattr(samples, "MOST_TOKENS", 12)


@pytest.fixture
def tokenizer(model_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(load(str(model_folder))[1])


def answer_of(run: Trained, prompt: str) -> str:
    """What mlx-lm has the model answer."""
    messages = [{"role": "user", "content": prompt}]
    tokens = run.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(run.model, run.tokenizer, tokens, max_tokens=samples.MOST_TOKENS).strip()


@pytest.mark.parametrize("settings", [{}, {"grad_checkpoint": True}, {"qat_enable": True, "qat_bits": 4}])
def test_the_last_answer_is_that_of_the_trained_model(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = Trained(model_folder, tmp_path, sample_prompts=["Please tell me."], **settings)

    assert [row["iteration"] for row in run.rows] == [1, 2, 4]
    assert run.rows[-1]["answer"] == answer_of(run, "Please tell me.")
    assert run.rows[-1]["prompt"] == "Please tell me."


def test_the_compiled_kernels_answer_as_mlx_does(model_folder: Path, tmp_path: Path, kernels: None) -> None:
    run = Trained(model_folder, tmp_path, sample_prompts=["Please tell me."], iters=2)

    assert run.rows[-1]["answer"] == answer_of(run, "Please tell me.")


@pytest.mark.parametrize("settings", [{}, {"grad_checkpoint": True}])
def test_answers_change_nothing_that_is_trained(model_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    runs = [
        Trained(model_folder, tmp_path / str(every), dropout=0.3, steps_per_sample=every, **settings)
        for every in (0, 1)
    ]

    assert (len(runs[0].rows), len(runs[1].rows)) == (0, 2 * 5)
    assert runs[0].weights() == runs[1].weights()


def test_the_generator_of_random_numbers_is_where_it_was(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restless(*_: Any, **__: Any) -> Iterator[tuple[int, None]]:
        mx.eval(mx.random.normal((3,)))
        yield 5, None

    still = Trained(model_folder, tmp_path / "still", dropout=0.3)
    monkeypatch.setattr(samples, "generate_step", restless)
    assert Trained(model_folder, tmp_path / "restless", dropout=0.3).weights() == still.weights()


def test_by_default_two_held_out_prompts_are_answered_at_each_validation(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trained(model_folder, tmp_path)

    assert [(row["iteration"], row["source"]) for row in run.rows] == [
        (iteration, f"row {number}") for iteration in (1, 2, 4) for number in (1, 2)
    ]
    assert "Please tell me how many apples are in basket 6." in run.rows[0]["prompt"]
    assert "<|" not in run.rows[0]["prompt"]
    assert [report["iteration"] for report in run.reports.samples] == [1, 2, 4]
    assert run.reports.samples[0]["samples"][0] == {key: run.rows[0][key] for key in ("prompt", "answer")}
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Sample ") for line in printed) == 2
    assert all(len(line) <= 80 for line in printed if "ample " in line)


def test_validations_report_length_and_repetition_and_how_they_changed(model_folder: Path, tmp_path: Path) -> None:
    first, *_, last = Trained(model_folder, tmp_path).reports.valid

    for name in ("val_sample_length", "val_sample_repetition"):
        assert last[f"{name}_change"] == pytest.approx(last[name] - first[name])
        assert f"{name}_change" not in first


@pytest.mark.parametrize(("every", "expected"), [(3, [1, 3, 4]), (0, [])])
def test_steps_per_sample_says_when(model_folder: Path, tmp_path: Path, every: int, expected: list[int]) -> None:
    run = Trained(model_folder, tmp_path, steps_per_sample=every, sample_prompts=["Please tell me."])

    assert [row["iteration"] for row in run.rows] == expected
    assert "val_sample_length" not in run.reports.valid[1]  # of iteration 2


def test_a_call_without_a_tokenizer_has_no_samples(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_cpo_plugin.data import PreferenceDataset

    known = pairs_of(preference_rows(3), 128, load(str(model_folder))[1])
    monkeypatch.setattr(PreferenceDataset, "chat_tokenizer", None)
    assert isinstance(known[0], PreferencePair)
    pairs = list(known)
    train_cpo(
        add_adapter(load(str(model_folder))[0]),
        optimizers.Adam(learning_rate=1e-2),
        pairs,
        pairs,
        CPOTrainingArgs(adapter_file=str(tmp_path / "adapters.safetensors"), iters=1, sample_prompts=["Hi"]),
    )

    assert '"sample"' not in (tmp_path / "metrics.jsonl").read_text()


def test_other_ranks_answer_nothing(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "is_first_rank", lambda: False)

    assert Trained(model_folder, tmp_path).rows == []


def test_a_model_that_cannot_generate_loses_its_samples_in_one_sentence(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> Iterator[tuple[int, None]]:
        raise TypeError("no cache")
        yield

    monkeypatch.setattr(samples, "generate_step", failing)

    run = Trained(model_folder, tmp_path)

    assert run.rows == []
    assert capsys.readouterr().out.count("There are no samples: this model cannot generate (no cache).") == 1


def test_a_device_that_fails_is_no_matter_of_samples(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Iterator[tuple[int, None]]:
        raise RuntimeError("[METAL] Command buffer execution failed")
        yield

    monkeypatch.setattr(samples, "generate_step", failing)

    with pytest.raises(RuntimeError, match="METAL"):
        Trained(model_folder, tmp_path)


def test_samples_end_with_their_time_and_that_is_told_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: float(next(looks)))  # each look at it takes a second
    monkeypatch.setattr(samples, "time", clock)
    monkeypatch.setattr(samples, "SHARE", 0.0)
    monkeypatch.setattr(samples, "SECONDS", 10.0)

    run = Trained(model_folder, tmp_path)

    assert capsys.readouterr().out.count("Samples are fewer or shorter than they could be") == 1
    assert {row["iteration"] for row in run.rows} == {1, 2}  # half of it is for those after training began
    assert all(len(row["answer"]) < samples.SECONDS for row in run.rows)
    assert not any("val_sample_length" in report for report in run.reports.valid)


def test_answers_that_take_too_long_once_training_has_begun_are_not_compared(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures_of = samples.figures
    calls = iter([True, False, False])
    monkeypatch.setattr(samples, "figures", lambda answers: figures_of(answers if next(calls) else []))

    before, *others = Trained(model_folder, tmp_path).reports.valid

    assert "val_sample_length" in before
    assert len(others) == 2
    assert not any("val_sample_length" in report for report in others)


def test_a_resumed_run_compares_with_the_answers_before_training(model_folder: Path, tmp_path: Path) -> None:
    whole = Trained(model_folder, tmp_path / "whole", iters=4)
    Trained(model_folder, tmp_path / "run", iters=2, steps_per_eval=2)
    asked = {"iters": 4, "resume": "auto"}
    resumed = Trained(model_folder, tmp_path / "run", **asked)

    assert [(row["iteration"], row["answer"]) for row in resumed.rows] == [
        (row["iteration"], row["answer"]) for row in whole.rows
    ]
    assert (
        resumed.reports.valid[-1]["val_sample_length_change"] == (whole.reports.valid[-1]["val_sample_length_change"])
    )


def test_a_resumed_run_compares_nothing_before_there_are_new_answers(model_folder: Path, tmp_path: Path) -> None:
    run = Trained(model_folder, tmp_path, iters=2)
    arguments = CPOTrainingArgs(sample_prompts=["Please tell me."], max_seq_length=128)
    valid = pairs_of(preference_rows(1), 128, run.tokenizer)
    whole, resumed = (
        samples.Samples(run.model, arguments, valid, ChatTokenizer(run.tokenizer), print, print) for _ in "ab"
    )

    whole.take(1, before_training=True)
    resumed.restore(json.loads(json.dumps(whole.state())))

    assert whole.latest == resumed.latest
    assert whole.compared() == resumed.compared() == {}
    for each in (whole, resumed):
        each.take(2)
    assert whole.compared() == resumed.compared()
    assert set(whole.compared()) > {"val_sample_length", "val_sample_length_change"}


def test_answers_to_other_prompts_are_not_compared(model_folder: Path, tmp_path: Path) -> None:
    Trained(model_folder, tmp_path, iters=2)
    resumed = Trained(model_folder, tmp_path, iters=4, resume="auto", sample_prompts=["Please tell me."])

    assert "val_sample_length" in resumed.reports.valid[-1]
    assert "val_sample_length_change" not in resumed.reports.valid[-1]


# Prompts


def test_a_prompt_has_the_tokens_that_a_row_with_it_has(tokenizer: ChatTokenizer) -> None:
    row = preference_rows(1)[0]
    (pair,) = pairs_of([row], 128, tokenizer._renders)
    as_messages = {"messages": [{"role": "user", "content": row["prompt"]}]}

    for prompt in (row["prompt"], {"prompt": row["prompt"]}, as_messages, row):
        (asked,) = own_prompts([prompt], tokenizer, 99)
        assert asked.tokens == pair.prompt.tolist()


def test_held_out_prompts_are_different_and_short_ones_come_first(tokenizer: ChatTokenizer) -> None:
    def pair(tokens: int, first: int) -> PreferencePair:
        answer = np.array([7], np.int32)
        return PreferencePair(
            np.array([first] * tokens, np.int32), answer, answer, answer > 0, answer > 0, f"row {first}"
        )

    long, short, other = pair(2000, 3), pair(5, 4), pair(9, 5)

    assert [prompt.source for prompt in held_out_prompts([long, short, short, other], tokenizer)] == ["row 4", "row 5"]
    assert [prompt.source for prompt in held_out_prompts([long, short], tokenizer)] == ["row 4", "row 3"]
    assert held_out_prompts([], tokenizer) == []


def test_a_prompt_that_the_template_refuses_is_named(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"^Prompt 2 of sample_prompts, .* cannot be asked") as caught:
        own_prompts(["Hi", "half of a character: \ud800"], tokenizer, 99)

    assert caught.value.key == "sample_prompts"


def resolved(value: Any) -> Any:
    return resolve({"train_mode": "cpo", "train": True, "sample_prompts": value}).settings.sample_prompts


def test_prompts_come_from_a_list_or_from_a_file_and_stand_in_the_settings_of_the_run(tmp_path: Path) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("How, and why?\n\nWhen?\n", encoding="utf-8")
    rows.write_text('{"prompt": "How?"}\n{"messages": [{"role": "user", "content": "Why?"}]}\n', encoding="utf-8")

    assert resolved(["How, and why?"]) == ["How, and why?"]
    assert resolved(str(lines)) == ["How, and why?", "When?"]
    assert resolved(str(rows)) == [{"prompt": "How?"}, {"messages": [{"role": "user", "content": "Why?"}]}]
    assert resolved(None) is None


@pytest.mark.parametrize(
    "value", ["missing.txt", "missing.jsonl", [""], [3], [{"question": "Why?"}], ["Why?"] * (MOST_PROMPTS + 1)]
)
def test_what_is_no_prompt_is_refused_with_its_key(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(value)

    assert caught.value.key == "sample_prompts"


def test_report_and_page_show_answers_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    run_view = pytest.importorskip("mlx_cpo_plugin.studio.run_view")
    rows: Rows = [{"kind": "valid", "run": "r", "iteration": 1, "val_loss": 1.0}]
    rows += [
        {"kind": "sample", "run": "r", "iteration": 10 * at, "prompt": "Why?", "answer": f"<answer {at}>"}
        for at in range(20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for page in (as_html([RunRecord.read(tmp_path)]), run_view.status_html(tmp_path, rows)):
        assert "Why?" in page
        assert "&lt;answer 0&gt;" in page
        assert "&lt;answer 19&gt;" in page
        assert page.count("&lt;answer") in (3, 6)
    assert answers_over_time([]) == []


def test_answers_go_to_tensorboard_as_texts_and_once(tmp_path: Path) -> None:
    sent: list[Any] = []
    tracker = SimpleNamespace(start=lambda *_: "id", log_texts=lambda texts, step: sent.append((texts, step)))
    run = RunDescription("project", "name", tmp_path, {})
    heard = Reports()
    report = {"iteration": 4, "samples": [{"prompt": "Why?", "answer": "So."}]}

    tracking = TrackerCallback({"tensorboard": tracker}, run, heard)  # type: ignore[dict-item,arg-type]  # stand-ins
    tracking.on_sample_report(report)
    tracking.resume({"run_ids": {}, "last_step": 0}, {("sample", 4)})
    tracking.on_sample_report(report)

    assert sent == [({"samples/1": "Why?\n\nSo."}, 4)]
    assert heard.samples == [report, report]


def test_tensorboard_files_hold_the_answers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    tracker = TensorboardTracker("tensorboardX")
    tracker.start(RunDescription("project", "name", tmp_path, {}), None)
    tracker.log_texts({"samples/1": "Why?\n\nSo it is."}, 4)
    tracker.finish(failed=False)

    assert b"So it is." in b"".join(file.read_bytes() for file in tmp_path.rglob("events*"))


@pytest.mark.parametrize(
    ("tokens", "expected"), [([], 0.0), ([1, 2], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 12, 0.9), ([1, 2, 3] * 3, 4 / 7)]
)
def test_repetition_is_the_share_of_phrases_that_came_before(tokens: list[int], expected: float) -> None:
    sample = Sample(None, "", tokens, True, True)  # type: ignore[arg-type]  # no prompt is needed

    assert sample.repetition() == pytest.approx(expected)
