"""When a model is better or worse than before training, and how that is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cpo_plugin.report.page import as_html
from mlx_cpo_plugin.report.record import RunRecord
from mlx_cpo_plugin.verdict import MEASURES, NLL_ALLOWANCE, Change, Verdict, students_t

STILL = (0.0, 0.01)
LABELS = {"loss": "loss", "nll": "nll_loss", "margin": "margins", "accuracy": "accuracies"}


def verdict(pairs: int = 50, **moved: tuple[float, float]) -> Verdict:
    """The verdict where the measures named moved by (mean, standard error), and no other did."""
    changes = dict.fromkeys(LABELS.values(), STILL) | {LABELS[label]: change for label, change in moved.items()}
    return Verdict.of({name: Change(*change, pairs) for name, change in changes.items()})


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (10**6, 1.960)])
def test_certainty_is_that_of_students_t(freedom: int, expected: float) -> None:
    assert students_t(freedom) == pytest.approx(expected, rel=0.01)


def test_a_loss_that_rises_makes_a_model_worse_though_its_accuracy_rises() -> None:
    assert verdict(loss=(0.6, 0.1), accuracy=(0.33, 0.1), margin=(5.0, 1.0)).word == "worse"


def test_chosen_answers_that_become_much_less_likely_make_a_model_worse_though_its_loss_falls() -> None:
    assert verdict(loss=(-0.3, 0.1), nll=(6.3, 0.8), margin=(5.0, 1.0)).word == "worse"


def test_chosen_answers_may_lose_a_little() -> None:
    little = {"nll": (NLL_ALLOWANCE - 0.01, 0.001)}

    assert verdict(**little).word == "undecided"
    assert verdict(**little, margin=(1.0, 0.1)).word == "better"


@pytest.mark.parametrize(
    "moved", [{"loss": (-0.1, 0.01)}, {"nll": (-0.1, 0.01)}, {"margin": (0.1, 0.01)}, {"accuracy": (0.1, 0.01)}]
)
def test_one_measure_that_gets_better_is_enough_and_one_that_contradicts_it_leaves_it_open(
    moved: dict[str, tuple[float, float]],
) -> None:
    other = "accuracy" if "margin" in moved else "margin"

    assert verdict(**moved).word == "better"
    assert verdict(**moved, **{other: (-1.0, 0.1)}).word == "undecided"
    assert verdict(**{other: (-1.0, 0.1)}).word == "worse"


def test_a_change_that_nobody_would_see_decides_nothing() -> None:
    assert verdict(loss=(-5e-4, 1e-9), margin=(5e-4, 1e-9)).word == "undecided"


def test_what_is_within_the_error_or_comes_from_one_pair_decides_nothing() -> None:
    assert verdict(loss=(-0.19, 0.1), margin=(0.19, 0.1)).word == "undecided"
    assert verdict(pairs=4, loss=(-0.3, 0.1)).word == "undecided"  # 3.18 standard errors are needed
    assert verdict(pairs=1, loss=(-5.0, 0.0)).word == "undecided"


def test_a_measure_that_is_no_number_any_more_makes_a_model_worse() -> None:
    assert verdict(loss=(math.nan, math.nan)).word == "worse"


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=4, max_size=4))
def test_what_a_report_says_of_a_verdict_is_the_verdict(moved: list[tuple[float, float]]) -> None:
    given_verdict = verdict(**dict(zip(LABELS, moved, strict=True)))

    assert Verdict.from_report(given_verdict.report()) == given_verdict
    assert Verdict.from_report({"val_loss": 1.0}) is None


def test_a_sentence_says_by_how_much() -> None:
    sentence = verdict(loss=(0.5963, 0.2), accuracy=(1 / 3, 0.21)).sentence()

    assert sentence.startswith("worse than before training: loss +0.596 ± 0.200, ")
    assert "accuracy +33.3% ± 21.0%" in sentence
    assert all(measure.label in sentence for measure in MEASURES)


def test_a_number_that_a_file_lacks_is_said_to_be_none() -> None:
    row = verdict(loss=(math.nan, math.nan)).report() | {"val_loss_change": None, "val_loss_stderr": None}

    assert "loss +nan," in Verdict.from_report(row).sentence()  # type: ignore[union-attr]  # there is a verdict


@pytest.mark.parametrize(
    ("now", "change", "word"), [(0.9, 0.85, "worse"), (0.9, 0.4, "better"), (0.4, 0.4, "better"), (0.9, None, "better")]
)
def test_answers_that_begin_to_repeat_themselves_make_a_model_worse(
    now: float, change: float | None, word: str
) -> None:
    answers = {"val_sample_repetition": now, "val_sample_length": 60.0}
    answers |= {} if change is None else {"val_sample_repetition_change": change}
    better = {name: Change(-0.1 if name == "loss" else 0.0, 0.01, 50) for name in LABELS.values()}

    judged = Verdict.of(better, answers)

    assert judged.word == word
    assert ("answers that repeat 90% of their phrases, 5% before" in judged.sentence()) == (word == "worse")
    assert Verdict.from_report(judged.report()) == judged


def test_report_and_page_show_the_verdict_of_the_last_validation(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    run_view = pytest.importorskip("mlx_cpo_plugin.studio.run_view")
    last = verdict(loss=(-0.5, 0.1))
    rows = [{"val_loss": 1.5, "iteration": 1}, {"val_loss": 1.0, "iteration": 9, **last.report()}]
    text = "".join(json.dumps({"kind": "valid", "run": "r", **row}) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)

    shown = f"The model is {last.sentence()}."

    assert shown in as_html([RunRecord.read(tmp_path)])
    assert shown in run_view.status_html(tmp_path, rows)
    assert "The model is" not in run_view.status_html(tmp_path, rows[:1])
