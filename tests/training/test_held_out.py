"""What a run has saved is scored on held-out rows: what is wrong is told, and nothing that is right is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters

from mlx_cpo_plugin.training import held_out, trainer
from mlx_cpo_plugin.training.held_out import HeldOutScores, held_out_scores, scores_of
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo


def train(folder: Path, **arguments: Any) -> Any:
    model = add_adapter(build_model())
    args = CPOTrainingArgs(iters=4, batch_size=4, adapter_file=str(folder / "adapters.safetensors"), **arguments)
    train_cpo(model, optimizers.Adam(1e-3), build_pairs(8), build_pairs(6, seed=3), args=args)
    return model


def warnings(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["kind"] == "warning"]


def test_scores_that_differ_more_than_additions_do_are_told_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([0.0, 0.01])
    monkeypatch.setattr(
        held_out, "scores_of", lambda *given: HeldOutScores(scores_of(*given).logps * (1 + next(errors)))
    )

    train(tmp_path)

    assert any("gives different results for the same computation" in text for text in warnings(tmp_path))


def test_scores_in_another_order_of_additions_are_the_same() -> None:
    logps = np.array([[-12.5, -80.0], [-20.0, -300.0]])

    assert HeldOutScores(logps * (1 + 1e-5)).is_like(HeldOutScores(logps))
    assert not HeldOutScores(logps * (1 + 1e-2)).is_like(HeldOutScores(logps))


def test_the_weights_in_memory_stay_whatever_happens_while_what_was_saved_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fail_with_the_saved_weights(model: Any, *given: Any) -> HeldOutScores:
        seen.append((model, parameters(model)))
        if len(seen) == 2:
            raise ZeroDivisionError
        return scores_of(model, *given)

    monkeypatch.setattr(held_out, "scores_of", fail_with_the_saved_weights)

    with pytest.raises(ZeroDivisionError):
        train(tmp_path)

    model, before = seen[0]
    assert_same(parameters(model), before)
    assert any(np.any(value) for value in before.values())


def test_the_best_adapter_is_read_back_too_and_one_that_is_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole", save_best="loss", steps_per_eval=2)
    assert f"{tmp_path / 'whole' / 'best'} has the weights of iteration" in capsys.readouterr().out
    assert warnings(tmp_path / "whole") == []

    score = trainer.score_saved

    def lose_the_best(run: Any) -> None:
        (tmp_path / "lost" / "best" / "adapters.safetensors").unlink()
        score(run)

    monkeypatch.setattr(trainer, "score_saved", lose_the_best)
    train(tmp_path / "lost", save_best="loss", steps_per_eval=2)

    assert any("best/adapters.safetensors cannot be read" in text for text in warnings(tmp_path / "lost"))
    mx.eval(mx.load(str(tmp_path / "lost" / "adapters.safetensors")))


def test_scoring_leaves_the_mode_of_the_model_and_takes_no_dropout() -> None:
    model = add_adapter(build_model(), dropout=0.5)
    model.train()

    first, second = (held_out_scores(model, build_pairs(3)) for _ in range(2))

    assert model.training
    assert np.array_equal(first.logps, second.logps)
