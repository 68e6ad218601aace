"""The judge of a run: what it compares, what it says when, and that it goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.optimizers as optimizers
import numpy as np
import pytest
from support import resumable_runs
from support.tiny import add_adapter, build_model, build_pairs, contrary

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.report.record import RunRecord
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.judge import Judge
from mlx_cpo_plugin.training.metrics import PAIR_VALUES
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.trainer import train_cpo
from mlx_cpo_plugin.training.validation import evaluate_pairs, scored_batches
from mlx_cpo_plugin.verdict import Verdict


class Reports:
    """A training callback that keeps what it is told."""

    def __init__(self) -> None:
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        pass

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.valid.append(info)


def run(folder: Path, val_pairs: list[PreferencePair], rate: float, **settings: Any) -> list[dict[str, Any]]:
    """Train on other pairs, and return the reports of the validations."""
    reports = Reports()
    arguments = {"batch_size": 2, "iters": 24, "steps_per_eval": 12, "val_batches": -1, **settings}
    train_cpo(
        add_adapter(build_model()),
        optimizers.Adam(learning_rate=rate),
        build_pairs(24),
        val_pairs,
        CPOTrainingArgs(adapter_file=str(folder / "adapters.safetensors"), **arguments),
        training_callback=reports,
    )
    return reports.valid


def values(count: int, **of_pairs: np.ndarray) -> np.ndarray:
    """The values of some pairs with a chosen token each, zero but for those named."""
    of_pairs = {"chosen_tokens": np.ones(count), **of_pairs}
    return np.array([of_pairs.get(name, np.zeros(count)) for name in PAIR_VALUES])


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_a_change_is_that_of_the_reported_mean_and_its_error_that_of_the_paired_differences(
    loss_type: str, tmp_path: Path
) -> None:
    val_pairs = build_pairs(7, seed=5)
    model = add_adapter(build_model())
    objective = objective_for(loss_type, {"beta": 2.0}, cpo_alpha=0.5)

    def of_pairs() -> np.ndarray:
        """Preference loss, nll and margin of each pair, one at a time, in float64."""
        rows = []
        for pair in val_pairs:
            ((scores, _),) = scored_batches(model, [pair], objective.length_normalised, batch_size=1)
            chosen, rejected = float(scores.chosen_logps.item()), float(scores.rejected_logps.item())
            nll = -chosen * (pair.chosen_tokens if loss_type == "simpo" else 1)
            argument = 2.0 * (chosen - rejected) - (0.5 if loss_type == "simpo" else 0)
            rows.append([np.log1p(np.exp(-argument)), nll, 2.0 * (chosen - rejected)])
        return np.array(rows, np.float64)

    before = of_pairs()
    reports = Reports()
    train_cpo(
        model,
        optimizers.SGD(learning_rate=0.01),
        build_pairs(8),
        val_pairs,
        CPOTrainingArgs(
            iters=4,
            val_batches=-1,
            batch_size=3,
            loss_type=loss_type,
            beta=2.0,
            cpo_alpha=0.5,
            adapter_file=str(tmp_path / "adapters.safetensors"),
        ),
        training_callback=reports,
    )
    differences, tokens = of_pairs() - before, np.array([pair.chosen_tokens for pair in val_pairs])
    ratio = differences[:, 1].sum() / tokens.sum()
    # Cochran 1977, Sampling Techniques, eq. 6.13: the residuals of a ratio, over the mean of its denominator.
    residuals = (differences[:, 1] - ratio * tokens) / tokens.mean()
    differences[:, 1] = ratio + residuals
    differences[:, 0] += 0.5 * differences[:, 1]

    first, last = reports.valid
    for column, name in enumerate(("loss", "nll_loss", "margins")):
        assert last[f"val_{name}_change"] == pytest.approx(last[f"val_{name}"] - first[f"val_{name}"], abs=1e-6)
        assert last[f"val_{name}_change"] == pytest.approx(differences[:, column].mean(), abs=1e-5)
        stderr = differences[:, column].std(ddof=1) / np.sqrt(7)
        assert last[f"val_{name}_stderr"] == pytest.approx(stderr, rel=1e-3, abs=1e-6)


def test_values_stand_in_the_order_of_the_pairs_however_they_were_grouped() -> None:
    model, pairs, objective = add_adapter(build_model()), build_pairs(9, seed=2), objective_for("sigmoid", {})

    together = evaluate_pairs(model, pairs, objective, batch_size=4, step_size=None).values
    alone = [evaluate_pairs(model, [pair], objective, batch_size=1, step_size=None).values[:, 0] for pair in pairs]

    np.testing.assert_allclose(together, np.transpose(alone), rtol=1e-4, atol=1e-4)


def test_a_run_that_gets_worse_says_so_once_and_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run(tmp_path, contrary(build_pairs(24)), rate=0.001, iters=96, steps_per_eval=48)

    printed = capsys.readouterr().out
    assert [report.get("val_verdict") for report in reports] == [None, -1, -1]
    assert printed.count("Warning: Iter 48: the model is worse than before training: loss ") == 1
    assert "cpo_alpha: 1" in printed
    assert "Iter 96: the model is" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("The model is worse than before training: loss +")
    assert last.endswith("by loss, was that of iteration 48, and the one before training was better.")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_verdict"] for row in rows if row["kind"] == "valid" and row["iteration"] > 1] == [-1, -1]


def test_a_run_that_learns_what_it_is_validated_on_gets_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = run(tmp_path, build_pairs(24), rate=0.01, cpo_alpha=1.0)

    assert reports[-1]["val_verdict"] == 1
    assert "The model is better than before training: loss -" in capsys.readouterr().out


def test_the_same_model_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run(tmp_path, build_pairs(24), rate=1e-9)

    assert reports[-1]["val_verdict"] == 0
    assert "Warning" not in capsys.readouterr().out


def test_a_change_of_the_verdict_is_news_and_the_same_again_is_not() -> None:
    judge, pairs = Judge("digest", 1.0, np.arange(6)), np.arange(6) / 100
    judge.begin(values(6))
    heard = []
    for number, loss in enumerate((0.0, 1.0, 1.0, 0.0, -1.0), 1):
        warning, line = judge.news(number, judge.verdict(values(6, loss=loss + pairs - pairs.mean()), np.arange(6)))
        heard.append(warning or line)

    assert heard[0] is None
    assert heard[2] is None
    assert heard[1].startswith("Iter 2: the model is worse than")  # type: ignore[union-attr]  # there is one
    assert heard[1].endswith("lower learning_rate, or stop earlier.")  # type: ignore[union-attr]
    assert heard[3].startswith("Iter 4: the model is not certain to be")  # type: ignore[union-attr]
    assert heard[4].startswith("Iter 5: the model is better than")  # type: ignore[union-attr]


def test_a_resumed_run_judges_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    settings = {"val_pairs": build_pairs(5, seed=3), "steps_per_eval": 2, "val_batches": -1}
    resumable_runs.train(tmp_path / "whole", **settings)

    resumable_runs.stopped(tmp_path / "run", 5, **settings)
    resumable_runs.train(tmp_path / "run", resume="auto", **settings)

    def judged(folder: Path) -> list[dict[str, Any]]:
        return [row for row in resumable_runs.metrics(folder) if row["kind"] in ("valid", "warning")]

    assert judged(tmp_path / "run") == judged(tmp_path / "whole")
    assert "val_verdict" in judged(tmp_path / "run")[-1]


def test_a_run_resumed_with_other_validation_pairs_says_that_it_cannot_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumable_runs.stopped(tmp_path, 5, val_pairs=build_pairs(5, seed=3), steps_per_eval=2)
    resumable_runs.train(tmp_path, resume="auto", val_pairs=build_pairs(5, seed=4), steps_per_eval=2)

    assert "val_verdict" not in resumable_runs.metrics(tmp_path)[-1]
    assert "is not known: the validation before it had other pairs" in capsys.readouterr().out


def test_scores_that_are_no_numbers_are_worse() -> None:
    judge = Judge("digest", 0.0, np.arange(4))
    judge.begin(values(4))

    verdict = judge.verdict(values(4, loss=np.full(4, np.nan)), np.arange(4))

    assert verdict is not None
    assert verdict.word == "worse"


def test_ranks_judge_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    named = {"loss": rng.normal(size=6), "chosen_nll": rng.normal(size=6), "chosen_tokens": rng.integers(1, 9, 6) * 1.0}
    before, after = values(6, chosen_tokens=named["chosen_tokens"]), values(6, **named)
    rows = np.array([0, 0, 1, 1, 1, 2])
    alone = Judge("digest", 0.5, rows)
    alone.begin(before)
    expected = alone.verdict(after, np.arange(6))

    judges = [Judge("digest", 0.5, rows) for _ in range(2)]
    exchanged: list[list[Any]] = []
    for exchange in range(4):  # each time one exchange gets further than before
        sent: list[list[Any]] = [[], []]
        for rank, judge in enumerate(judges):
            replies = iter(exchanged)

            def gathered(mine: Any, mine_of: Any = sent[rank], replies: Any = replies) -> Any:
                mine_of.append(mine)
                return next(replies, [mine, mine])

            monkeypatch.setattr("mlx_cpo_plugin.training.judge.gather", gathered)
            monkeypatch.setattr(
                "mlx_cpo_plugin.training.judge.add_over_ranks", lambda mine, all_of=gathered: np.sum(all_of(mine), 0)
            )
            judge.begin(before[:, rank::2])
            judge.verdict(after[:, rank::2], np.arange(6)[rank::2])
        exchanged = [list(of_all) for of_all in zip(*sent, strict=True)][: exchange + 1]

    assert expected is not None
    for judge in judges:
        assert judge.latest is not None
        for name, change in expected.changes.items():
            assert judge.latest.changes[name] == pytest.approx(change)


def test_pairs_of_one_row_are_no_further_evidence() -> None:
    """Three rows, the first with four pairs that all change alike: as if the sums of the rows were what was drawn."""
    change = np.array([0.3, 0.3, 0.3, 0.3, 0.1, -0.2])
    judge = Judge("digest", 0.0, np.array([0, 0, 0, 0, 1, 2]))
    judge.begin(values(6))

    verdict = judge.verdict(values(6, margins=change), np.arange(6))

    assert verdict is not None
    mean, stderr = verdict.changes["margins"]
    of_rows = np.array([4 * (0.3 - mean), 0.1 - mean, -0.2 - mean])
    assert mean == pytest.approx(change.mean())
    assert stderr == pytest.approx(np.sqrt(3 / 2 * (of_rows**2).sum()) / 6)
    assert stderr > 1.4 * change.std(ddof=1) / np.sqrt(6)


@pytest.mark.parametrize("rows", [2, 5])
def test_few_rows_whose_pairs_change_in_one_pattern_decide_nothing(rows: int) -> None:
    """The distances from the mean cancel in each row but for rounding, which is no standard error."""
    judge = Judge("digest", 0.0, np.repeat(np.arange(rows), 3))
    judge.begin(values(3 * rows))

    verdict = judge.verdict(values(3 * rows, margins=np.array([1.0, 0.0, 0.0] * rows)), np.arange(3 * rows))

    assert verdict is not None
    assert verdict.word == "undecided"


def test_copies_of_a_pair_make_nothing_more_certain() -> None:
    change = np.random.default_rng(1).normal(0.5, 1.0, size=8)

    def judged(copies: int) -> Verdict:
        count = 8 * copies
        judge = Judge("digest", 0.0, np.repeat(np.arange(8), copies))
        judge.begin(values(count))
        verdict = judge.verdict(values(count, margins=np.repeat(change, copies)), np.arange(count))
        assert verdict is not None
        return verdict

    assert judged(5).changes["margins"] == pytest.approx(judged(1).changes["margins"])


def test_a_run_knows_which_validation_pairs_are_of_one_row(tmp_path: Path) -> None:
    pairs = [replace(pair, source=f"valid.jsonl:{number}") for number, pair in enumerate(build_pairs(6, seed=5), 1)]
    several = [replace(pair, source=f"{pair.source} (answers 1 and {answer})") for pair in pairs for answer in (2, 3)]

    once, twice = (run(tmp_path / name, of, 0.01)[-1] for name, of in (("once", pairs), ("twice", several)))

    for name in ("loss", "nll_loss", "margins"):
        assert twice[f"val_{name}_change"] == pytest.approx(once[f"val_{name}_change"], rel=1e-3)
        assert twice[f"val_{name}_stderr"] == pytest.approx(once[f"val_{name}_stderr"], rel=1e-3)


def test_the_last_word_is_on_the_weights_that_the_run_ends_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validations = run(tmp_path, contrary(build_pairs(24)), 1e-3, load_best=True)

    best = min(validations[1:], key=lambda report: report["val_loss"])
    assert best != validations[-1], "the last validation is the best"
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row.keys() | {"val_time"} == best.keys() | {"kind", "run", "time"}
    assert all(row[name] == value for name, value in best.items() if name in row)
    verdict = Verdict.from_report(best)
    assert verdict is not None
    assert f"The model is {verdict.sentence()};" in capsys.readouterr().out
    assert RunRecord.read(tmp_path).verdict == verdict
