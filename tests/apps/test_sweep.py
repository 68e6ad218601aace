"""The sweep over losses and betas trains, goes on where it was stopped, and draws the same plot again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sweep_losses
from support.tiny import preference_rows


@pytest.fixture
def given(model_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a sweep of one loss with two betas on a few rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8)))
    sizes = ["--train-rows", "4", "--valid-rows", "3", "--epochs", "1", "--answers", "2", "--answer-tokens", "4"]
    what = ["--losses", "hinge", "--betas", "2", "--num-layers", "2", "--longest", "300"]
    return ["--model", str(model_folder), "--rows", str(rows), "--output", str(tmp_path / "sweep"), *what, *sizes]


def runs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_run_is_a_line_and_an_interrupted_sweep_goes_on_after_the_last_of_them(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    folder = tmp_path / "sweep"

    sweep_losses.main(given)

    before, *trained = runs(folder)
    assert before["loss"] is None
    assert [(run["loss"], run["beta"]) for run in trained] == [("hinge", 0.05), ("hinge", 0.5)]
    assert all(len(run["chosen"]) == len(run["rejected"]) == 3 for run in runs(folder))
    assert all(max(run["answer_lengths"]) <= 4 and len(run["answer_lengths"]) == 2 for run in runs(folder))
    assert before["chosen"] != trained[0]["chosen"]
    assert "| `hinge` | 0.05 |" in capsys.readouterr().out

    plot = (folder / "losses-rows.svg").read_bytes()
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs(folder)[:2]))
    repeated = []
    whole_run = sweep_losses.run
    monkeypatch.setattr(sweep_losses, "run", lambda *what: repeated.append(what[0]) or whole_run(*what))
    sweep_losses.main(given)

    assert repeated == [sweep_losses.Setting("hinge", 0.5)]
    assert (folder / "losses-rows.svg").read_bytes() == plot


@pytest.mark.slow
def test_an_unfinished_sweep_can_be_drawn(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    with pytest.raises(SystemExit, match="no run on rows yet"):
        sweep_losses.main([*given, "--no-more-runs"])
    sweep_losses.main([*given, "--betas", "1"])

    sweep_losses.main([*given, "--no-more-runs"])

    assert len(runs(tmp_path / "sweep")) == 2
    assert (tmp_path / "sweep" / "losses-rows.svg").exists()
    assert "| hinge | 0.5 |" not in capsys.readouterr().out


def test_the_figures_are_means_over_rows_and_over_tokens() -> None:
    result = {
        "chosen": [-10.0, -30.0],
        "rejected": [-12.0, -24.0],
        "chosen_tokens": [5, 15],
        "answer_lengths": [3, 8],
    }

    of_run = sweep_losses.figures(result)

    assert of_run == pytest.approx({"accuracy": 0.5, "margin": -2.0, "chosen": -2.0, "length": 5.5})


def test_changes_come_with_their_standard_error_over_rows() -> None:
    before = {"chosen": [-10.0, -30.0, -20.0], "rejected": [-12.0, -24.0, -20.0], "chosen_tokens": [1, 1, 2]}
    after = {"chosen": [-9.0, -29.0, -18.0], "rejected": [-12.0, -25.0, -21.0], "chosen_tokens": [1, 1, 2]}

    margin = sweep_losses.change(after, before, "margin")
    chosen = sweep_losses.change(after, before, "chosen")

    assert margin == pytest.approx((2.0, 1.0 / 3**0.5))  # changes of 1, 2 and 3
    assert chosen == pytest.approx((1.0, 0.0))  # a token


def test_too_few_short_rows_are_said_to_be_so(given: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"rows\.jsonl has 0 rows of at most 5 tokens, not 7"):
        sweep_losses.main([*given, "--longest", "5"])


def test_the_log_probs_are_those_of_the_model(model_folder: Path, given: list[str]) -> None:
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(str(model_folder))
    pairs = sweep_losses.short_rows(Path(given[3]), tokenizer, sweep_losses.arguments(given))[:2]

    scores = sweep_losses.log_probs(model, pairs)

    for side in ("chosen", "rejected"):
        for pair, value in zip(pairs, scores[side], strict=True):
            answer = getattr(pair, side)
            tokens = np.concatenate([pair.prompt, answer])
            logits = np.array(model(mx.array(tokens[None, :-1]))[0], np.float64)
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            scored = np.flatnonzero(getattr(pair, f"{side}_scored")) + len(pair.prompt)
            assert value == pytest.approx(sum(logps[at - 1, tokens[at]] for at in scored), abs=2e-3)
