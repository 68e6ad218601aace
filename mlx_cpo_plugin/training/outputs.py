"""What a run leaves in its folder: adapters, checkpoints and settings, saved and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_cpo_plugin.atomic_files import partial_of, remove
from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, BEST, BEST_ADAPTER_FILE, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.adapter import (
    CheckpointError,
    adapter_metadata,
    load_adapter,
    save_adapter,
    save_adapter_config,
    save_and_verify,
    write_atomically,
)
from mlx_cpo_plugin.checkpoints.folder import Checkpoint, CheckpointFolder, folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_folder import put_aside
from mlx_cpo_plugin.checkpoints.run_identity import RunRecord
from mlx_cpo_plugin.errors import StoppedError, first_line
from mlx_cpo_plugin.exchange import from_first_rank, gather, is_first_rank
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.settings.run_settings import as_yaml
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.state import TrainingState
from mlx_cpo_plugin.training.validation import BestSoFar
from mlx_cpo_plugin.types import Values

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
        constants: Values,
        say: Callable[[str], None],
    ) -> None:
        self.is_main = is_first_rank()
        # A checkpoint that no other rank writes is one to continue from.
        self.saves_alone = mx.distributed.init().size() == 1
        self.model, self.state, self.best, self.args, self.record, self.say = model, state, best, args, record, say
        self.adapter_file = Path(args.adapter_file)
        self.folder = self.adapter_file.parent
        self.best_file = self.folder / BEST / ADAPTER_FILE
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
        settings, origin = self.constants["recorded"]["settings"], self.record.origin
        text = as_yaml(settings if origin is None else settings | {"resume": origin.checkpoint}, self.record)
        write_atomically(
            self.adapter_file.with_name(RUN_SETTINGS), lambda partial: partial.write_text(text, encoding="utf-8")
        )

    def metadata(self, iteration: int) -> dict[str, str]:
        """Return what an adapter says of itself that has the weights after an iteration."""
        return {"run": self.record.run.id, "iteration": str(iteration)}

    def save_adapter(self) -> None:
        """Write the adapter as it is."""
        if self.is_main:
            save_adapter(self.model, self.adapter_file, self.metadata(self.state.iteration))

    def save_numbered(self, iteration: int) -> None:
        """Write the adapter as it is, and once more under the number of the iteration."""
        if self.is_main:
            numbered = self.folder / f"{iteration:07d}_{ADAPTER_FILE}"
            for file in (self.adapter_file, numbered):
                save_adapter(self.model, file, self.metadata(iteration))
            self.say(f"Iter {iteration}: Saved adapter weights to {self.adapter_file} and {numbered}.")

    def save_best(self, iteration: int) -> None:
        """Write the adapter as the best so far."""
        if self.is_main:
            self._put_best(lambda file: save_and_verify(self.model, file, self.say, self.metadata(iteration)))

    def _put_best(self, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill the adapter in ``best/``, which mlx_lm can load from the moment it is there."""
        folder = self.best_file.parent
        if folder.is_symlink():
            folder.unlink()
        written = folder if folder.exists() else partial_of(folder)
        try:
            save_adapter_config(self.model, written / ADAPTER_FILE)
            write(written / ADAPTER_FILE)
            if written != folder:
                written.rename(folder)
        finally:
            remove(partial_of(folder))

    def restore_best(self, checkpoint: Checkpoint, saved: Path) -> None:
        """Put back the best adapter of a checkpoint, ``saved``, or set an incomparable one aside."""
        before = checkpoint.values["best"]
        if before["value"] is None:
            return
        comparable = self.best.is_comparable(before)
        if self.is_main and saved.exists() and (self.best.saved or not comparable):
            self._put_best(lambda file: write_atomically(file, lambda partial: shutil.copyfile(saved, partial)))
        if not comparable:
            self.say(
                f"The best validation so far, by {before['measure']} at iteration {before['iteration']}, cannot be "
                "compared with what save_best and the validation pairs are now: the search begins anew."
            )
            folder = self.best_file.parent
            if self.is_main and folder.exists():
                aside = folder.with_name(f"{BEST}-{before['measure']}-{before['iteration']:07d}")
                remove(aside)  # of the same iteration: this run was resumed from there before
                folder.rename(aside)

    def take_best(self, file: Path) -> str:
        """Give the model of every rank the weights of the best validation from ``file``; return why not, if not.

        All ranks have to call this.
        """
        fault = ""
        if self.best.value is None:
            fault = "load_best has no effect: no validation of this run has kept its weights."
        elif self.is_main:
            try:
                # Its run may be the one that this one started from.
                if adapter_metadata(file).get("iteration") != str(self.best.iteration):
                    raise CheckpointError(f"{file} is not the adapter of iteration {self.best.iteration}.")
                load_adapter(self.model, file)
            except CheckpointError as error:
                fault = str(error)
        if not gather(not fault)[0]:
            return fault or "The first rank has not taken them."
        weights = from_first_rank(by_name(self.model.trainable_parameters()))
        self.model.update(tree_unflatten(list(weights.items())))
        return ""

    def is_final(self) -> bool:
        """Whether a finished run has left the best weights or the last ones, as ``load_best`` now says.

        All ranks have to call this.
        """
        last, best = self.state.iteration, self.best.iteration or self.state.iteration
        there = str(last)
        if self.is_main:
            there = self._written_by_run().get("iteration", "")
        other = str(last if self.args.load_best else best)
        return bool(gather(there and (best == last or there != other))[0])

    def put_foreign_aside(self) -> None:
        """Put aside what another program has written in the place of the run's adapter."""
        if self.is_main and not self._written_by_run():
            put_aside(self.folder, self.record, [self.adapter_file.name], self.say)

    def _written_by_run(self) -> dict[str, str]:
        """Return what the run's adapter says of itself; empty where there is none, or something else in its place."""
        with suppress(CheckpointError):
            metadata = adapter_metadata(self.adapter_file)
            return metadata if self.record.has_written(metadata) else {}
        return {}

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
