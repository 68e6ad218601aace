"""Hostile input: what the readers are given, they take or refuse in one sentence, and never run, hang or break."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fuzz
import pyarrow
import pytest
from pyarrow import parquet
from support.data_tokenizers import tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.report import DataReport
from mlx_cpo_plugin.data.rows import parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import ConfigError, DataError, named, shown
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import load_model
from mlx_cpo_plugin.settings import command_line, config

HEAD = "train_mode: cpo\ntrain: true\n"
PAIR = {"prompt": "What is the answer?", "chosen": "Yes, it is.", "rejected": "No."}


def refusal(folder: Path, content: str | bytes) -> str:
    """The error for a YAML file, with the file's name in place of its path."""
    file = folder / "my.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    call = {"config": str(file)}
    command_line.requested_mode(call)
    with pytest.raises(ConfigError) as caught:
        config.resolve(call)
    fuzz.check_sentence(str(caught.value))
    return str(caught.value).replace(str(file), "my.yaml")


def refused_call(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config.resolve({"train_mode": "cpo", "train": True, **values})
    fuzz.check_sentence(str(caught.value))
    return str(caught.value)


def load(data: str | Path = "unused", **others: Any) -> Any:
    settings = config.RunSettings.of({"data": str(data), "train": True, "max_seq_length": 200, **others})
    return load_dataset(settings, tokenizer_named("chatml"))


def refused_data(data: str | Path = "unused", **others: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(data, **others)
    fuzz.check_sentence(str(caught.value))
    return str(caught.value)


def reason(**fields: Any) -> str:
    with pytest.raises(UnusableRow) as caught:
        parse_row({**PAIR, **fields}, Columns())
    return str(caught.value)


@pytest.mark.parametrize(("target", "inputs"), [("config", 300), ("rows", 300)])
@pytest.mark.slow
def test_every_hostile_input_is_taken_or_refused_in_one_sentence(target: str, inputs: int) -> None:
    tally = fuzz.fuzz(target, range(inputs), seed=12, limit=30, on_failure=lambda *_: None)

    assert tally.failures == []
    assert tally.outcomes["accepted"] > inputs / 30
    assert len(tally.sentences) > 60


def break_down(*_: object) -> None:
    raise KeyError("broken")


def go_on_for_ever(*_: object) -> None:
    while True:
        pass


def say_two_lines(*_: object) -> None:
    raise ConfigError("One line\nand another.")


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (break_down, "KeyError: 'broken'"),
        (go_on_for_ever, "no answer within"),
        (say_two_lines, "not one printable line"),
    ],
)
def test_an_input_that_breaks_hangs_or_is_told_in_two_lines_is_a_failure(
    run: Callable[..., None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz.hostile_configs, "run", run)
    written = []

    tally = fuzz.fuzz("config", range(1), seed=0, limit=0.05, on_failure=lambda *failure: written.append(failure))

    assert tally.outcomes == {"failed": 1}
    assert fault in tally.failures[0][1]
    assert written[0][1] == fuzz.case_of("config", 0, 0)


def test_a_process_that_was_paused_has_half_the_time_left() -> None:
    with fuzz.time_limit(1000):
        signal.raise_signal(signal.SIGALRM)  # which is due as soon as the process goes on
        with pytest.raises(fuzz.HangError):
            signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_an_input_is_the_same_after_it_was_written_to_a_file(target: str) -> None:
    cases = [fuzz.case_of(target, 3, number) for number in range(50)]

    assert repr(json.loads(json.dumps(cases))) == repr(cases)


# Configuration files


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [canary]",
        "!!python/object/new:os.mkdir [canary]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
    ],
)
def test_a_file_runs_no_code(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert "could not determine a constructor" in refusal(tmp_path, f"{HEAD}model: {value}\n")
    assert command_line.explicit(["--lora-parameters", value])["lora_parameters"] == value
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"{HEAD}a\x1b: 1\n", "my.yaml, line 3 is not valid YAML: special characters are not allowed."),
        (f'{HEAD}"a\\nb": 1\n', "Unknown key a\\nb in my.yaml, line 3; did you mean wandb?"),
        (f'{HEAD}"\\e[2J": 1\n', "Unknown key \\x1b[2J in my.yaml, line 3; remove it."),
        (f"{HEAD}? [a]\n: 1\n", "my.yaml, line 3 has a list or a mapping as a key; write the name of a setting."),
        (f"{HEAD}beta: !!bool x\n", "my.yaml is not valid YAML: 'x'."),
        (f"{HEAD}beta: {'[' * 600}1{']' * 600}\n", "my.yaml is not valid YAML: maximum recursion depth exceeded."),
    ],
)
def test_odd_files_are_refused_by_name_and_line(content: str, sentence: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, content) == sentence


def test_a_configuration_that_is_no_path_is_refused() -> None:
    assert refused_call(config=5) == "config is 5, but must be the path of a YAML file."
    assert "cannot be read (" in refused_call(config="a\0b")


def test_a_train_mode_that_is_not_text_asks_for_no_mode(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train_mode: [cpo]\n")

    assert command_line.requested_mode({"train_mode": 5}) is None
    assert command_line.requested_mode({"config": str(tmp_path / "my.yaml")}) is None


def test_keys_of_a_call_that_are_not_text_are_unknown() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown key 5 in the call; remove it\.$"):
        config.resolve({"train_mode": "cpo", "train": True, 5: 6})  # type: ignore[dict-item]


def test_a_value_is_shown_on_one_line_of_a_readable_length() -> None:
    assert len(shown("y" * 10**6)) == 60
    assert len(named("y" * 10**6)) == 300
    assert named("a\nb\x1b\ud800é") == "a\\nb\\x1b\\ud800é"


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "a\\b", "..", ".", ""])
def test_lm_studio_gets_the_model_in_a_folder_of_its_own(name: str) -> None:
    sentence = refused_call(lm_studio_name=name)

    assert sentence.endswith("in the call, but must be the name of a folder without / and \\, or null.")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer_config": {"adam": {"betas": "x"}}}, "optimizer_config.adam.betas is 'x' in the call, but must be"),
        ({"optimizer_config": {"adam": {"betas": [0.9]}}}, "must be a list of 2 numbers."),
        ({"optimizer_config": {"adam": {"betas": [0.9, float("nan")]}}}, "must be a list of 2 numbers."),
        ({"optimizer_config": {"adamw": {"eps": float("nan")}}}, "optimizer_config.adamw.eps is nan in the call, but"),
        (
            {"hf_dataset": {"path": "x", "train_split": 5}},
            "hf_dataset.0.train_split is 5 in the call, but must be text",
        ),
        ({"hf_dataset": {"path": "x", "config": 5}}, "hf_dataset.0.config is 5 in the call, but must be a name or"),
        ({"hf_dataset": {"path": "x", "config": {"cache_dir": "/x"}}}, "Unknown key hf_dataset.0.config.cache_dir in"),
        ({"hf_dataset": {"path": "x", "config": {"trust_remote_code": True}}}, "config.trust_remote_code in the call;"),
    ],
)
def test_what_is_passed_on_to_libraries_is_checked_before(values: dict[str, Any], words: str) -> None:
    assert words in refused_call(**values)


# Rows


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chosen": {"content": "", "tool_calls": 5}}, "the tool calls are not a list"),
        ({"prompt": {"messages": [], "tools": "9" * 5000}}, "the tools are not a list"),
        ({"tools": "[" * 100_000}, "the tools are not a list"),
        ({"chosen": {"role": ["a"] * 90, "content": "x"}}, "a message has the unknown role ['a', 'a', 'a', 'a', 'a', "),
        ({"chosen": {"role": "a\nb", "content": "x"}}, "a message has the unknown role 'a\\nb'"),
        ({"chosen": {"role": "", "content": "x"}}, "a message has no role"),
    ],
)
def test_fields_of_the_wrong_kind_make_a_row_unusable(fields: dict[str, Any], expected: str) -> None:
    assert reason(**fields).startswith(expected)
    assert len(reason(**fields)) < 120


@pytest.mark.parametrize("arguments", ["9" * 5000, "[" * 100_000])
def test_arguments_of_a_call_that_are_not_json_stay_text(arguments: str) -> None:
    call = {"function": {"name": "think", "arguments": arguments}}

    row = parse_row({**PAIR, "chosen": {"content": "", "tool_calls": [call]}}, Columns())

    assert row.chosen[-1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_row_that_is_nested_too_deeply_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = {"a": deep}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [PAIR, {**PAIR, "tools": [deep]}])

    train, _, _ = load(hf_dataset=[{"path": "x", "train_split": "train", "valid_split": None}])

    assert len(train) == 1
    assert train.report.skipped == {"the row is nested too deeply": ["x train:2"]}


@pytest.mark.parametrize("column", ["completions", "scores"])
def test_several_answers_that_are_nested_too_deeply_are_left_out(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = "a"
    for _ in range(3000):
        deep = [deep]
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2], column: deep}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [PAIR, row])

    train, _, _ = load(hf_dataset=[{"path": "x", "train_split": "train", "valid_split": None}])

    assert len(train) == 1
    assert sum(map(len, train.report.skipped.values())) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("./" + "x" * 300, "which cannot be read (File name too long): check the path."),
        ("~nobody-of-this-name/x", "which cannot be read (Could not determine home directory): check the path."),
        ("./a\nb", "data names ./a\\nb, which does not exist"),
        ("./a\0b", "data names ./a\\x00b, which does not exist"),
    ],
)
def test_a_path_that_cannot_be_looked_up_is_named(data: str, words: str) -> None:
    assert words in refused_data(data)


def test_the_name_of_a_file_stays_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "odd\nname.jsonl"
    file.write_text(json.dumps(PAIR))

    train, _, _ = load(file)

    assert train[0].source == "odd\\nname.jsonl:1"


def test_parquet_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    text = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": ["a"], "chosen": text, "rejected": ["b"]}), tmp_path / "train.parquet")

    assert "train.parquet is not a Parquet file that can be read" in refused_data(tmp_path)


def test_columns_are_listed_up_to_a_dozen(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({f"column {i}\n": "x" for i in range(5000)}))

    assert "column 11\\n and 4988 more)." in refused_data(tmp_path)


def test_reasons_are_listed_up_to_eight() -> None:
    report = DataReport("train", rows=20, skipped={f"reason {i}": ("x:1",) for i in range(20)})

    assert report.summary().endswith(
        "20 skipped (" + "; ".join(f"reason {i}: x:1" for i in range(8)) + " and 12 more)."
    )


def test_end_tokens_that_repeat_are_all_taken_off() -> None:
    tokenizer = ChatTokenizer(tokenizer_named("chatml"))

    assert tokenizer.without_end("yes <|im_end|>" + "<|im_end|> \n" * 100_000) == ("yes ", tokenizer.eos_id)
    assert tokenizer.without_end("yes \n") == ("yes \n", None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("x", "hf_dataset has an entry without a path"),
        ({"path": "x", "config": {5: 6}}, "the dataset 'x' cannot be loaded (keywords must be strings)"),
    ],
)
def test_entries_of_the_wrong_kind_are_refused(entry: Any, words: str) -> None:
    assert words in refused_data(hf_dataset=[entry])


def test_the_configuration_of_a_hub_dataset_is_passed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: asked.append((name, options)) or [PAIR])

    load(hf_dataset=[{"path": "me/rows", "config": "main", "train_split": "train", "valid_split": None}])

    assert asked == [(("me/rows",), {"name": "main", "split": "train"})]


def test_a_hub_row_that_cannot_be_decoded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: ({}[number] for number in range(3)))

    assert "a row of the dataset 'x' cannot be read (0): check its columns." in refused_data(
        hf_dataset=[{"path": "x", "train_split": "train"}]
    )


# Code that a model brings along


@pytest.fixture
def model_with_code(model_folder: Path, tmp_path: Path) -> Path:
    """A model whose folder asks for code of its own, for the tokenizer and for the layers."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "evil.py").write_text("import os\nos.mkdir('canary')\n")
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_in_the_folder_of_a_tokenizer_is_not_run(
    model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    change(model_with_code / "tokenizer_config.json", **tokenizer)

    with refused(ConfigError, key="model"):
        load_chat_tokenizer(str(model_with_code))

    assert not (tmp_path / "canary").exists()


def test_code_in_the_folder_of_a_model_is_not_run(
    model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change(model_with_code / "config.json", model_file="evil.py")
    resolved = config.resolve({"train_mode": "cpo", "train": True, "model": str(model_with_code)})

    with refused(ConfigError, "custom module", key="model"):
        load_model(resolved.settings)

    assert not (tmp_path / "canary").exists()
