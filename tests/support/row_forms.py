"""One preference in every form in which it is published, and every way by which such rows reach the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from mlx_lm_lora.trainer import datasets as host_datasets

import mlx_cpo_plugin
from mlx_cpo_plugin.data import PreferencePair, load_dataset
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.call import pairs_of

mlx_cpo_plugin.activate()

UNLIMITED = 1 << 20

Message = dict[str, Any]
RawRow = dict[str, Any]


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, all as messages of OpenAI's kind without anything beside."""

    system: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] = field(default_factory=list)

    @property
    def before(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.prompt]

    def row(self, **columns: Any) -> RawRow:
        return {**columns, **({"tools": self.tools} if self.tools else {})}


# Text as people write it, some of it like a list; no line of it reads "Human:", which is a format of its own.
TEXTS = st.text(st.sampled_from("abcé é🦄中.,:'\"[]{}<>\n "), min_size=1, max_size=20).filter(lambda text: text.strip())
# In one order: columnar files give all rows the order of the first.
ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"city": TEXTS, "days": st.integers(0, 9), "where": st.fixed_dictionaries({}, optional={"at": TEXTS})}
).map(lambda arguments: dict(sorted(arguments.items())))
CALLS = st.builds(
    lambda name, arguments: [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    st.sampled_from(["look", "weather"]),
    ARGUMENTS,
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]


def wide(name: str) -> list[Message]:
    function = {"name": name, "arguments": {"city": "a", "days": 1, "where": {"at": "b"}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "A cat."},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "It purrs."},
    ]


# A row whose columns have everything: Parquet cannot hold objects of which no row has a field.
WIDEST = Preference(
    system="Be kind.",
    prompt=[{"role": "user", "content": "What is it?"}, *wide("look"), {"role": "user", "content": "Sure?"}],
    chosen=wide("look"),
    rejected=wide("weather"),
    tools=TOOLS,
)


def users() -> st.SearchStrategy[Message]:
    return st.builds(lambda text: {"role": "user", "content": text}, TEXTS)


def assistants() -> st.SearchStrategy[Message]:
    said = st.builds(lambda text: {"role": "assistant", "content": text}, TEXTS)
    thought = st.builds(lambda text, thoughts: {**text, "reasoning_content": thoughts}, said, TEXTS)
    called = st.builds(lambda calls: {"role": "assistant", "content": "", "tool_calls": calls}, CALLS)
    return st.one_of(said, said, thought, called)


def exchanges() -> st.SearchStrategy[list[Message]]:
    """What an assistant does in its turn: it speaks, or it calls, is answered and speaks."""
    spoken = st.builds(lambda message: [message], assistants())
    used = st.builds(
        lambda calls, result, text: [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": text},
        ],
        CALLS,
        TEXTS,
        TEXTS,
    )
    return st.one_of(spoken, spoken, used)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    earlier: list[Message] = []
    for _ in range(draw(st.integers(0, 2))):
        earlier += [draw(users()), *draw(exchanges())]
    chosen, rejected = draw(st.tuples(exchanges(), exchanges()).filter(lambda answers: differ(*answers)))
    return Preference(
        system=draw(st.one_of(st.just(""), TEXTS)),
        prompt=[*earlier, draw(users())],
        chosen=chosen,
        rejected=rejected,
        tools=draw(st.sampled_from([[], TOOLS])),
    )


def differ(chosen: list[Message], rejected: list[Message]) -> bool:
    said = [
        [(message["role"], message["content"].strip(), message.get("tool_calls")) for message in side]
        for side in (chosen, rejected)
    ]
    return said[0][0] != said[1][0]


def metadata() -> st.SearchStrategy[dict[str, Any]]:
    """What rows carry beside what is said, some of it null, none of which a template reads."""
    optional = {
        "id": st.text("abc123", min_size=1, max_size=4),
        "weight": st.floats(0, 1),
        "timestamp": st.integers(0, 9),
        "name": st.one_of(st.none(), st.just("ann")),
        "extra": st.fixed_dictionaries({"b": st.text("ab", max_size=2)}, optional={"a": st.none()}),
    }
    return st.fixed_dictionaries({}, optional=optional)


Decorate = Callable[[list[Message]], list[Message]]


def sharegpt(messages: list[Message]) -> list[Message]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    result = []
    for message in messages:
        rest = {name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")}
        speaker, value = names.get(message["role"], message["role"]), message["content"]
        if "tool_calls" in message:
            speaker, value = "function_call", json.dumps([call["function"] for call in message["tool_calls"]])
        result.append({"from": speaker, "value": value, **rest})
    return result


def with_written_arguments(messages: list[Message]) -> list[Message]:
    """Messages whose arguments are JSON in a text, as OpenAI's interface gives them."""
    return [
        message
        if "tool_calls" not in message
        else {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ],
        }
        for message in messages
    ]


# Each takes a preference and what puts metadata on its messages; columns that hold one text need no metadata.
FORMS: dict[str, Callable[[Preference, Decorate], RawRow]] = {
    "a prompt list and answers": lambda p, d: p.row(prompt=d(p.before), chosen=d(p.chosen), rejected=d(p.rejected)),
    "whole conversations": lambda p, d: p.row(chosen=d(p.before + p.chosen), rejected=d(p.before + p.rejected)),
    "whole conversations beside the prompt": lambda p, d: p.row(
        prompt=d(p.before), chosen=d(p.before + p.chosen), rejected=d(p.before + p.rejected)
    ),
    "whole conversations beside the last question": lambda p, d: p.row(
        prompt=f" {p.prompt[-1]['content']}\n", chosen=d(p.before + p.chosen), rejected=d(p.before + p.rejected)
    ),
    "messages that end with the chosen answer": lambda p, d: p.row(
        messages=d(p.before + p.chosen), chosen=d(p.before + p.chosen), rejected=d(p.before + p.rejected)
    ),
    "a system column": lambda p, d: p.row(
        system=p.system or None, prompt=d(p.prompt), chosen=d(p.chosen), rejected=d(p.rejected)
    ),
    "ShareGPT": lambda p, d: p.row(
        conversations=d(sharegpt(p.before)), chosen=d(sharegpt(p.chosen)), rejected=d(sharegpt(p.rejected))
    ),
    "OpenAI": lambda p, d: {
        "input": {"messages": d(with_written_arguments(p.before)), "tools": p.tools},
        "preferred_output": d(with_written_arguments(p.chosen)),
        "non_preferred_output": d(with_written_arguments(p.rejected)),
    },
    "JSON in texts": lambda p, d: p.row(
        prompt=json.dumps(d(p.before)), chosen=json.dumps(d(p.chosen)), rejected=json.dumps(d(p.rejected))
    ),
    "Python in texts": lambda p, d: p.row(
        prompt=repr(d(p.before)), chosen=repr(d(p.chosen)), rejected=repr(d(p.rejected))
    ),
}

Route = Callable[[list[RawRow], Path, Any], Sequence[PreferencePair]]


def load(data: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    settings = RunSettings.of({"data": str(data), "train": True, "max_seq_length": UNLIMITED})
    return load_dataset(settings, tokenizer)[0]


def jsonl(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(file, tokenizer)


def json_list(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return load(file, tokenizer)


def parquet(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    import pyarrow
    from pyarrow.parquet import write_table

    file = folder / "rows.parquet"
    write_table(pyarrow.Table.from_pylist(with_every_column(rows)), file)
    return load(file, tokenizer)


def dataset_rows(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    """Through `datasets`, which fills every field that any row has."""
    from datasets import Dataset

    return jsonl([dict(row) for row in Dataset.from_list(with_every_column(rows))], folder, tokenizer)


def with_every_column(rows: list[RawRow]) -> list[RawRow]:
    """Arrow takes the columns of the first row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


# Calls of train_cpo and evaluate_cpo, and the loaders of mlx-lm-lora, which apps and its MCP server call.


def rows_in_a_call(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    return pairs_of(rows, UNLIMITED, tokenizer)


def hosts_wrappers_in_a_call(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    parts = [rows[:1], host_datasets.create_dataset(rows[1:], tokenizer, SimpleNamespace(train_mode="cpo"))]
    return pairs_of(host_datasets.CacheDataset(host_datasets.ConcatenatedDataset(parts)), UNLIMITED, tokenizer)


def hosts_create_dataset(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    made = host_datasets.create_dataset(rows, tokenizer, SimpleNamespace(train_mode="cpo"))
    cached = host_datasets.CacheDataset(made)
    return [cached[number] for number in range(len(cached))]


def hosts_load_dataset(rows: list[RawRow], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    jsonl(rows, folder, tokenizer)
    (folder / "rows.jsonl").rename(folder / "train.jsonl")
    args = SimpleNamespace(train_mode="cpo", data=str(folder), train=True, test=False, max_seq_length=UNLIMITED)
    return pairs_of(host_datasets.CacheDataset(host_datasets.load_dataset(args, tokenizer)[0]), UNLIMITED)


# What all of them must agree on; a further route is one more line.
ROUTES: dict[str, Route] = {
    "rows in a call": rows_in_a_call,
    "the host's wrappers in a call": hosts_wrappers_in_a_call,
    "the host's create_dataset": hosts_create_dataset,
    "the host's load_dataset": hosts_load_dataset,
    "JSON lines": jsonl,
    "a JSON list": json_list,
    "Parquet": parquet,
    "datasets": dataset_rows,
}
