"""The best validation: where its weights are kept, when a run ends with them, and when it is looked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from runpy import run_path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import load
from support.faulty_ranks import prepared
from support.refusals import refused
from support.resumable_runs import checkpoints, metrics, stopped, train
from support.tiny import assert_same, build_pairs, contrary, parameters, saved_arrays

from mlx_cpo_plugin.checkpoints.run_folder import record_done
from mlx_cpo_plugin.checkpoints.run_identity import TESTED, TRAINED, read_record
from mlx_cpo_plugin.comparison.measure import compare
from mlx_cpo_plugin.data.batches import BatchSize, epoch_ends, training_plan
from mlx_cpo_plugin.errors import DataError

RunMain = Callable[..., None]
# An optimizer step is three iterations: the validation after the first one is the best.
PAIRS: dict[str, Any] = {
    "iters": 6,
    "val_pairs": contrary(build_pairs(11)),
    "steps_per_eval": 3,
    "save_best": "margin",
}
BEST_AT = 3


def saved(folder: Path) -> tuple[str, dict[str, bytes]]:
    """The iteration whose weights an adapter folder says that it has, and the weights."""
    file = folder / "adapters.safetensors"
    return mx.load(str(file), return_metadata=True)[1]["iteration"], saved_arrays(file)


def test_the_best_weights_are_the_adapter_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = train(tmp_path / "last", **PAIRS)
    printed_without = capsys.readouterr().out
    train(tmp_path / "best", **PAIRS, load_best=True)
    printed = capsys.readouterr().out

    by_margin = {row["iteration"]: row["val_margins"] for row in metrics(tmp_path / "last") if row["kind"] == "valid"}
    assert max(list(by_margin)[1:], key=lambda step: by_margin[step]) == BEST_AT, "the run has another best validation"
    assert saved(tmp_path / "best") == saved(tmp_path / "best" / "best") == saved(tmp_path / "last" / "best")
    assert saved(tmp_path / "best")[0] == str(BEST_AT)
    assert saved(tmp_path / "last")[0] == "6"
    assert saved(tmp_path / "last")[1] == {name: value.tobytes() for name, value in last.items()}
    told = f" has the weights of iteration {BEST_AT}, the best by margin: {by_margin[BEST_AT]:.3f}."
    assert f"{tmp_path / 'best' / 'adapters.safetensors'}{told}" in printed
    assert f"{tmp_path / 'last' / 'best'}{told}" in printed_without


def test_without_a_measure_the_best_is_by_the_loss(tmp_path: Path) -> None:
    train(tmp_path, **PAIRS | {"save_best": None}, load_best=True)

    losses = {row["iteration"]: row["val_loss"] for row in metrics(tmp_path)[1:] if row["kind"] == "valid"}
    assert saved(tmp_path)[0] == str(min(losses, key=lambda step: losses[step]))


@pytest.mark.slow
def test_a_run_that_ended_with_its_best_weights_goes_on_from_its_last_ones(tmp_path: Path) -> None:
    train(tmp_path / "run", **PAIRS, load_best=True)

    train(tmp_path / "run", **PAIRS | {"iters": 12}, load_best=True, resume="auto")

    train(tmp_path / "whole", **PAIRS | {"iters": 12}, load_best=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    newest = [tmp_path / name / "checkpoints" / "0000012" / "adapters.safetensors" for name in ("run", "whole")]
    assert saved_arrays(newest[0]) == saved_arrays(newest[1])


@pytest.mark.slow
def test_a_run_that_stopped_where_it_is_now_to_end_has_its_best_weights(tmp_path: Path) -> None:
    stopped(tmp_path, 4, **PAIRS, load_best=True)
    best = saved(tmp_path / "best")
    assert saved(tmp_path) != best

    train(tmp_path, **PAIRS | {"iters": 4}, load_best=True, resume="auto")

    assert saved(tmp_path) == best
    record = read_record(tmp_path)
    assert record is not None
    assert TRAINED in record.done


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_finished_run_can_be_given_its_other_weights_and_is_tested_anew(
    tmp_path: Path, before: bool, after: bool
) -> None:
    train(tmp_path / "run", **PAIRS, load_best=before)
    record_done(tmp_path / "run", TESTED)

    train(tmp_path / "run", **PAIRS, load_best=after, resume="auto")

    train(tmp_path / "whole", **PAIRS, load_best=after)
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    record = read_record(tmp_path / "run")
    assert record is not None
    assert record.done == {"trained": ""}
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    train(tmp_path / "run", **PAIRS, load_best=after, resume="auto")
    assert left == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}


@pytest.mark.slow
def test_a_stop_leaves_the_last_weights_and_the_end_the_best(tmp_path: Path) -> None:
    stopped(tmp_path / "run", 5, **PAIRS, load_best=True)
    assert saved(tmp_path / "run")[0] == "5"

    train(tmp_path / "run", **PAIRS, load_best=True, resume="auto")

    assert saved(tmp_path / "run") == saved(tmp_path / "run" / "best")


def test_a_run_from_another_runs_checkpoint_ends_with_the_best_of_both(tmp_path: Path) -> None:
    train(tmp_path / "whole", **PAIRS, load_best=True)
    stopped(tmp_path / "first", 4, **PAIRS, load_best=True)

    train(tmp_path / "second", **PAIRS, load_best=True, resume=str(tmp_path / "first"))

    assert saved(tmp_path / "second") == saved(tmp_path / "whole")
    assert saved(tmp_path / "second")[0] == str(BEST_AT)


def test_patience_ends_with_the_best_weights(tmp_path: Path) -> None:
    train(tmp_path, **PAIRS | {"iters": 40, "steps_per_eval": 1}, load_best=True, early_stopping_patience=2)

    reached = int(checkpoints(tmp_path)[-1])
    assert reached < 40
    assert saved(tmp_path)[0] == str(reached - 2)


def test_a_best_adapter_that_is_gone_is_told_and_the_last_weights_are_saved(tmp_path: Path) -> None:
    class Mover:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 5:
                (tmp_path / "best").rename(tmp_path / "mine")

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    train(tmp_path, **PAIRS, load_best=True, callback=Mover())

    assert saved(tmp_path)[0] == "6"
    told = [row["text"] for row in metrics(tmp_path) if row["kind"] == "warning"]
    assert any("cannot be read" in text and "The last weights are saved instead." in text for text in told)


@pytest.mark.parametrize("missing", [{"val_pairs": None}, {"val_batches": 0}])
def test_the_best_of_no_validation_is_refused_before_anything_is_written(
    tmp_path: Path, missing: dict[str, Any]
) -> None:
    with refused(DataError, key="load_best"):
        train(tmp_path / "run", **PAIRS | missing, load_best=True)
    assert not (tmp_path / "run").exists()


def test_what_needs_validations_is_told_to_have_no_effect_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, iters=1, save_best="loss", early_stopping_patience=2)

    assert "Nothing is validated: save_best and early_stopping_patience have no effect." in capsys.readouterr().out


RANK = """
from hashlib import sha256
from pathlib import Path
from support.resumable_runs import train
from support.tiny import add_adapter, build_model, build_pairs, contrary, parameters

model = add_adapter(build_model())
settings = dict(iters=3, val_pairs=contrary(build_pairs(11)), steps_per_eval=1, save_best="margin", load_best=True)
train(Path({folder!r}), model=model, **settings)
print("weights", sha256(b"".join(value.tobytes() for _, value in sorted(parameters(model).items()))).hexdigest())
"""


@pytest.mark.slow
def test_all_ranks_end_with_the_best_weights_of_the_first(tmp_path: Path) -> None:
    script, folder = tmp_path / "rank.py", tmp_path / "run"
    script.write_text(RANK.format(folder=str(folder)))

    ranks = prepared(2, tmp_path / "ring", run_path, str(script))

    assert [rank.code for rank in ranks] == [0, 0], ranks
    (own,), (of_the_other,) = [[line for line in rank.printed.splitlines() if "weights " in line[:8]] for rank in ranks]
    assert own == of_the_other
    assert saved(folder) == saved(folder / "best")
    assert saved(folder)[0] != "3", "the last weights are the best"


def validate_on_the_contrary(settings: dict[str, Any]) -> None:
    """Held-out rows that prefer what the training rows reject: each validation is worse than the one before."""
    folder = Path(settings["data"])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    swapped = [json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) for row in rows]
    for split in ("valid", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(swapped))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trained",
    [
        {"train_type": "lora"},
        {"train_type": "dora"},
        {"train_type": "full"},
        {"qat_enable": True, "qat_bits": 4},
        {"grad_checkpoint": True, "efficient_long_context": True, "seq_step_size": 8},
    ],
)
def test_the_folder_of_the_best_is_one_that_mlx_lm_loads_and_test_takes_its_weights(
    settings: dict[str, Any], run_main: RunMain, trained: dict[str, Any]
) -> None:
    validate_on_the_contrary(settings)
    folder = Path(settings["adapter_path"])
    wanted = {"iters": 6, "steps_per_eval": 2, "val_batches": -1, "test_batches": -1, **trained}

    run_main({**settings, **wanted, "load_best": True, "test": True})

    models = [load(settings["model"], adapter_path=str(path))[0] for path in (folder, folder / "best")]
    assert_same(*(parameters(model) for model in models))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (test,) = [row for row in rows if row["kind"] == "test"]
    compared = compare([folder / "best"], prompts=["Hi!"], max_tokens=1, say=lambda _: None)
    assert compared.preferences[1].means[0]["loss"] == pytest.approx(test["test_loss"], rel=1e-5)
    validations = [row for row in rows[1:] if row["kind"] == "valid"]
    best = min(validations, key=lambda row: row["val_loss"])
    assert best != validations[-1], "the last weights are the best"
    assert test["test_loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert saved(folder)[0] == str(best["iteration"])


@pytest.mark.slow
def test_the_best_of_no_validation_rows_is_refused_before_the_model_is_loaded(
    settings: dict[str, Any], run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_cpo_plugin.run.mode.load_model", lambda *_: pytest.fail("the model was loaded"))
    (Path(settings["data"]) / "valid.jsonl").unlink()

    with refused(DataError, key="load_best"):
        run_main({**settings, "load_best": True})
    assert not Path(settings["adapter_path"]).exists()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    pairs=st.integers(1, 4),
    tokens=st.none() | st.integers(1, 20),
    accumulation=st.integers(1, 3),
    iters=st.integers(1, 30),
)
def test_an_epoch_ends_where_the_plan_has_had_every_pair_equally_often(
    lengths: list[int], pairs: int, tokens: int | None, accumulation: int, iters: int
) -> None:
    size = BatchSize(pairs, tokens, accumulation)
    plan = training_plan(lengths, size, iters=iters, seed=3)
    seen = accumulate(len(micro_batch.indices) for micro_batch in plan)

    ends = epoch_ends(lengths, size, iters=iters, seed=3)

    assert ends == {number for number, pairs in enumerate(seen, 1) if pairs % len(lengths) == 0}


def validated(folder: Path) -> list[int]:
    return [row["iteration"] for row in metrics(folder) if row["kind"] == "valid"]


# Eleven pairs in batches of two are six micro-batches, in windows of three.
def test_each_epoch_ends_with_a_validation_and_a_saved_adapter_and_so_does_the_run(tmp_path: Path) -> None:
    each_epoch = {"eval_per_epoch": True, "save_per_epoch": True, "steps_per_eval": 4, "steps_per_save": 1}

    train(tmp_path, **PAIRS | {"iters": 14} | each_epoch)

    assert validated(tmp_path) == [1, 6, 12, 14]
    assert sorted(path.name[:7] for path in tmp_path.glob("0*.safetensors")) == ["0000006", "0000012"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 6, 7])
def test_a_validation_at_the_end_of_an_epoch_comes_once_however_the_run_is_interrupted(tmp_path: Path, at: int) -> None:
    settings = PAIRS | {"iters": 13, "eval_per_epoch": True}
    train(tmp_path / "whole", **settings)

    stopped(tmp_path / "run", at, **settings)
    train(tmp_path / "run", **settings, resume="auto")

    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert validated(tmp_path / "run") == [1, 6, 12, 13]


@pytest.mark.slow
@pytest.mark.parametrize("iters", [6, 7, 12])
def test_more_epochs_than_a_finished_run_had_validate_like_never_interrupted(tmp_path: Path, iters: int) -> None:
    settings = PAIRS | {"eval_per_epoch": True}
    train(tmp_path / "run", **settings | {"iters": iters})

    train(tmp_path / "run", **settings | {"iters": 18}, resume="auto")

    train(tmp_path / "whole", **settings | {"iters": 18})
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert saved(tmp_path / "run" / "best") == saved(tmp_path / "whole" / "best")
