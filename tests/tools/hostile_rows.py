"""Hostile rows of preferences: jsonl, json, Parquet and hub data sets, made by a grammar and by spoiling valid rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow
from hostile_configs import Case, spoil_bytes
from pyarrow import parquet
from support.data_tokenizers import tokenizer_named

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.dataset import PreferenceDataset
from mlx_cpo_plugin.settings.config import RunSettings

TOKENIZERS = (
    "chatml",
    "headers",
    "thinking",
    "no_system",
    "tools_last",
    "bare",
    "no_template",
    "no_end",
    "next_speaker",
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CALL = {"id": "c1", "type": "function", "function": {"name": "think", "arguments": '{"what": [1, {"a": null}]}'}}
TOOL = {"type": "function", "function": {"name": "think", "description": None, "parameters": {"type": "object"}}}
# One row of every form in which preferences are published.
VALID: tuple[dict[str, Any], ...] = (
    {"prompt": "What is the answer?", "chosen": "Yes, it is.", "rejected": "No."},
    {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4", "system": "Be brief."},
    {"chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("What?")]},
    {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]},
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"value": "x"},
    },
    {
        "input": {"messages": [user("Hi")], "tools": [TOOL]},
        "preferred_output": [assistant("A")],
        "non_preferred_output": [assistant("B")],
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
    {"chosen": "The cat is on the mat.", "rejected": "The cat is in the fog."},
    {
        "messages": [{"role": "system", "content": "Rules."}, user("a"), assistant("b"), user("c")],
        "chosen": "d",
        "rejected": "e",
    },
    {
        "prompt": [user("Hi")],
        "chosen": [{**assistant(""), "tool_calls": [CALL]}],
        "rejected": [assistant("No")],
        "tools": [TOOL],
    },
    {"question": "Q", "response_j": "yes", "response_k": "no", "tools": json.dumps([TOOL])},
    {
        "prompt": [user("a")],
        "chosen": [assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("x"), user("c"), assistant("y")],
    },
)


def nested(opening: Callable[[Any], Any], depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = opening(value)
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 5, 2**63, 10**300, 0.5, math.nan, math.inf, -math.inf, "", " ", "\n", "\0", "x"),
    *(
        "\ud800",
        "a\udfffb",
        "\ue000",
        "\u202e",
        "<|im_end|>",
        "<|im_end|>" * 50,
        "<|bos|><|eos|>",
        "<think>",
        "</think>x",
    ),
    *("[", "[]", "{}", "null", "1" * 5000, "[" * 5000, "\x1b[31m", "{{ 7 * 7 }}", "{% raw %}"),
    *("word " * 400, "é" * 300, "z" * 3000, "\n\nHuman:", "\n\nHuman: a\n\nAssistant:"),
    *("\n\nAssistant: b\n\nHuman: c", "Human: a", "system", "function_call"),
    *([], {}, [[]], [None], [5], [""], {"": ""}, {"role": 5}, {"role": "user"}, {"role": ["a"]}, {"content": "x"}),
    *(
        {"role": "ü" * 500, "content": "x"},
        {"role": "a\nb", "content": 5},
        {"type": "image"},
        [{"type": "text", "text": 5}],
    ),
    *([{"type": ["a\nb"], "text": None}], [{"type": "text", "text": {"a": 1}}], {"messages": 5}, {"messages": []}),
    *({"from": None, "value": 5}, {"role": "tool", "content": [1]}, {"name": 5}, {"function": {"name": ["x"]}}),
    *(
        {"function": {"name": "think", "arguments": "[" * 3000}},
        {"name": "f", "arguments": "9" * 5000},
        {"function": 5},
    ),
    *(
        nested(lambda v: [v], 90),
        nested(lambda v: {"a": v}, 300),
        nested(lambda v: [{"a": v}], 200),
        [0] * 300,
        [{}] * 50,
    ),
)
NAMES = (
    *("chosen", "rejected", "prompt", "system", "messages", "role", "content", "from", "value", "tools", "tool_calls"),
    *(
        "function",
        "name",
        "arguments",
        "type",
        "text",
        "data",
        "auto",
        "",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "k" * 3000,
        "add_generation_prompt",
    ),
)
FEATURES = ("chosen_feature", "rejected_feature", "prompt_feature", "system_feature")
FOLDERS = (
    "missing",
    "a\nb",
    "~nobody/x",
    "x" * 300,
    "y" * 5000,
    "a\0b",
    "loop",
    "empty",
    "pipe",
    ".",
    "../nowhere/",
    "nul\0.jsonl",
)
PARQUET_TYPES = (
    "binary",
    "large_string",
    "float64",
    "timestamp[ns]",
    "bool",
    "int64",
    "decimal128(38, 3)",
    "null",
    "dictionary",
)


def make(random: Random) -> Case:
    """Data: its form, its content (as Latin-1 text where it is bytes), settings, and the name of a tokenizer."""
    rows = [row(random) for _ in range(random.randint(1, 5))]
    settings: dict[str, Any] = {
        "max_seq_length": random.choice((4, 5, 9, 40, 2048)),
        "valid_fraction": random.choice((0.0, 0.5)),
    }
    settings["train"], settings["test"] = random.choice(((True, False), (True, True), (False, True)))
    if random.random() < 0.1:
        settings[random.choice(FEATURES)] = random.choice((*NAMES, *VALID[0], "nonsense"))
    case: Case = {"tokenizer": random.choice(TOKENIZERS), "settings": settings, "form": "jsonl", "name": "train"}
    kind = random.random()
    if kind < 0.03:
        return case | {"form": "path", "name": random.choice(FOLDERS)}
    if kind < 0.15:
        kinds = {
            name: random.choice(PARQUET_TYPES)
            for name in map(str, rows[0] if isinstance(rows[0], dict) else ())
            if random.random() < 0.2
        }
        return case | {
            "form": "parquet",
            "rows": rows,
            "types": kinds,
            "cut": random.choice((None, None, None, None, 0, 100, -9)),
        }
    if kind < 0.25:
        return case | {"form": "hub", "rows": rows, "entry": entry(random)}
    if kind < 0.4:
        holder: Any = random.choice(
            (rows, rows, {"data": rows}, {"data": rows}, {"data": {}}, rows[0], random.choice(VALUES))
        )
        content = json.dumps(holder, ensure_ascii=random.random() < 0.5, indent=random.choice((None, 2)))
        case["form"] = "json"
    else:
        content = random.choice(("\n", "\r\n", "\n\n")).join(line(one, random) for one in rows)
    data = content.encode("utf-8", "surrogatepass")
    if random.random() < 0.25:
        data = spoil_bytes(data, random)
    return case | {
        "name": random.choice(("train", "train", "train", "dev", "odd\nname")),
        "content": data.decode("latin-1"),
    }


def row(random: Random) -> Any:
    """A row, valid or with up to three things wrong."""
    value: Any = deepcopy(random.choice(VALID))
    for _ in range(random.choice((0, 0, 0, 1, 1, 1, 2, 3))):
        value = spoil(value, random)
    return value


def spoil(value: Any, random: Random) -> Any:
    """``value`` with one thing inside it replaced, removed, renamed, added or wrapped."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        change = random.random()
        if change < 0.65:
            value[name] = spoil(value[name], random)
        elif change < 0.75:
            del value[name]
        elif change < 0.85:
            value[random.choice(NAMES)] = value.pop(name)
        else:
            value[random.choice(NAMES)] = deepcopy(random.choice(VALUES))
        return value
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        if random.random() < 0.8:
            value[place] = spoil(value[place], random)
        else:
            value.insert(place, deepcopy(random.choice((value[place], *VALUES))))
        return value
    return random.choice(
        (deepcopy(random.choice(VALUES)), deepcopy(random.choice(VALUES)), [value], {"content": value}, str(value))
    )


def line(value: Any, random: Random) -> str:
    """One line of a jsonl file."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    change = random.random()
    if change < 0.9:
        return text
    if change < 0.93 and text.startswith("{"):
        return '{"chosen": 5, "chosen": "again", ' + text[1:]
    return random.choice(
        (
            "[" * 100_000,
            '{"a":' * 5000,
            "9" * 5000,
            "-",
            "NaN",
            "1e999",
            text + text,
            text + ",",
            "\ufeff" + text,
            "null",
            "\t",
        )
    )


def entry(random: Random) -> Any:
    """An entry of ``hf_dataset``."""
    value: dict[str, Any] = {"path": "rows", "train_split": "train", "test_split": "test"}
    for _ in range(random.randint(0, 2)):
        value[random.choice((*FEATURES, "path", "config", "train_split", "valid_split"))] = random.choice(
            (*VALUES, "main", {"name": "main"}, {"split": "x"}, {"path": "x"}, "broken", ["a"])
        )
    return random.choice((value, [value], [value, value], [value, 5]))


def run(case: Case, folder: Path) -> None:
    """Load data as a run does, and look at the pairs.

    Raises:
        UserError: the data is refused.
        AssertionError: a pair cannot be trained on, or the report is more than a line.
    """
    settings = RunSettings.of({"data": str(folder), **case["settings"]})
    files = place(case, folder, settings)
    try:
        with mock.patch.object(datasets, "load_dataset", hub(case)):
            splits = load_dataset(settings, tokenizer_named(case["tokenizer"]))
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    for split in splits:
        assert split.report.summary().isprintable(), "the report is more than one line"
        assert len(split.report.summary()) < 5000, "the report is too long"
        check_pairs(split, settings.max_seq_length)


def check_pairs(split: PreferenceDataset, max_seq_length: int) -> None:
    """Every pair has a prompt, two answers that differ, something to score, and fits."""
    for pair in split:
        assert len(pair.prompt) > 0
        assert pair.length <= max_seq_length
        assert not np.array_equal(pair.chosen, pair.rejected)
        for ids, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
            assert ids.dtype == np.int32
            assert ids.shape == scored.shape
            assert scored.any()


def place(case: Case, folder: Path, settings: RunSettings) -> list[Path]:
    """Write the files of a case, let ``settings`` name them, and return them."""
    if case["form"] == "path":
        if case["name"] == "loop":
            (folder / "loop").symlink_to(folder / "loop")
        elif case["name"] == "pipe":
            os.mkfifo(folder / "pipe")
        settings.data = case["name"] if case["name"].startswith("~") else f"{folder}/{case['name']}"
        return [folder / case["name"]] if case["name"] in ("loop", "pipe") else []
    if case["form"] == "hub":
        settings.hf_dataset = case["entry"]
        return []
    files = [folder / f"{case['name']}.{case['form']}", folder / f"test.{case['form']}"]
    for file in files:
        if case["form"] == "parquet":
            write_parquet(case, file)
        else:
            file.write_bytes(case["content"].encode("latin-1"))
    if case["name"] not in ("train", "dev"):
        settings.data = str(files[0])
    return files


def write_parquet(case: Case, file: Path) -> None:
    """Rows as a Parquet file of odd types, cut short where the case says so."""
    rows = [one if isinstance(one, dict) else {"value": one} for one in case["rows"]]
    columns = {}
    for name in dict.fromkeys(name for one in rows for name in one):
        columns[name] = column([one.get(name) for one in rows], case["types"].get(name))
    try:
        parquet.write_table(pyarrow.table(columns), file)
    except (pyarrow.ArrowException, UnicodeError):  # a name that Arrow does not hold, or a struct without fields
        parquet.write_table(pyarrow.table({"chosen": ["a"]}), file)
    if case["cut"] is not None:
        file.write_bytes(file.read_bytes()[: case["cut"]])


def column(values: list[Any], kind: str | None) -> pyarrow.Array:
    """Values as Arrow holds them; as text where they have no common type."""
    try:
        if kind == "binary":  # text that is not UTF-8, which Arrow does not check
            return pyarrow.array([str(value).encode("utf-16") for value in values]).view(pyarrow.string())
        if kind == "dictionary":
            return pyarrow.array([str(value) for value in values]).dictionary_encode()
        if kind in ("timestamp[ns]", "decimal128(38, 3)", "float64", "int64", "bool"):
            numbers = pyarrow.array([2**62 - 7 * i for i in range(len(values))])
            wanted = pyarrow.decimal128(38, 3) if kind.startswith("decimal") else pyarrow.type_for_alias(kind)
            return numbers.cast(wanted, safe=False)
        return pyarrow.array(values, None if kind is None else pyarrow.type_for_alias(kind))
    except (pyarrow.ArrowException, UnicodeError, OverflowError):
        return pyarrow.array([str(value).encode("utf-8", "replace").decode() for value in values])


class Rows(list[Any]):
    """Rows as the library gives them, which can be taken in part."""

    def select(self, indices: range) -> Rows:
        return Rows(self[i] for i in indices)


def hub(case: Case) -> Callable[..., Any]:
    """What stands in for ``datasets.load_dataset``: rows, or an error of many lines."""

    def load(path: str, name: str | None = None, split: Any = None, **options: Any) -> Any:
        if not isinstance(split, str | None) or options:
            raise ValueError(f"no such\nsplit: {split!r}")
        found = Rows(case["rows"]) if split != "broken" else ({}[row] for row in case["rows"])
        return found if split else {"train": found}

    return load
