"""Whether a model can share prompts is asked of the model: a machine that fails meanwhile is no answer."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from support.devices import pretended
from support.memory_errors import OUT_OF_MEMORY
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.device import CUDA
from mlx_cpo_plugin.model import parity
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR
from mlx_cpo_plugin.model.parity import choose_scorer

MACHINE_FAULTS = [*OUT_OF_MEMORY, RuntimeError("[METAL] Command buffer execution failed"), KeyboardInterrupt()]
PROBES = ["_scores_one_by_one", "_scores_together"]


def failing(error: BaseException) -> object:
    def fail(*_: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("wanted", ["auto", "shared"])
@pytest.mark.parametrize("error", MACHINE_FAULTS)
def test_a_fault_of_the_machine_is_raised_as_it_is(
    probe: str, wanted: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, probe, failing(error))

    with pytest.raises(type(error)) as raised:
        choose_scorer(add_adapter(build_model()), build_pairs(3), wanted, lambda line: pytest.fail(line))

    assert raised.value is error


@pytest.mark.parametrize("error", [TypeError("takes 2 arguments"), ValueError("[matmul] shapes"), LookupError("cache")])
def test_an_error_of_the_architecture_is_an_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    model = add_adapter(build_model())
    monkeypatch.setattr(parity, "_scores_together", failing(error))
    scorer = choose_scorer(model, build_pairs(3), "auto", told.append)
    assert scorer is not None
    assert scorer.grouping == PAIR_BY_PAIR
    assert not told

    monkeypatch.setattr(parity, "_scores_one_by_one", failing(error))
    assert choose_scorer(model, build_pairs(3), "auto", told.append) is None
    assert "cannot share the prompt" in told[0]


def test_the_probe_leaves_the_mode_of_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_scores_one_by_one", failing(MemoryError()))
    model: nn.Module = build_model()
    model.train()

    with pytest.raises(MemoryError):
        choose_scorer(model, build_pairs(2), "auto")

    assert model.training


def test_an_estimate_takes_no_memory_error_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "fresh_caches", failing(MemoryError()))

    with pytest.raises(MemoryError):
        parity.expected_grouping(build_model())
    monkeypatch.setattr(parity, "fresh_caches", failing(LookupError("a cache of its own")))
    assert parity.expected_grouping(build_model()) is None


@pytest.mark.parametrize(("tf32", "shares"), [("1", True), ("0", False)])
def test_products_that_are_rounded_to_tf32_may_differ_by_its_rounding(
    tf32: str, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU multiplies float32 as TF32, and other shapes by other kernels: 5.8e-4 were seen on an H200."""
    monkeypatch.setattr(parity._Trial, "_largest_difference", lambda *_: 5.8e-4)
    with pretended(CUDA):
        monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
        scorer = choose_scorer(add_adapter(build_model()), build_pairs(2), "auto", lambda _: None)

    assert (scorer is not None) == shares


def test_plain_log_probs_are_computed_once_for_every_way_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    plain = parity.score_answers
    monkeypatch.setattr(parity, "score_answers", lambda *args: scored.append("a pair") or plain(*args))

    scorer = choose_scorer(add_adapter(build_model()), build_pairs(3), "auto", pytest.fail)

    assert scorer is not None
    assert scorer.grouping is not PAIR_BY_PAIR
    assert scored == ["a pair", "a pair"]
