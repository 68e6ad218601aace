"""What the ranks of a run exchange; a rank that cannot be reached any more ends the others with one sentence.

MLX's ring raises a RuntimeError where the connection to a neighbour is lost. An exchange that returns is no proof that
every rank took part in it, so plain values travel with a number and are checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from numpy.typing import NDArray

from mlx_cpo_plugin.errors import UserError, is_device_fault
from mlx_cpo_plugin.parameters import by_name

Plain = TypeVar("Plain")
_BYTES = 4096
# All ranks take part in every exchange, so they count alike.
_numbers = count()


class LostRankError(UserError):
    """Another rank ended before the run did.

    Args:
        lost: its number, where that is known.
    """

    def __init__(self, lost: int | None = None) -> None:
        super().__init__(
            f"{'another rank' if lost is None else f'rank {lost}'} was killed or ended with an error of its own, so "
            f"rank {mx.distributed.init().rank()} stops, too; the checkpoints so far are whole: start all ranks again "
            "with resume: auto (or --resume auto) to go on."
        )


def is_first_rank() -> bool:
    """Whether this is the rank that prints, reports and writes; the only one of most runs."""
    return bool(mx.distributed.init().rank() == 0)


def gather(mine: Plain) -> list[Plain]:
    """Return what each rank gives, in the order of the ranks; all of them have to call this at the same point.

    Args:
        mine: plain values, of less than four thousand characters as JSON.

    Raises:
        LostRankError: not every rank has answered.
    """
    world = mx.distributed.init()
    if world.size() == 1:
        return [mine]
    number = next(_numbers)
    text = json.dumps([number, world.rank(), mine]).encode().ljust(_BYTES)
    assert len(text) == _BYTES, f"longer than {_BYTES} bytes: {mine!r}"
    with _lost_rank_reported():
        together = mx.distributed.all_gather(mx.array(np.frombuffer(text, np.uint8))[None], stream=mx.cpu)
        mx.eval(together)
    values = []
    for rank, row in enumerate(np.array(together)):
        try:
            *sender, value = json.loads(row.tobytes())
        except (ValueError, TypeError):  # something else than was sent
            sender = []
        if sender != [number, rank]:
            raise LostRankError(rank)
        values.append(value)
    return values


def sum_over_ranks(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the sums of the ranks' arrays, which have the same order, shapes and dtypes on all of them.

    Raises:
        LostRankError: not every rank has taken part.
    """
    size = mx.distributed.init().size()
    with _lost_rank_reported():
        sums = {name: value * size for name, value in by_name(average_gradients(dict(arrays))).items()}
        mx.eval(sums)
    gather(None)
    return sums


def add_over_ranks(mine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of the ranks' arrays of one shape; with several ranks it is rounded to float32.

    Raises:
        LostRankError: not every rank has taken part.
    """
    if mx.distributed.init().size() == 1:
        return mine
    return np.array(sum_over_ranks({"mine": mx.array(mine, mx.float32)})["mine"], np.float64)


def from_first_rank(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the first rank's arrays, which have the same order, shapes and dtypes on all ranks.

    Raises:
        LostRankError: not every rank has taken part.
    """
    if mx.distributed.init().size() == 1:
        return dict(arrays)
    mine = {name: value if is_first_rank() else mx.zeros_like(value) for name, value in arrays.items()}
    with _lost_rank_reported():
        shared = {name: mx.distributed.all_sum(value) for name, value in mine.items()}
        mx.eval(shared)
    gather(None)
    return shared


@contextmanager
def _lost_rank_reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_device_fault(error):
            raise
        raise LostRankError from error
