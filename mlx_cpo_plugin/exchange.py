"""Plain values exchanged between the ranks of a run, and checked: MLX's ring may go on with what is in memory.

After a rank has died its neighbours' exchanges wait for ever, raise, or return without having received anything. An
exchange of this module that returns has reached every rank, and so have all of MLX's before it.
"""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cpo_plugin.errors import UserError

_BYTES = 1024


class LostRankError(UserError):
    """Another rank has ended before the run did."""

    def __init__(self, lost: int) -> None:
        super().__init__(
            f"rank {lost} was killed or ended with an error of its own, so rank {mx.distributed.init().rank()} stops, "
            "too; the checkpoints so far are whole: start all ranks again with resume: auto (or --resume auto) to go "
            "on."
        )


# The ranks count alike, since all of them come to every exchange; memory may hold an earlier one.
_numbers = count()


def of_all_ranks(mine: Any) -> list[Any]:
    """Return what each rank gives, in the order of the ranks; all of them have to call this at the same point.

    Args:
        mine: plain values, of less than a thousand characters as JSON.

    Raises:
        LostRankError: not every rank has answered.
    """
    world = mx.distributed.init()
    if world.size() == 1:
        return [mine]
    number = next(_numbers)
    text = json.dumps([number, world.rank(), mine]).encode().ljust(_BYTES)
    assert len(text) == _BYTES, f"longer than {_BYTES} bytes: {mine!r}"
    together = mx.distributed.all_gather(mx.array(np.frombuffer(text, np.uint8))[None], stream=mx.cpu)
    mx.eval(together)
    rows = [_read(row.tobytes()) for row in np.array(together)]
    for rank, row in enumerate(rows):
        if row[:2] != [number, rank]:
            raise LostRankError(rank)
    return [row[2] for row in rows]


def _read(row: bytes) -> list[Any]:
    """Return a row as it was given; nothing where it is something else."""
    try:
        content = json.loads(row)
    except ValueError:
        return []
    return content if isinstance(content, list) and len(content) == 3 else []
