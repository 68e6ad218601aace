"""Many rows are converted by worker processes, and nothing but the time it takes shows that."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.data_tokenizers import CHATML, THINKING, make_tokenizer, tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data import PreferenceDataset, conversion, pairs_of_rows
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

Workers = list[conversion._Worker]


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of several lengths; some are cut, and some have an empty answer or two that are alike."""
    made = [{"prompt": f"What is {i}? " * (1 + i % 9), "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(count)]
    for i in range(0, count, 7):
        made[i]["chosen"] = "" if i % 2 else "No."
    return made


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Two processes for every data set, with a few rows at a time; those that are started."""
    started: Workers = []

    class Recorded(conversion._Worker):
        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    monkeypatch.setattr(conversion, "_Worker", Recorded)
    monkeypatch.setattr(conversion, "workers_for", lambda count: 2)
    monkeypatch.setattr(conversion, "ROWS_AT_A_TIME", 4)
    return started


def converted(given: list[Any], tokenizer: Any = None, **settings: Any) -> PreferenceDataset:
    settings = {"max_seq_length": 40, **settings}
    return pairs_of_rows(given, tokenizer or tokenizer_named("chatml"), RunSettings.of(settings))


def converted_here(given: list[Any], tokenizer: Any = None, **settings: Any) -> PreferenceDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "workers_for", lambda count: 1)
        return converted(given, tokenizer, **settings)


def contents(dataset: PreferenceDataset) -> list[Any]:
    parts = ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored")
    arrays = [[getattr(pair, part) for part in parts] for pair in dataset]
    return [
        [
            (pair.source, *((a.dtype, a.tolist()) for a in of_pair))
            for pair, of_pair in zip(dataset, arrays, strict=True)
        ],
        dataset.report.summary(),
        dataset.report.skipped,
        list(dataset.report.skipped),
        dataset.tokenizer,
    ]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of the rows that are converted in this process."""
    sources: list[str] = []
    outcome = conversion.RowConverter._outcome

    def recorded(self: conversion.RowConverter, value: Any, columns: Any, source: str) -> conversion.Outcome:
        sources.append(source)
        return outcome(self, value, columns, source)

    monkeypatch.setattr(conversion.RowConverter, "_outcome", recorded)
    return sources


@pytest.mark.slow
def test_pairs_order_and_report_are_the_same_with_three_workers(
    workers: Workers, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "workers_for", lambda count: 3)
    given = [*rows(30), *({"chosen": f"One {i}, two", "rejected": f"One {i}, three"} for i in range(6))]
    expected = contents(converted_here(given, tokenizer_named("thinking"), overlong="drop"))
    in_this_process.clear()

    assert contents(converted(given, tokenizer_named("thinking"), overlong="drop")) == expected
    assert len(workers) == 3
    assert len(in_this_process) == 4, "the first rows, while the workers start"
    assert all(worker.process.returncode is not None for worker in workers)


@pytest.mark.slow
def test_the_first_row_that_is_too_long_is_the_error(workers: Workers) -> None:
    given = [{**row, "prompt": "Who?"} for row in rows(30)]
    for i in (17, 25):
        given[i]["prompt"] = "What is it? " * 30

    with refused(DataError, place="row 18"):
        converted(given, overlong="error")
    assert all(worker.process.returncode is not None for worker in workers)


class Deadly(dict[str, Any]):
    """A row that ends the process which reads it from another."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


@pytest.mark.slow
def test_a_row_that_ends_a_worker_is_converted_here_and_the_others_by_the_next_worker(
    workers: Workers, in_this_process: list[str]
) -> None:
    given = rows(60)
    expected = contents(converted_here(given))
    in_this_process.clear()
    given[9] = Deadly(given[9])

    assert contents(converted(given)) == expected
    assert in_this_process == [f"row {i}" for i in (1, 2, 3, 4, 9, 10, 11, 12)]


@pytest.mark.parametrize("python", ["/nowhere/python", shutil.which("false")])
def test_workers_that_do_not_start_or_end_at_once_are_given_up(
    python: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(60)
    monkeypatch.setattr(sys, "executable", python)

    assert contents(converted(given)) == contents(converted_here(given))
    assert len(workers) <= 2 + 3


class Interrupting(dict[str, Any]):
    """A row during which Ctrl-C arrives."""

    def get(self, *_: Any) -> Any:
        raise KeyboardInterrupt

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def test_ctrl_c_ends_the_workers(workers: Workers) -> None:
    given = rows(30)
    given[2] = Interrupting(given[2])

    with pytest.raises(KeyboardInterrupt):
        converted(given)
    assert all(worker.process.returncode is not None for worker in workers)


def by_code() -> TokenizerWrapper:
    """A tokenizer whose template is a function, which cannot be pickled."""
    inner = make_tokenizer(CHATML)._tokenizer
    return TokenizerWrapper(
        inner, chat_template=lambda messages, **_: "".join(f"{m['role']}: {m['content']}<|im_end|>" for m in messages)
    )


def with_own_method() -> TokenizerWrapper:
    wrapper = make_tokenizer(CHATML)
    render = wrapper._tokenizer.apply_chat_template
    wrapper._tokenizer.apply_chat_template = lambda *args, **kwargs: render(*args, **kwargs)
    return wrapper


@pytest.mark.parametrize("make", [by_code, with_own_method, lambda: make_tokenizer(CHATML, offsets=False)])
def test_tokenizers_and_templates_of_python_code_stay_in_this_process(
    make: Callable[[], TokenizerWrapper], workers: Workers
) -> None:
    given, tokenizer = rows(30), make()

    assert contents(converted(given, tokenizer)) == contents(converted_here(given, tokenizer))
    assert not workers


def test_workers_that_make_other_pairs_are_not_believed(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows(30)
    expected = contents(converted_here(given))
    others = conversion.RowConverter(ChatTokenizer(make_tokenizer(THINKING)), 40, "cut")
    monkeypatch.setattr(conversion._Workers, "_outcomes", lambda self, rows: others.outcomes(rows))

    assert contents(converted(given)) == expected


class Telling(dict[str, Any]):
    """A row that names in its answer the modules of the process which reads it from another."""

    def __reduce__(self) -> tuple[Any, ...]:
        names = "{name.partition('.')[0] for name in __import__('sys').modules}"
        return eval, (f"{{'prompt': 'Who?', 'rejected': 'Me', 'chosen': str({names} & {{'mlx', 'mlx_lm', 'torch'}})}}",)


@pytest.mark.slow
def test_workers_import_nothing_of_mlx_and_leave_rows_of_local_classes_to_this_process(workers: Workers) -> None:
    class Local(dict[str, Any]):
        pass

    row = {"prompt": "Who?", "chosen": "This process", "rejected": "Me"}

    told = converted([*rows(4), *(Telling(row) for _ in range(8)), Local(row)], max_seq_length=200)

    assert [tokenizer_named("chatml").decode(pair.chosen) for pair in told[-5:]] == [
        *["set()<|im_end|>"] * 4,
        "This process<|im_end|>",
    ]


def test_the_number_of_rows_alone_decides_whether_there_are_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "usable_cores", lambda: 64)

    assert conversion.workers_for(2 * conversion.ROWS_FOR_A_WORKER - 1) == 1
    assert conversion.workers_for(2 * conversion.ROWS_FOR_A_WORKER) == 2
    assert conversion.workers_for(10**6) == conversion.MOST_WORKERS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, seconds: float) -> str:
    """What is shown while 10 rows are converted, which take so many seconds each."""
    now = 0.0
    with conversion.Progress(10, stream, clock=lambda: now) as progress:
        for row in range(1, 11):
            now += seconds
            progress.done(row)
    return stream.getvalue()


def test_conversion_that_takes_long_shows_a_bar_on_a_terminal() -> None:
    assert "Tokenising: " in shown(Terminal(), conversion.BAR_AFTER)
    assert shown(Terminal(), conversion.BAR_AFTER / 20) == ""


def test_conversion_that_takes_long_says_a_line_every_so_often_elsewhere() -> None:
    assert shown(io.StringIO(), conversion.LINE_EVERY / 2) == "".join(
        f"Tokenising: {rows} of 10 rows are done.\n" for rows in (2, 4, 6, 8)
    )
    assert shown(io.StringIO(), conversion.LINE_EVERY / 20) == ""


def test_every_data_set_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(conversion.Progress, "done", lambda self, rows: seen.append(rows))
    monkeypatch.setattr(conversion, "ROWS_AT_A_TIME", 10)

    converted_here(rows(25))

    assert seen == [10, 20, 25]
