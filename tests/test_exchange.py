"""What ranks tell each other has arrived, or the run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_cpo_plugin import exchange
from mlx_cpo_plugin.exchange import LostRankError, gather, sum_over_ranks

Gather = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gather], None]:
    """Make this process rank 1 of 3, whose rows a given function gathers."""

    def gather_with(gather: Gather) -> None:
        world = SimpleNamespace(rank=lambda: 1, size=lambda: 3)
        monkeypatch.setattr(mx.distributed, "init", lambda: world)
        monkeypatch.setattr(
            mx.distributed, "all_gather", lambda row, stream: mx.array(gather(np.array(row))), raising=True
        )

    return gather_with


def row_of(rank: int, mine: np.ndarray) -> np.ndarray:
    """The row that another rank gives when this one gives ``mine``: a thousand times its number."""
    number = json.loads(mine.tobytes())[0]
    return np.frombuffer(json.dumps([number, rank, 1000 * rank]).encode().ljust(mine.size), np.uint8)[None]


def test_one_rank_is_told_what_it_gives() -> None:
    value: Any = {"sums": [0.1, float("inf")]}

    assert gather(value) == [value]


def test_each_rank_gives_a_value_to_all(second_of_three: Callable[[Gather], None]) -> None:
    second_of_three(lambda mine: np.concatenate([row_of(0, mine), mine, row_of(2, mine)]))

    assert gather(5) == [0, 5, 2000]
    assert gather(0.1) == [0, 0.1, 2000]


def silence(mine: np.ndarray) -> np.ndarray:
    return np.zeros_like(mine)


def noise(mine: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, mine.shape).astype(np.uint8)


def echo(mine: np.ndarray) -> np.ndarray:
    return mine


def number(mine: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"7".ljust(mine.size), np.uint8)[None]


@pytest.mark.parametrize("received", [silence, noise, echo, number])
def test_a_row_that_did_not_arrive_is_a_lost_rank(second_of_three: Callable[[Gather], None], received: Gather) -> None:
    second_of_three(lambda mine: np.concatenate([row_of(0, mine), mine, received(mine)]))

    with pytest.raises(LostRankError, match=r"^rank 2 was killed or ended .*, so rank 1 stops, too; .* resume: auto"):
        gather(5)


def test_what_memory_still_holds_of_an_earlier_exchange_is_no_answer(
    second_of_three: Callable[[Gather], None],
) -> None:
    gathered: list[np.ndarray] = []

    def stale(mine: np.ndarray) -> np.ndarray:
        gathered.append(np.concatenate([row_of(0, mine), mine, row_of(2, mine)]))
        return np.concatenate([gathered[0][:1], mine, gathered[0][2:]])

    second_of_three(stale)
    assert gather(5) == [0, 5, 2000]

    with pytest.raises(LostRankError, match=r"^rank 0 was killed"):
        gather(5)


def raise_error(error: Exception) -> Gather:
    def gather(mine: np.ndarray) -> np.ndarray:
        raise error

    return gather


def test_a_connection_that_mlx_finds_lost_is_a_lost_rank(second_of_three: Callable[[Gather], None]) -> None:
    second_of_three(raise_error(RuntimeError("[ring] connection to a peer was lost")))

    with pytest.raises(LostRankError, match=r"^another rank was killed or ended .*, so rank 1 stops, too"):
        gather(5)


def test_a_device_that_fails_in_an_exchange_is_no_lost_rank(second_of_three: Callable[[Gather], None]) -> None:
    second_of_three(raise_error(RuntimeError("[metal::malloc] Unable to allocate")))

    with pytest.raises(RuntimeError, match="Unable to allocate"):
        gather(5)


def test_a_gradient_that_not_every_rank_has_added_to_is_not_used(
    second_of_three: Callable[[Gather], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = {"weight": mx.array([1.0, 2.0])}
    monkeypatch.setattr(exchange, "average_gradients", lambda arrays: arrays)
    second_of_three(lambda mine: np.concatenate([row_of(0, mine), mine, row_of(2, mine)]))
    assert sum_over_ranks(gradient)["weight"].tolist() == [3.0, 6.0]

    second_of_three(lambda mine: np.concatenate([row_of(0, mine), mine, silence(mine)]))
    with pytest.raises(LostRankError, match=r"^rank 2 was killed"):
        sum_over_ranks(gradient)


def test_a_value_that_is_too_long_is_a_mistake_of_the_caller(second_of_three: Callable[[Gather], None]) -> None:
    second_of_three(lambda mine: pytest.fail("exchanged"))

    with pytest.raises(AssertionError, match="longer than"):
        gather("x" * exchange._BYTES)
