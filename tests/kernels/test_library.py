"""The compiled library is built once and checked; whatever goes wrong costs a run speed and one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.compiled import skip_where_there_are_none

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.kernels import library


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine that can have kernels."""
    skip_where_there_are_none()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(library.VARIABLE, library.AUTO)
    monkeypatch.setattr(library, "_failed", set())
    return tmp_path / "cache"


def test_nothing_is_compiled_for_what_takes_only_kernels_that_are_compiled_already(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_run", build)
    monkeypatch.setattr(library, "load", lambda file: None)

    assert not library.usable(pytest.fail, compiling=False)
    assert library.usable([].append)
    assert library.usable(pytest.fail, compiling=False)
    monkeypatch.setenv(library.VARIABLE, library.NONE)
    assert not library.usable(pytest.fail), "nobody wants them"


def script(file: Path, line: str) -> str:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return str(file)


def told() -> list[str]:
    """What is said where the kernels cannot be used, beside that they are being compiled."""
    said: list[str] = []
    assert not library.usable(said.append)
    return [sentence for sentence in said if not sentence.startswith("Compiling")]


def test_without_a_compiler_nothing_is_said_unless_kernels_are_asked_for(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    assert told() == []
    monkeypatch.setenv(library.VARIABLE, library.ALWAYS)
    (sentence,) = told()
    assert "no C++ compiler" in sentence


def test_a_compiler_that_fails_costs_one_sentence_with_its_reason_and_leaves_nothing(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "echo noise >&2; echo 'fatal error: no header' >&2; exit 1"))

    (sentence,) = told()

    assert sentence.endswith("cxx: fatal error: no header")
    assert [file for file in cache_folder.rglob("*") if file.suffix == ".so"] == []


def test_what_failed_is_neither_tried_nor_said_again_by_the_same_process(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f"echo tried >> {tmp_path / 'tries'}; exit 1"))

    assert [len(told()) for _ in range(3)] == [1, 0, 0]
    assert (tmp_path / "tries").read_text().count("tried") == 1


def test_a_library_that_computes_something_else_or_ends_its_process_is_not_kept(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"'))

    assert len(told()) == 1
    assert [file for file in cache_folder.rglob("*") if file.suffix == ".so"] == []


def test_a_cache_folder_that_cannot_be_made_costs_one_sentence(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert len(told()) == 1


def test_an_account_without_a_home_folder_costs_one_sentence(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)

    assert [len(told()) for _ in range(2)] == [1, 0]


def build(command: Sequence[str]) -> None:
    """What a compiler and the check leave."""
    if "-o" in command:
        Path(command[command.index("-o") + 1]).write_bytes(b"library")


@pytest.mark.parametrize("damage", [b"", b"library", b"other" + bytes(40)])
def test_a_damaged_library_is_built_anew_before_it_is_loaded(
    damage: bytes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_run", build)
    loaded: list[bytes] = []
    monkeypatch.setattr(library, "load", lambda file: loaded.append(file.read_bytes()))
    assert library.usable([].append)
    library.cached_file().write_bytes(damage)
    said: list[str] = []

    assert library.usable(said.append)
    assert library.usable(said.append)

    assert len(said) == 1
    assert loaded == [loaded[0]] * 3
    assert loaded[0].startswith(b"library")


def test_a_whole_file_that_is_no_library_costs_one_sentence(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_run", build)
    library.compile_into(library.cached_file())

    assert len(told()) == 1


def test_those_who_build_at_once_build_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(library, "_run", lambda command: (commands.append(command), build(command)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(library.compile_into, [library.cached_file()] * 4))

    assert len(commands) == 2  # the compiler, and the check
    assert library.is_whole(library.cached_file())


def test_another_mlx_processor_or_set_of_flags_has_another_file(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {library.cached_file(), library.cached_file()}
    monkeypatch.setattr(library, "version", lambda name: "0.0")
    files.add(library.cached_file())
    monkeypatch.setattr(library, "_processor", lambda: "another")
    files.add(library.cached_file())
    monkeypatch.setattr(library, "FLAGS", ("-O0",))
    files.add(library.cached_file())

    assert len(files) == 4
    assert {file.parent for file in files} == {cache_folder / "mlx-cpo-plugin"}


def test_the_compiler_of_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = script(tmp_path / "mine", "exit 0")
    other = script(tmp_path / "c++", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    assert library.compiler() == named
    monkeypatch.setenv("CXX", os.devnull + "/nothing")
    assert library.compiler() == other


def test_kernels_are_used_for_long_runs_always_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = library.LEAST_WORK / 2, library.LEAST_WORK
    for value, expected in (("", [False, True]), ("Always", [True, True]), ("none", [False, False])):
        monkeypatch.setenv(library.VARIABLE, value)
        assert [library.pays(few), library.pays(many)] == expected
    assert told() == []
    monkeypatch.setenv(library.VARIABLE, "yes")
    with pytest.raises(ConfigError, match=f"{library.VARIABLE} is yes"):
        library.pays(few)
