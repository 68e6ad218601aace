"""``mlx-cpo check`` prints what training would see, without loading a model."""

import io
import json
import re
import shutil
import sys

import mlx.core as mx
import pytest
from support.data_tokenizers import tokenizer_named
from support.refusals import refused
from support.stranger_plugins import JudgedPlugin, registered

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.commands import check
from mlx_cpo_plugin.commands.check import run_check
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.run import preflight
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.types import TrainMode


@pytest.fixture
def checked(tmp_path, model_folder, monkeypatch):
    """Run the check on some rows and return what it prints."""
    monkeypatch.setattr(preflight, "check_vocabulary", lambda *_: None)  # the tokenizer has more tokens than the model
    model = tmp_path / "model"
    tokenizer_named("chatml")._tokenizer.save_pretrained(model)
    shutil.copy(model_folder / "config.json", model)
    shutil.copy(model_folder / "model.safetensors", model)

    def run(rows, stream=None, timed=False, **others):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given = {
            "train_mode": "cpo",
            "train": True,
            "model": str(model),
            "data": str(path),
            "adapter_path": str(tmp_path / "adapters"),
            "max_seq_length": 512,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "iters": 6,
        }
        stream = stream or io.StringIO()
        settings = config.resolve({**given, **others}).settings
        run_check(settings, train_modes()["cpo"], stream=stream, examples=1, timed=timed)
        assert not (tmp_path / "adapters").exists()
        return stream.getvalue()

    return run


ROWS = [{"prompt": "What is it?", "chosen": f"Yes, the cat {i}.", "rejected": "No."} for i in range(5)]


def test_it_counts_rows_and_says_what_is_skipped(checked):
    output = checked([*ROWS, {"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}])

    assert "Train: 6 rows, 5 pairs, 1 skipped (both answers are the same: train.jsonl:6).\n" in output
    assert "Valid: No validation set, so validation is skipped" in output


def test_it_gives_lengths_steps_and_the_length_bias(checked):
    rows = [*ROWS, {"prompt": "Who?", "chosen": "No.", "rejected": "Yes, yes, yes."}]

    output = " ".join(checked(rows).split())

    assert " rejected 3 10 13 " in output
    assert "Whole with max_seq_length 26: 95% of the pairs; with 26: all" in output
    assert "Length bias: the chosen answer is the longer one in 83% of the pairs" in output
    assert "Steps per epoch: 3 iterations, 2 optimizer steps (batch_size 2, gradient_accumulation_steps 2)" in output


def test_batches_by_tokens_are_counted_as_training_cuts_them(checked):
    output = checked(ROWS, batch_tokens=70, gradient_accumulation_steps=2)

    assert "Steps per epoch: 3 iterations, 2 optimizer steps (batch_tokens 70, gradient_accumulation" in output


def test_it_says_what_the_run_amounts_to(checked):
    assert "Steps of the run: 6 iterations, 4 optimizer steps, 2 epochs\n" in checked(ROWS)
    assert "Steps of the run: 9 iterations, 6 optimizer steps, 3 epochs\n" in checked(ROWS, iters=None, epochs=3)


def test_a_test_set_at_fault_that_the_run_does_not_read_is_noted(checked, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text("{broken\n")

    assert "Test: left out, since the run has no test: true, and it is at fault: " in checked(ROWS, data=str(folder))
    with refused(DataError, "test.jsonl"):
        checked(ROWS, data=str(folder), test=True)


def test_of_a_model_that_is_not_fetched_yet_it_says_what_is_not_looked_at(checked, monkeypatch):
    monkeypatch.setattr(check, "is_on_this_machine", lambda model: False)

    output = checked(ROWS)

    assert "Not looked at, since the model has not been fetched yet: memory, lora_parameters.keys" in output
    assert "First pairs" in output


def test_it_estimates_memory_without_loading_the_model(model_folder, data_folder, monkeypatch):
    given = {"model": str(model_folder), "data": str(data_folder), "train": True, "train_mode": "cpo"}
    settings = config.resolve(given).settings
    monkeypatch.setattr(check, "device_memory", lambda: 1_000_000)
    stream, before = io.StringIO(), mx.get_active_memory()
    mx.reset_peak_memory()

    run_check(settings, train_modes()["cpo"], stream=stream)

    assert mx.get_peak_memory() - before < 100_000
    assert re.search(
        r"\nEstimate: about 0\.\d+ GB of memory \(.*train\.jsonl:\d+\); this device has 0\.001 GB", stream.getvalue()
    )
    assert "\nWarning: this device has less memory than that; lower max_seq_length" in stream.getvalue()


def test_it_counts_what_is_cut(checked):
    output = checked([*ROWS, {"prompt": "cat " * 30, "chosen": "Yes.", "rejected": "No."}], max_seq_length=32)

    assert "Cut to max_seq_length 32: prompt in 1, answer in 0 of 6 pairs" in output
    assert re.search(r"\n  prompt +14 +35 +42 +14 +25 +29\n", output), "lengths before the cut, and what it leaves"


def test_it_names_the_columns_that_are_read_and_those_that_are_not(checked):
    rows = [{**row, "system": "Be brief.", "score": 1} for row in ROWS]

    assert "Train, columns read: chosen: chosen; rejected: rejected; prompt: prompt; system: system\n" in checked(rows)
    assert "  not read: score\n" in checked(rows)


def test_it_marks_the_scored_tokens_of_the_first_rows(checked):
    output = checked(ROWS)

    assert output.endswith(
        "train.jsonl:1\n"
        "  prompt:   <|im_start|>user\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\n\n"
        "  chosen:   ⟦Yes, the cat 0.<|im_end|>⟧\n"
        "  rejected: ⟦No.<|im_end|>⟧\n"
    )


def test_context_inside_an_answer_stays_outside_the_marks(checked):
    def turns(*words):
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(words)]

    row = {"chosen": turns("Who?", "Me.", "Sure?", "Yes."), "rejected": turns("Who?", "No.")}

    assert (
        "chosen:   ⟦Me.<|im_end|>⟧\\n<|im_start|>user\\nSure?<|im_end|>\\n<|im_start|>assistant\\n⟦Yes.<|im_end|>⟧"
        in checked([row])
    )


def test_a_terminal_gets_colour(checked):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert "⟦\x1b[32mNo.<|im_end|>\x1b[0m⟧" in checked(ROWS, stream=Terminal())


def test_a_model_without_a_tokenizer_is_an_error_of_one_sentence(checked, tmp_path):
    (tmp_path / "empty").mkdir()

    with refused(ConfigError, "tokenizer", key="model"):
        checked(ROWS, model=str(tmp_path / "empty"))


def test_a_set_that_the_run_asks_for_and_does_not_have_is_an_error_after_the_report(checked):
    stream = io.StringIO()

    with refused(DataError, key="test"):
        checked(ROWS, stream=stream, test=True)

    assert "Train: 5 rows, 5 pairs." in stream.getvalue()


def test_data_without_rows_is_an_error(checked):
    with refused(DataError, key="train"):
        checked([])


def test_a_mode_that_reads_its_rows_itself_gets_them_counted(model_folder):
    mode = TrainMode("odd", "Odd", "", lambda *_: ([1, 2, 3], [4], []), lambda *_: None, lambda *_: {})
    settings = config.resolve(
        {"train_mode": "cpo", "train": True, "model": str(model_folder), "batch_size": 2, "iters": 8}
    )
    stream = io.StringIO()

    run_check(settings.settings, mode, stream=stream)

    assert stream.getvalue() == (
        "Train: 3 rows.\nValid: 1 rows.\nTest: 0 rows.\n\n"
        "Steps per epoch: 2 iterations, 2 optimizer steps (batch_size 2, gradient_accumulation_steps 1)\n"
        "Steps of the run: 8 iterations, 8 optimizer steps, 4 epochs\n"
    )


def test_sets_that_such_a_mode_leaves_out_are_empty(model_folder):
    mode = TrainMode("odd", "Odd", "", lambda *_: ([1, 2], None, None), lambda *_: None, lambda *_: {})
    settings = config.resolve({"train_mode": "cpo", "train": True, "model": str(model_folder)}).settings
    stream = io.StringIO()

    run_check(settings, mode, stream=stream)

    assert stream.getvalue().startswith("Train: 2 rows.\nValid: 0 rows.\nTest: 0 rows.\n")


def test_check_knows_every_registered_mode(monkeypatch, model_folder, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with registered(JudgedPlugin()):
        code = cli.main(["check", "--train-mode", "judged", "--temper", "2", "--model", str(model_folder)])

    assert code == 0
    assert "Train: 0 rows." in capsys.readouterr().out
