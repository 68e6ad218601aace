"""What a run leaves in its folder: adapters, checkpoints and settings, saved and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, BEST_ADAPTER_FILE, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.adapter import (
    describe_adapter,
    save_adapter,
    save_adapter_config,
    save_and_verify,
    write_atomically,
)
from mlx_cpo_plugin.checkpoints.folder import Checkpoint, CheckpointFolder, folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import RunRecord
from mlx_cpo_plugin.errors import StoppedError, first_line
from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.settings.run_settings import as_yaml
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.state import TrainingState
from mlx_cpo_plugin.training.validation import BestSoFar

HOW_TO_RESUME = (
    "start it again with resume: auto (or --resume auto, or resume='auto' in the arguments of train_cpo) to go on, or "
    "start another run with these weights as resume_adapter_file"
)


class Outputs:
    """The files of a run; each rank writes its checkpoints, and only the first one anything else.

    Args:
        record: which run it is.
        constants: what every checkpoint holds besides the state, by key; ``extends_from`` is the iteration that a run
            with more ``iters`` goes on from, whose checkpoint is kept besides the newest.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainingState,
        best: BestSoFar,
        args: CPOTrainingArgs,
        record: RunRecord,
        constants: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.is_main = is_first_rank()
        # A checkpoint that no other rank writes is one to continue from.
        self.saves_alone = mx.distributed.init().size() == 1
        self.model, self.state, self.best, self.args, self.record, self.say = model, state, best, args, record, say
        self.adapter_file = Path(args.adapter_file)
        self.folder = self.adapter_file.parent
        self.best_file = self.adapter_file.with_name(BEST_ADAPTER_FILE)
        self.metadata = {"run": record.run.id}
        # A rank may die before it has written what the others have: the one before is what all of them have.
        keep = args.keep_checkpoints if self.saves_alone else max(args.keep_checkpoints, 2)
        self.checkpoints = CheckpointFolder(folder_of_rank(self.folder), record.run.id, keep, constants["extends_from"])
        self.constants = {"run": record.run.plain(), **constants}
        self.newest: Path | None = None

    def save_settings(self) -> None:
        """Write what loads the adapter, and the configuration of the run."""
        if not self.is_main:
            return
        save_adapter_config(self.model, self.adapter_file)
        values = self.args.run_settings
        if values is None:
            values = self.args.as_settings(self.state.step.optimizer, describe_adapter(self.model))
        text = as_yaml(values, self.record)
        write_atomically(
            self.adapter_file.with_name(RUN_SETTINGS), lambda partial: partial.write_text(text, encoding="utf-8")
        )

    def save_adapter(self) -> None:
        """Write the adapter as it is."""
        if self.is_main:
            save_adapter(self.model, self.adapter_file, self.metadata)

    def save_numbered(self, iteration: int) -> None:
        """Write the adapter as it is, and once more under the number of the iteration."""
        if self.is_main:
            numbered = self.folder / f"{iteration:07d}_{ADAPTER_FILE}"
            for file in (self.adapter_file, numbered):
                save_adapter(self.model, file, self.metadata)
            self.say(f"Iter {iteration}: Saved adapter weights to {self.adapter_file} and {numbered}.")

    def save_best(self, iteration: int) -> None:
        """Write the adapter as the best so far."""
        if self.is_main:
            save_and_verify(self.model, self.best_file, self.say, {**self.metadata, "iteration": str(iteration)})

    def restore_best(self, checkpoint: Checkpoint, saved: Path) -> None:
        """Put back the best adapter of a checkpoint, ``saved``, or set an incomparable one aside."""
        before = checkpoint.values["best"]
        if before["value"] is None:
            return
        if not self.best.is_comparable(before):
            self.say(
                f"The best validation so far, by {before['measure']} at iteration {before['iteration']}, cannot be "
                "compared with what save_best and the validation pairs are now: the search begins anew."
            )
            if self.is_main and self.best_file.exists():
                aside = f"{self.best_file.stem}-{before['measure']}-{before['iteration']:07d}"
                self.best_file.rename(self.best_file.with_stem(aside))
        elif self.best.saved and self.is_main and saved.exists():
            write_atomically(self.best_file, lambda partial: shutil.copyfile(saved, partial))

    def save_checkpoint(self) -> Path:
        """Write all that resuming needs, with the best adapter so far; return its folder."""
        values = {**self.constants, **self.state.values()}
        holds_best = self.is_main and self.best.saved and self.best.value is not None
        # The user may have moved it elsewhere.
        files = {BEST_ADAPTER_FILE: self.best_file} if holds_best and self.best_file.exists() else {}
        self.newest = self.checkpoints.save(values["iteration"], self.state.arrays(), values, files)
        return self.newest

    def stopped(self, signal_number: int) -> StoppedError:
        """Return what ends a run that was asked to stop, once its newest checkpoint has been read back."""
        if self.newest is not None:
            read_checkpoint(self.newest)
        return StoppedError(self.state.iteration, signal_number, HOW_TO_RESUME)

    def save_after_failure(self) -> str:
        """Save what is whole after something has failed; return a sentence on what was saved."""
        if not self.is_main:
            return ""
        iteration = self.state.iteration
        fault = _fault_of(self.save_adapter)
        after = f"after iteration {iteration}" if iteration else "from before the first step"
        weights = f"The weights {after} " + (
            f"could not be saved ({fault})" if fault else f"are saved in {self.adapter_file}"
        )
        if not (iteration and self.saves_alone and self.state.step.optimizer_is_whole):
            return f"{weights}."
        fault = _fault_of(lambda: read_checkpoint(self.save_checkpoint()))
        if fault:
            return f"{weights}; no checkpoint could be written after it ({fault})."
        return f"{weights}, and a checkpoint in {self.newest}: {HOW_TO_RESUME}."


def _fault_of(action: Callable[[], object]) -> str:
    """Return what an action fails with, since the error that ended the run matters more."""
    try:
        action()
    except Exception as error:
        return first_line(error)
    return ""
