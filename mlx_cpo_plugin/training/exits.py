"""Ways out of training: whatever ends it leaves the weights and the state after the last whole micro-batch."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_cpo_plugin.checkpoints.folder import read_checkpoint
from mlx_cpo_plugin.errors import StoppedError, UserError, first_line, is_out_of_memory
from mlx_cpo_plugin.exchange import LostRankError
from mlx_cpo_plugin.training.alarms import OUT_OF_MEMORY, TrainingError
from mlx_cpo_plugin.training.state import TrainingState
from mlx_cpo_plugin.training.stopping import StopRequest


class KeptState(TrainingState):
    """A state as it was when this was made, as long as no optimizer step has been taken since."""

    def __init__(self, state: TrainingState) -> None:
        super().__init__(state.model, state.step, state.parts)
        self.iteration = state.iteration
        self._gradient = dict(state.step.total or {})
        self._values = state.values()

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """Return the arrays by file and name."""
        return {**super().arrays(), "gradient": self._gradient}

    def values(self) -> dict[str, object]:
        """Return the plain values by name."""
        return self._values


class LastWhole:
    """The state after the last whole micro-batch, also while the next one is computed."""

    def __init__(self, state: TrainingState) -> None:
        self._present = state
        self._kept: KeptState | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the present state in the context; it is forgotten where this ends normally."""
        self._kept = KeptState(self._present)
        yield
        self._kept = None

    @property
    def state(self) -> TrainingState:
        """The state that can be saved."""
        kept = self._kept
        return kept if kept is not None and kept.iteration == self._present.iteration else self._present


@contextmanager
def saved_on_the_way_out(save: Callable[[], str], stop: StopRequest, say: Callable[[str], None]) -> Iterator[None]:
    """Save where an exception ends the context, and say what there is then.

    A stop has saved already, a second request for one wants nothing saved, and a lost rank's state is not that of all.

    Args:
        save: saves what can be saved without raising anything, and returns a sentence on it; none on nothing.

    Raises:
        TrainingError: memory is at an end.
        BaseException: whatever ended the context; a :class:`UserError` with the sentence behind its own.
    """
    try:
        yield
    except (StoppedError, LostRankError):
        raise
    except BaseException as error:
        if stop.forced:
            raise
        ended = is_out_of_memory(error)
        if ended:
            traceback.clear_frames(error.__traceback__)  # they hold the arrays of the micro-batch
            mx.clear_cache()
        saved = save()
        if ended and not isinstance(error, UserError):
            raise TrainingError(f"{OUT_OF_MEMORY} {saved}".strip()) from error
        if isinstance(error, UserError):
            error.args = (f"{error} {saved}".strip(),)
        elif saved:
            say(saved)
        raise


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn memory that is at an end into a sentence.

    Raises:
        TrainingError: memory is at an end.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, UserError):
            raise TrainingError(OUT_OF_MEMORY) from error
        raise


def saved_sentence(
    iteration: int,
    adapter_file: Path,
    save_weights: Callable[[], object],
    save_checkpoint: Callable[[], Path] | None,
    how_to_go_on: str,
) -> str:
    """Save weights and a checkpoint, look at the latter, and return a sentence on what there is.

    Args:
        iteration: that was the last whole one.
        save_checkpoint: returns the folder; ``None``: there is none to be written.
        how_to_go_on: after "saved: ".
    """
    fault = _fault_of(save_weights)
    after = f"after iteration {iteration}" if iteration else "from before the first step"
    weights = f"The weights {after} " + (f"could not be saved ({fault})" if fault else f"are saved in {adapter_file}")
    if save_checkpoint is None or not iteration:
        return f"{weights}."
    written: list[Path] = []
    fault = _fault_of(lambda: written.append(save_checkpoint())) or _fault_of(lambda: read_checkpoint(written[0]))
    if fault:
        return f"{weights}; no checkpoint could be written after it ({fault})."
    return f"{weights}, and all that it takes to go on in {written[0]}: {how_to_go_on}."


def _fault_of(action: Callable[[], object]) -> str:
    """Return what is wrong with an action; what ended the run matters more than this, and is raised in the end."""
    try:
        action()
    except Exception as error:
        return first_line(error)
    return ""
