"""The base model and the tuned one, side by side."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from support.tiny import add_adapter, build_model, build_pairs, write_data

from mlx_cpo_plugin import blas, cli, train
from mlx_cpo_plugin.comparison import measure, text_metrics
from mlx_cpo_plugin.comparison.contenders import distinct_names
from mlx_cpo_plugin.comparison.figures import figures_of
from mlx_cpo_plugin.comparison.measure import Comparison, compare
from mlx_cpo_plugin.comparison.preference import length_groups, preferences
from mlx_cpo_plugin.comparison.statistics import wilson
from mlx_cpo_plugin.comparison.text_metrics import Answer, answer_values
from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.training.objective import objective_for

Settings = dict[str, Any]
RunMain = Callable[..., None]

PROMPT = "How many apples are there?"


def silent(line: str) -> None:
    """Progress that nobody wants to see."""


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps that moves the model, with a test at its end."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "gigaflops", lambda *_, **__: 1.0)
        train(
            **{"model": str(model_folder), "data": str(folder / "data"), "adapter_path": str(folder / "adapters")},
            **{"test": True, "learning_rate": 0.05, "iters": 4, "batch_size": 2, "val_batches": -1},
            **{"steps_per_report": 1, "steps_per_sample": 0},
        )
    return folder


@pytest.fixture
def adapter_path(trained: Path, tmp_path: Path, data_folder: Path) -> Path:
    """A copy of that run, and of its data, which a test may change."""
    copied = shutil.copytree(trained / "adapters", tmp_path / "adapters")
    record = copied / "run_settings.yaml"
    record.write_text(record.read_text().replace(str(trained), str(tmp_path)))
    return copied


def metrics(adapter_path: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (adapter_path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def greedy(model_folder: Path, adapter_path: Path | None = None) -> str:
    """The answer that mlx_lm itself gives to the prompt."""
    model, tokenizer = load(str(model_folder), adapter_path=adapter_path and str(adapter_path))
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    return generate(model, tokenizer, prompt=tokens, max_tokens=8).strip()


# Accuracy and margin


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_thirds_hold_every_pair_once_from_short_to_long(longest: list[int]) -> None:
    pairs = [build_pairs(1, seed=seed, longest=size)[0] for seed, size in enumerate(longest)]

    everything, *thirds = length_groups(pairs)

    assert list(everything.pairs) == pairs
    assert len(thirds) == (3 if len(pairs) >= 3 else 0)
    if thirds:
        assert sorted(id(pair) for third in thirds for pair in third.pairs) == sorted(map(id, pairs))
        described = [third.description() for third in thirds]
        assert [third["name"] for third in described] == ["short", "medium", "long"]
        assert max(third["pairs"] for third in described) - min(third["pairs"] for third in described) <= 1
        for shorter, longer in pairwise(described):
            assert shorter["longest"] <= longer["shortest"]


@pytest.mark.parametrize("scoring", ["auto", "plain"])
def test_the_means_of_a_group_are_those_of_its_pairs_one_by_one(scoring: str) -> None:
    model, pairs, beta = add_adapter(build_model()), build_pairs(7), 0.3
    groups = length_groups(pairs)

    preferred = preferences(model, groups, objective_for("sigmoid", {"beta": beta}), batch_size=2, scoring=scoring)

    for group, found in zip(groups, preferred.means, strict=True):
        logps = np.array([reference_logps(model, pair) for pair in group.pairs])
        margins = beta * (logps[:, 0] - logps[:, 1])
        assert found["accuracies"] == np.mean(margins > 0)
        assert found["margins"] == pytest.approx(margins.mean(), rel=1e-4)
        assert found["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-5)
        assert found["policy_chosen_logps"] == pytest.approx(logps[:, 0].mean(), rel=1e-5)
    every = np.array([reference_logps(model, pair) for pair in pairs])
    np.testing.assert_allclose(preferred.of_each("margins"), beta * (every[:, 0] - every[:, 1]), rtol=1e-4)
    np.testing.assert_array_equal(preferred.of_each("accuracies"), every[:, 0] > every[:, 1])


def reference_logps(model: Any, pair: Any) -> list[float]:
    """Chosen and rejected log-prob of one pair in float64, from the model's logits."""
    batch = collate([pair])
    logps = []
    for ids, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
        tokens = np.concatenate([pair.prompt, ids])
        logits = np.array(model(mx.array(tokens)[None]).astype(mx.float32), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(pair.prompt), len(tokens))[scored]
        logps.append(float(log_probs[places - 1, tokens[places]].sum()))
    assert batch.tokens.shape[0] == 2
    return logps


@pytest.mark.parametrize("choice", [{"train_type": "dora"}, {"train_type": "full"}, {"preset": "cpo-simpo"}])
def test_the_figures_are_those_of_the_runs_first_validation_and_of_its_final_test(
    settings: Settings, run_main: RunMain, choice: Settings
) -> None:
    run_main({**settings, **choice, "test": True, "learning_rate": 0.05, "val_batches": -1})
    adapter_path = Path(settings["adapter_path"])

    comparison = compare([adapter_path], say=silent)

    (test,) = metrics(adapter_path, "test")
    first = metrics(adapter_path, "valid")[0]  # the valid rows of the fixture are the test rows, too
    assert comparison.held_out == "test"
    for name in ("loss", "accuracies", "margins", "policy_chosen_logps", "policy_rejected_logps"):
        assert comparison.preferences[1].means[0][name] == test[f"test_{name}"]
        assert comparison.preferences[0].means[0][name] == pytest.approx(first[f"val_{name}"], rel=1e-6)
    assert comparison.preferences[0].means != comparison.preferences[1].means


# Answers


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
def test_both_models_answer_as_mlx_lm_has_them_answer(
    settings: Settings, run_main: RunMain, model_folder: Path, train_type: str
) -> None:
    run_main({**settings, "train_type": train_type, "learning_rate": 0.05, "iters": 4})
    adapter_path = Path(settings["adapter_path"])

    comparison = compare([adapter_path], prompts=[PROMPT], max_tokens=8, say=silent)

    assert comparison.answers[0][0].text == greedy(model_folder)
    assert comparison.answers[1][0].text == greedy(model_folder, adapter_path)
    assert comparison.answers[0] != comparison.answers[1]


def test_the_model_that_answers_first_is_the_base_model_to_the_bit(
    adapter_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def look(model: Any, *_: Any) -> list[Any]:
        seen.append(dict(tree_flatten(model.parameters())))
        return []

    monkeypatch.setattr(measure, "answers", look)

    compare([adapter_path], say=silent)

    original = dict(tree_flatten(load(str(model_folder))[0].parameters()))
    base, tuned = seen
    assert base.keys() == original.keys()
    assert all(mx.array_equal(base[name], original[name]).item() for name in original)
    assert any(name.endswith("lora_a") for name in tuned)


def test_the_precision_of_the_run_is_that_of_both_models(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, "load_in_4bits": True, "test": True})

    comparison = compare([Path(settings["adapter_path"])], say=silent)

    (test,) = metrics(Path(settings["adapter_path"]), "test")
    assert comparison.preferences[1].means[0]["margins"] == test["test_margins"]


def test_rows_are_asked_after_the_users_own_prompts_with_their_own_answers_beside(adapter_path: Path) -> None:
    comparison = compare([adapter_path], prompts=[PROMPT], rows=2, max_tokens=2, say=silent)

    own, first, second = comparison.questions
    assert (own.source, own.prompt, own.chosen) == ("prompt", PROMPT, None)
    assert (first.source, second.source) == ("test.jsonl:1", "test.jsonl:2")
    assert first.prompt.startswith("<|im_start|>user\nPlease tell me how many apples are in basket 0.<|im_end|>")
    assert first.prompt.endswith("<|im_start|>assistant\n")
    assert first.text == "user\nPlease tell me how many apples are in basket 0.\nassistant"
    assert first.chosen == "There are 0 apples in the basket, my friend."
    assert first.rejected == "I do not know."
    assert [len(given) for given in comparison.answers] == [3, 3]


def test_of_a_row_with_several_pairs_the_prompt_is_asked_once_and_its_pairs_are_one_observation(
    adapter_path: Path, tmp_path: Path
) -> None:
    record = adapter_path / "run_settings.yaml"
    record.write_text(record.read_text().replace("completion_pairs: best_worst", "completion_pairs: all"))
    rows = [{"prompt": f"Who {i}?", "completions": ["A", "B", "C"], "scores": [3, 2, 1]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    comparison = compare([adapter_path], data=str(tmp_path / "rows.jsonl"), rows=2, max_tokens=1, say=silent)

    assert [question.source.partition(" (")[0] for question in comparison.questions] == ["rows.jsonl:1", "rows.jsonl:2"]
    accuracy, *_ = figures_of(comparison, max_tokens=1)["measures"]
    assert accuracy["count"] == 12
    base = accuracy["models"][0]
    assert (base["low"], base["high"]) == pytest.approx(wilson(4 * base["mean"], 4))


def test_a_prompt_that_was_cut_for_training_is_asked_as_a_whole(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, "max_seq_length": 24})

    comparison = compare([Path(settings["adapter_path"])], rows=1, max_tokens=1, say=silent)

    assert comparison.groups[0].description()["longest"] == 24
    assert comparison.questions[0].prompt.startswith("<|im_start|>user\nPlease tell me how many apples")
    assert comparison.questions[0].chosen == "There are 0 apples in the basket, my friend."


def test_a_fault_of_the_training_rows_is_none_of_a_cut_held_out_row(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, "max_seq_length": 24})
    (Path(settings["data"]) / "train.jsonl").write_text("{oops\n")

    comparison = compare([Path(settings["adapter_path"])], rows=1, max_tokens=1, say=silent)

    assert comparison.questions[0].prompt.startswith("<|im_start|>user\nPlease tell me how many apples")


def test_what_is_skipped_or_cut_is_said(adapter_path: Path, data_folder: Path) -> None:
    said: list[str] = []
    with (data_folder / "test.jsonl").open("a") as rows:
        rows.write('{"prompt": "Hi!", "chosen": "", "rejected": "No."}\n')

    compare([adapter_path], say=said.append)

    assert said[0] == "Test: 5 rows, 4 pairs, 1 skipped (an answer is empty: test.jsonl:5)."


def test_an_answer_that_was_cut_off_has_not_finished(adapter_path: Path) -> None:
    comparison = compare([adapter_path], prompts=[PROMPT], max_tokens=1, say=silent)

    assert not comparison.answers[0][0].finished
    assert len(comparison.answers[0][0].tokens) == 1


# Which rows are held out


def held_out(adapter_path: Path, **arguments: Any) -> tuple[str, int]:
    comparison: Comparison = compare([adapter_path], say=silent, **arguments)
    return comparison.held_out, len(comparison.groups[0].pairs) if comparison.groups else 0


def test_without_a_test_set_the_validation_set_is_taken(adapter_path: Path, data_folder: Path) -> None:
    (data_folder / "test.jsonl").unlink()

    assert held_out(adapter_path) == ("valid", 4)


def test_a_validation_set_drawn_from_the_training_rows_is_drawn_again(
    settings: Settings, run_main: RunMain, data_folder: Path
) -> None:
    (data_folder / "valid.jsonl").unlink()
    (data_folder / "test.jsonl").unlink()
    run_main({**settings, "valid_fraction": 0.3, "val_batches": -1, "iters": 1})

    comparison = compare([Path(settings["adapter_path"])], say=silent)

    first = metrics(Path(settings["adapter_path"]), "valid")[0]
    assert (comparison.held_out, len(comparison.groups[0].pairs)) == ("valid", 3)
    assert comparison.preferences[0].means[0]["margins"] == pytest.approx(first["val_margins"], rel=1e-6)


def test_no_more_rows_are_taken_than_the_run_tests(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, "test": True, "test_batches": 1})

    assert held_out(Path(settings["adapter_path"])) == ("test", settings["batch_size"])


def test_other_rows_can_be_given_as_a_file_or_a_folder(adapter_path: Path, data_folder: Path) -> None:
    assert held_out(adapter_path, data=str(data_folder / "train.jsonl")) == ("file", 10)
    assert held_out(adapter_path, data=str(data_folder)) == ("test", 4)


def test_prompts_are_answered_without_any_rows(adapter_path: Path, data_folder: Path) -> None:
    for name in ("valid", "test"):
        (data_folder / f"{name}.jsonl").unlink()
    said: list[str] = []

    comparison = compare([adapter_path], prompts=[PROMPT], rows=2, max_tokens=2, say=said.append)

    assert (len(comparison.answers[0]), comparison.groups, comparison.preferences) == (1, [], [])
    assert said[0].startswith("No held-out rows are compared: ")


# The command


def test_a_prompt_can_come_from_standard_input(
    adapter_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\nQuickly!\n"))

    assert cli.main(["compare", str(adapter_path), "--prompt", "-", "--rows", "0", "--max-tokens", "1"]) == 0

    assert f"prompt: {PROMPT}\n\nQuickly!\n  base:" in capsys.readouterr().out


def test_bytes_from_standard_input_that_are_no_text_are_refused(
    adapter_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))

    assert cli.main(["compare", str(adapter_path), "--prompt", "-", "--rows", "0"]) == 2

    assert "error: --prompt -: standard input is no utf-8 text" in capsys.readouterr().err


def test_the_json_holds_what_its_documentation_says(
    adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(adapter_path), "--prompt", PROMPT, "--rows", "1", "--max-tokens", "2"]

    assert cli.main([*words, "--json", str(tmp_path / "out.json")]) == 0

    printed = capsys.readouterr()
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(figures) == [
        *("loss_type", "beta", "max_tokens", "models", "measures", "answers", "held_out", "preference")
    ]
    assert [(model["name"], model["adapter_path"], model["train_type"]) for model in figures["models"]] == [
        ("base", None, None),
        ("tuned", str(adapter_path), "lora"),
    ]
    assert [set(answer) for answer in figures["answers"]] == [{"source", "prompt", "chosen", "rejected", "models"}] * 2
    assert [set(model) for model in figures["answers"][0]["models"]] == [{"text", "finished", "tokens"}] * 2
    assert figures["held_out"] == "test"
    assert [group["name"] for group in figures["preference"]] == ["all", "short", "medium", "long"]
    means = {"accuracy", "margin", "loss", "chosen_logps", "rejected_logps"}
    assert set(figures["preference"][0]) == {"name", "pairs", "shortest", "longest", "models"}
    assert [set(model) for model in figures["preference"][0]["models"]] == [means] * 2
    names = ["accuracy", "margin", "length", "repetition", "ended"]
    assert [measure["name"] for measure in figures["measures"]] == names
    for entry in figures["measures"]:
        assert set(entry) == {"name", "of", "count", "models", "best", "comparisons"}
        assert entry["count"] == (4 if entry["of"] == "pairs" else 2)
        assert [set(model) for model in entry["models"]] == [{"name", "mean", "low", "high"}] * 2
        (compared,) = entry["comparisons"]
        assert (compared["model"], compared["against"]) == ("tuned", "base")
    margin, length = figures["measures"][1], figures["measures"][2]
    whole = figures["preference"][0]["models"]
    assert [model["mean"] for model in margin["models"]] == pytest.approx([model["margin"] for model in whole])
    assert set(margin["comparisons"][0]) == {
        *("model", "against", "difference", "low", "high", "outcome"),
        *("wins", "ties", "losses", "win_rate", "win_rate_low", "win_rate_high"),
    }
    assert set(length["comparisons"][0]) == {"model", "against", "difference", "low", "high"}
    assert max(map(len, printed.out.splitlines())) <= 80
    assert "accuracy, 4 pairs" in printed.out
    assert f"prompt: {PROMPT}" in printed.out
    assert "The tuned model has answered 2 of 2 prompts." in printed.err


def test_json_to_standard_output_stands_there_alone(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(adapter_path), "--rows", "0", "--json", "-"]) == 0

    assert json.loads(capsys.readouterr().out)["answers"] == []


def test_a_file_that_cannot_be_written_in_the_end_costs_nothing_else(
    adapter_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(adapter_path), "--rows", "0", "--json", "/dev/full"]) == 2

    printed = capsys.readouterr()
    assert "accuracy, 4 pairs" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: --json /dev/full cannot be written")
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_to_and_stays_one(adapter_path: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli.main(["compare", str(adapter_path), "--rows", "0", "--json", str(pipe)]) == 0

        assert json.loads(os.read(reader, 1 << 16))["answers"] == []
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_what_the_output_cannot_show_is_marked_and_json_is_whole_all_the_same(
    adapter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compare", str(adapter_path), "--rows", "0", "--max-tokens", "1", "--prompt", "Où \x1b[31m?"]
    for more, shown in (([], b"O? \\x1b[31m?"), (["--json", "-"], b'"O\\u00f9 \\u001b[31m?"')):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert cli.main([*words, *more]) == 0
        assert shown in written.getvalue()


def test_a_run_that_validates_on_nothing_is_told(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = adapter_path / "run_settings.yaml"
    values = {**yaml.safe_load(file.read_text()), "val_batches": 0, "test": False}
    file.write_text(yaml.safe_dump(values))
    (Path(values["data"]) / "test.jsonl").unlink(missing_ok=True)

    assert cli.main(["compare", str(adapter_path)]) == 2

    assert "the run's own validations hold no rows; name some with --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["compare", "x" * 300], ["export", "x" * 300, "--to", "mlx"], ["push", "x" * 300, "a/b", "--dry-run"]],
    ids=lambda words: words[0],
)
def test_a_path_that_is_too_long_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2

    said = capsys.readouterr().err
    assert said.startswith("error: xxx")
    assert said.endswith("is too long for a path; give another.\n")


def without(adapter_path: Path, name: str) -> None:
    (adapter_path / name).unlink()


@pytest.mark.parametrize(
    ("missing", "words", "sentence"),
    [
        ("adapters.safetensors", [], "There is no adapters.safetensors in {path}; give the adapter_path of a run"),
        ("adapter_config.json", [], "There is no adapter_config.json in {path}; give the adapter_path of a run"),
        ("run_settings.yaml", [], "There is no run_settings.yaml in {path}; give --model, and --data for rows."),
        (None, ["--data", "/no/rows"], "data names /no/rows, which does not exist"),
        (None, ["--model", "/no/model"], "model names '/no/model', which does not exist"),
        (None, ["--prompt", " "], "--prompt ' ' cannot be asked"),
        (None, ["--json", ""], "--json '' is a folder; give a file."),
        (None, ["--json", "/"], "--json '/' is a folder; give a file."),
        (None, ["--data", "~no such account/x"], "data names ~no such account/x, which cannot be read"),
        (None, ["--data", "x" * 300], f"data names {'x' * 300}, which cannot be read (File name too long)"),
        (None, ["--json", "/no/folder/out.json"], "--json /no/folder/out.json: there is no folder /no/folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    adapter_path: Path, capsys: pytest.CaptureFixture[str], missing: str | None, words: list[str], sentence: str
) -> None:
    if missing is not None:
        without(adapter_path, missing)
    capsys.readouterr()

    assert cli.main(["compare", str(adapter_path), *words]) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {sentence.format(path=adapter_path)}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "content", ["{oops", "{}", "[]", '{"num_layers": 2, "lora_parameters": {"rank": 8, "scale": "a"}}']
)
def test_a_damaged_adapter_config_is_named(
    adapter_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter_path / "adapter_config.json").write_text(content)

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    assert f"{adapter_path / 'adapter_config.json'} cannot be read (there is no" in capsys.readouterr().err


def test_an_adapter_that_lacks_tensors_is_damaged(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(adapter_path / "adapters.safetensors")
    weights = dict(mx.load(file))
    mx.save_safetensors(file, {name: value for name, value in weights.items() if ".0." not in name})

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    assert "cannot be read (it lacks" in capsys.readouterr().err


def test_an_adapter_of_numbers_that_are_none_is_damaged(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(adapter_path / "adapters.safetensors")
    weights = dict(mx.load(file))
    broken = min(weights)
    mx.save_safetensors(file, {**weights, broken: weights[broken] * math.nan})

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    assert f"cannot be read ({broken} holds numbers that are not finite)" in capsys.readouterr().err


def test_a_model_whose_scores_are_not_finite_is_told(adapter_path: Path) -> None:
    file = str(adapter_path / "adapters.safetensors")
    mx.save_safetensors(file, {name: value + 1e30 for name, value in dict(mx.load(file)).items()})
    said: list[str] = []

    compare([adapter_path], say=said.append)

    assert said[-1].startswith("Warning: the tuned model gives log-probs that are not finite")


def test_a_damaged_adapter_is_refused_before_any_is_asked(
    adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(adapter_path, tmp_path / "other")
    (other / "adapters.safetensors").write_bytes((other / "adapters.safetensors").read_bytes()[:-9])

    assert cli.main(["compare", str(adapter_path), str(other), "--rows", "0"]) == 2

    told = capsys.readouterr().err
    assert f"error: The adapter {other / 'adapters.safetensors'} cannot be read" in told
    assert "Loading" not in told


def test_an_adapter_that_was_trained_with_another_template_is_noted(adapter_path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter_path, tmp_path / "other")
    record = other / "run_settings.yaml"
    record.write_text(yaml.safe_dump({**yaml.safe_load(record.read_text()), "chat_template_kwargs": {"date": "today"}}))
    said: list[str] = []

    compare([adapter_path, other], say=said.append)

    assert any(line.startswith("Note: other was trained with another chat_template_kwargs than") for line in said)


def test_an_adapter_of_another_base_model_is_noted(adapter_path: Path, model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter_path, tmp_path / "other")
    copied = shutil.copytree(model_folder, tmp_path / "copied model")
    record = other / "run_settings.yaml"
    record.write_text(yaml.safe_dump({**yaml.safe_load(record.read_text()), "model": str(copied)}))
    said: list[str] = []

    compare([adapter_path, other], say=said.append)

    assert f"Note: other is an adapter of {copied}, but base is {model_folder}." in said


def test_a_blas_that_cannot_be_used_is_one_sentence(
    adapter_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blas, "is_used_here", lambda: True)
    monkeypatch.setenv(blas.VARIABLE, "/no/blas.so")

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    assert "error: MLX_CPO_PLUGIN_BLAS is /no/blas.so, which cannot be used" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_one_sentence(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(mx.load(str(adapter_path / "adapters.safetensors")))
    mx.save_safetensors(
        str(adapter_path / "adapters.safetensors"), {name: value[:1] for name, value in weights.items()}
    )
    capsys.readouterr()

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: The adapter in {adapter_path} does not fit model ")


@pytest.mark.parametrize("kept", [0.9, 0.01, 0.0])
def test_a_damaged_adapter_is_one_sentence_that_names_the_file(
    kept: float, adapter_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter_path / "adapters.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    capsys.readouterr()

    assert cli.main(["compare", str(adapter_path), "--rows", "0"]) == 2

    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: The adapter {file} cannot be read ")


def test_a_run_without_its_settings_is_compared_with_a_named_model(
    adapter_path: Path, model_folder: Path, data_folder: Path
) -> None:
    without(adapter_path, "run_settings.yaml")

    assert held_out(adapter_path, model=str(model_folder), data=str(data_folder)) == ("test", 4)


# Several models


def as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["compare", *words, "--json", "-"]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


def test_several_models_are_each_compared_with_the_base_and_with_the_best(
    adapter_path: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, an adapter that kept no record of its run and changes nothing, and a whole model."""
    paths = [shutil.copytree(adapter_path, tmp_path / name / "adapters") for name in ("good", "bad")]
    (paths[1] / "run_settings.yaml").unlink()
    weights = dict(mx.load(str(paths[1] / "adapters.safetensors")))
    mx.save_safetensors(str(paths[1] / "adapters.safetensors"), {name: 0 * value for name, value in weights.items()})

    figures = as_json([*map(str, paths), str(model_folder), "--rows", "1", "--max-tokens", "2"], capsys)

    good, bad, whole = "good", "bad", model_folder.name
    assert [model["name"] for model in figures["models"]] == ["base", good, bad, whole]
    (margin,) = (measure for measure in figures["measures"] if measure["name"] == "margin")
    assert margin["best"] == good
    assert [(compared["model"], compared["against"]) for compared in margin["comparisons"]] == [
        *((good, "base"), (bad, "base"), (whole, "base")),
        *((bad, good), (whole, good)),
    ]
    means = {model["name"]: model["mean"] for model in margin["models"]}
    assert means[whole] == means["base"] == pytest.approx(means[bad], abs=1e-6)
    assert means[good] > means["base"]
    for compared in margin["comparisons"]:
        assert compared["difference"] == pytest.approx(means[compared["model"]] - means[compared["against"]])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a"], ["tuned"]),
        (["x/cpo/adapters", "x/dpo/adapters"], ["cpo", "dpo"]),
        (["x/adapters", "x/adapters/best"], ["x", "best"]),
        (["x", "x/adapters"], ["x", "adapters"]),
        (["x/one", "y/one", "y/two"], ["x/one", "y/one", "two"]),
        (["base", "tuned"], ["r/base", "tuned"]),
    ],
)
def test_models_are_named_by_what_their_folders_differ_by(folders: list[str], names: list[str]) -> None:
    assert distinct_names([Path("/r") / folder for folder in folders]) == names


def test_a_model_that_reads_other_tokens_is_not_compared(
    adapter_path: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": config["chat_template"] + "{{ '\n' }}"})
    )

    assert cli.main(["compare", str(adapter_path), str(other)]) == 2

    assert f"Model '{other}' has another tokenizer or chat template" in capsys.readouterr().err


# How like the chosen answers


def reference_chrf(answer: str, reference: str, words: int = 0) -> float:
    """chrF2 of one sentence, in percent: the mean over orders that both have of precision and recall, then F."""
    texts: list[list[Any]] = [[answer.replace(" ", ""), reference.replace(" ", "")]] * 6
    texts += [[answer.split(), reference.split()]] * words
    precisions, recalls = [], []
    for size, sides in zip([*range(1, 7), *range(1, words + 1)], texts, strict=True):
        found, wanted = (Counter(tuple(side[at : at + size]) for at in range(len(side) - size + 1)) for side in sides)
        if found and wanted:
            matches = (found & wanted).total()
            precisions.append(matches / found.total())
            recalls.append(matches / wanted.total())
    precision, recall = (float(np.mean(values or [0])) for values in (precisions, recalls))
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize(("name", "words"), [("chrf", 0), ("chrf++", 2)])
def test_chrf_is_the_f_score_of_n_grams(name: str, words: int) -> None:
    pytest.importorskip("sacrebleu")
    answers = ["The goods cost under 20 euros", "", "a", "Das kostet nichts"]
    references = ["The goods cost less than 20 euros", "Yes", "a", "The goods are free"]

    each, corpus = text_metrics.chrf(name, answers, references)

    pairs = zip(answers, references, strict=True)
    np.testing.assert_allclose(each, [reference_chrf(*pair, words) for pair in pairs], atol=1e-6)
    assert min(each) < corpus < max(each)


def test_length_repetition_and_end_are_those_of_an_answers_tokens() -> None:
    given = [Answer("a b c", True, (1, 2, 3)), Answer("a a a a a", False, (1, 1, 1, 1, 1)), Answer("", True)]

    values = {measure.name: answer_values(measure, given).tolist() for measure in text_metrics.OF_ANSWERS}

    assert values == {"length": [3, 5, 0], "repetition": [0, pytest.approx(2 / 3), 0], "ended": [1, 0, 1]}


def test_chrf_is_that_of_the_answers_and_the_rows_chosen_ones(
    adapter_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu")
    words = [str(adapter_path), "--prompt", PROMPT, "--rows", "all", "--max-tokens", "8", "--metric", "chrf"]

    figures = as_json(words, capsys)

    (entry,) = (measure for measure in figures["measures"] if measure["name"] == "chrf")
    rows = [answer for answer in figures["answers"] if answer["chosen"] is not None]
    assert entry["count"] == len(rows) == 4
    for place, model in enumerate(entry["models"]):
        each = [reference_chrf(row["models"][place]["text"], row["chosen"]) for row in rows]
        assert model["mean"] == pytest.approx(np.mean(each), abs=0.01)
        assert 0 <= model["corpus"] <= 100


def test_a_missing_package_for_a_metric_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)

    assert cli.main(["compare", str(tmp_path), "--metric", "chrf"]) == 2

    assert capsys.readouterr().err == (
        "error: --metric chrf needs sacrebleu; run pip install 'mlx-cpo-plugin[compare]'.\n"
    )
