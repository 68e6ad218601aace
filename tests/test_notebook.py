"""The notebook runs from top to bottom, and shows a model that got better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = NOTEBOOK["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_has_ten_cells_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], len(CELLS)) == (4, 10)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)


@pytest.mark.slow
def test_each_cell_runs_after_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {"__name__": "notebook"}

    for number, source in enumerate(CODE, 1):
        exec(compile(source, f"cell {number}", "exec"), names)

    result = names["result"]
    assert result.verdict.word == "better"
    assert result.adapter_path == tmp_path / "adapters"
    assert (tmp_path / "adapters" / "README.md").read_text() in capsys.readouterr().out
