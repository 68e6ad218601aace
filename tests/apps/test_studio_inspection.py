"""What the page's check shows: some rows at once, then all of them, then the whole report; rows are read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny import preference_rows

from mlx_cpo_plugin.data import conversion, files, reading
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.studio import inspection

Reports = list[dict[str, Any]]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """What an inspection leaves, one after the other."""
    left: Reports = []
    monkeypatch.setattr(inspection, "leave", lambda report, output: left.append(json.loads(json.dumps(report))))
    monkeypatch.setattr(inspection, "SAMPLE", 2)
    return left


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    """Of a training set that is large enough to be shown in part first, and a small validation set."""
    folder = Path(settings["data"])
    rows = preference_rows(24)
    rows[20] = {"prompt": "p", "chosen": "a", "rejected": "a"}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(settings | {"train_mode": "cpo"}))
    return file


def test_the_first_rows_are_shown_then_all_and_then_the_report(config: Path, reports: Reports) -> None:
    inspection.inspect(config, config.with_name("out.json"))

    assert [(report["sample"], bool(report["text"])) for report in reports] == [(2, False), (0, False), (0, True)]
    first, whole, last = reports
    assert [(split["name"], split["rows"]) for split in first["splits"]] == [("train", 2), ("valid", 2), ("test", 2)]
    (train, *_) = whole["splits"]
    assert (train["rows"], train["pairs"]) == (24, 23)
    assert [places for _, places in train["skipped"].values()] == [["train.jsonl:21"]]
    assert len(train["examples"]) == inspection.EXAMPLES
    assert train["examples"][:2] == first["splits"][0]["examples"]
    assert last["splits"] == whole["splits"]
    assert "24 rows" in last["text"]


def test_each_file_is_read_once_and_each_row_converted_once_beside_those_shown_first(
    config: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    converted: list[str] = []
    convert = conversion.RowConverter._outcome

    def read_file(path: Path, name: str = "") -> list[files.Row]:
        read.append(path.name)
        return files.read_file(path, name)

    def outcome(self: Any, value: object, columns: Any, source: str) -> Any:
        converted.append(source)
        return convert(self, value, columns, source)

    monkeypatch.setattr(reading, "read_file", read_file)
    monkeypatch.setattr(conversion.RowConverter, "_outcome", outcome)

    inspection.inspect(config, config.with_name("out.json"))

    assert sorted(read) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    assert len(converted) - len(set(converted)) == 3 * inspection.SAMPLE


def test_rows_that_a_run_refuses_are_shown_with_what_is_wrong(config: Path, reports: Reports) -> None:
    config.write_text(config.read_text() + "load_best: true\nval_batches: 0\n")

    inspection.inspect(config, config.with_name("out.json"))

    assert "load_best is on" in reports[-1]["error"]
    assert reports[-1]["splits"][0]["rows"] == 24


def test_rows_that_cannot_be_read_are_an_error(config: Path, settings: dict[str, Any], reports: Reports) -> None:
    (Path(settings["data"]) / "train.jsonl").write_text('{"a": 1}\n')

    with pytest.raises(DataError, match="no column for the chosen answer"):
        inspection.inspect(config, config.with_name("out.json"))
    assert reports == []
