"""The tool that sweeps over losses and betas asks ``mlx-cpo sweep`` for them, on the short rows of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweep_losses
from support.tiny import preference_rows

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.sweep.plan import Sweep, read_sweep


@pytest.fixture
def given(model_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a sweep over a few rows, of which the third is long."""
    rows = preference_rows(9)
    rows[2]["chosen"] *= 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--train-rows", "4", "--valid-rows", "3", "--longest", "300"]
    folder = ["--output", str(tmp_path / "sweep")]
    return ["--model", str(model_folder), "--rows", str(tmp_path / "rows.jsonl"), *folder, *sizes]


def planned(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    words: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda asked: words.append(asked) or 0)
    assert sweep_losses.main(given) == 0
    ((command, file),) = words
    assert command == "sweep"
    return read_sweep(Path(file))


def test_every_loss_has_its_betas_and_sigmoid_the_likelihood_term_as_well(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = planned([*given, "--seeds", "2"], monkeypatch)

    assert len(sweep.runs) == 2 * 3 * (len(sweep_losses.BETAS) + 1)
    assert set(sweep_losses.BETAS) == set(loss_types())
    assert sum("cpo_alpha" in run.options for run in sweep.runs) == 6


def test_the_first_short_rows_are_trained_on_and_the_ones_after_them_held_out(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = planned([*given, "--losses", "hinge", "--betas", "2"], monkeypatch)

    def baskets(name: str) -> list[int]:
        lines = (Path(sweep.base["data"]) / f"{name}.jsonl").read_text().splitlines()
        return [int(json.loads(line)["prompt"].split()[-1][:-1]) for line in lines]

    assert (baskets("train"), baskets("valid")) == ([0, 1, 3, 4], [5, 6, 7])
    assert [run.options["beta"] for run in sweep.runs] == [0.05, 0.5]


def test_too_few_short_rows_are_said_to_be_so(given: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"rows\.jsonl has 0 rows of at most 5 tokens, not 7"):
        sweep_losses.main([*given, "--longest", "5"])
