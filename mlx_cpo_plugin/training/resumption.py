"""How a run begins: anew, or from a checkpoint, in a folder that becomes its own."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, BEST_ADAPTER_FILE, METRICS_FILE
from mlx_cpo_plugin.checkpoints.folder import Checkpoint
from mlx_cpo_plugin.checkpoints.resuming import once_put_aside
from mlx_cpo_plugin.checkpoints.run_folder import begin_run, goes_on, record_files
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED
from mlx_cpo_plugin.device import device_memory
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.nested import spans_run
from mlx_cpo_plugin.training.identity import check_identity
from mlx_cpo_plugin.training.wiring import Run


def restore(run: Run) -> str:
    """Restore a run from its checkpoint, if it has one; return why nothing is left to do, or nothing.

    Raises:
        ConfigError: the checkpoint is of other settings, or a new run would have nothing to do.
    """
    checkpoint = run.start.checkpoint
    if checkpoint is not None:
        check_identity(checkpoint, run.identity, run.recorded)
        if run.start.continues:
            _check_beginning(run, checkpoint)
        run.state.restore(checkpoint)
    for note in run.start.notes:
        run.reporter.say(note)
    return "" if checkpoint is None else _why_finished(run, checkpoint)


def _check_beginning(run: Run, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the settings have a run begin with other weights than it did."""
    key = "resume_adapter_file"
    began, asked = (of.get("settings", {}).get(key) for of in (checkpoint.values.get("recorded", {}), run.recorded))
    if began != asked and (began is None or asked is None or os.path.realpath(began) != os.path.realpath(asked)):
        with_what = "a fresh adapter" if began is None else repr(began)
        advice = f"remove {key}" if began is None else f"set {key} to that"
        raise ConfigError(
            f"{key} is {asked!r}, but the run in {run.start.folder} began with {with_what}: {advice}, or start anew "
            "with another adapter_path.",
            key=key,
        )


def begin(run: Run) -> bool:
    """Restore a run from its checkpoint, if it has one, and take over its folder; return whether there is work left.

    Raises:
        ConfigError: as :func:`restore`.
    """
    checkpoint, say = run.start.checkpoint, run.reporter.say
    finished = restore(run)
    if checkpoint is not None and finished:
        say(finished)
        if run.args.load_best:  # what is still to be tested or fused
            say(run.outputs.take_best(run.outputs.adapter_file) or None)
        run.reporter.resume_trackers(checkpoint)  # a test may still have to be reported there
        return False
    for line in run.memory.lines(device_memory()):
        say(line)
    _take_folder(run)
    run.reporter.start_trackers()
    run.outputs.save_settings()
    return True


def _why_finished(run: Run, checkpoint: Checkpoint) -> str:
    """Return why a restored run has nothing left to do; empty where it has."""
    start, done, iters = run.start, run.state.iteration, run.args.iters
    enough = done >= iters
    if enough and start.continues and TRAINED not in start.record.done:
        return ""  # it stopped there, and its end is still to come
    if enough and checkpoint.values["iters"] != iters:
        finished = f"The run in {start.folder} has done {done} iterations, and iters is {iters}"
        if not start.continues:
            raise ConfigError(f"{finished}; {_how_to_go_on(run, enough)} from it.", key="iters")
    elif not (start.continues and TRAINED in start.record.done and (enough or run.best.out_of_patience)):
        return ""
    elif run.outputs.is_final():
        finished = f"The run in {start.folder} finished at iteration {done}"
    else:
        return ""
    return f"{finished}: nothing was changed; {_how_to_go_on(run, enough)}."


def _how_to_go_on(run: Run, enough: bool) -> str:
    """Return what has to change for a run to go on that has done its iterations, is out of patience, or both."""
    settings = run.args.run_settings or {}
    if enough and spans_run(settings.get("lr_schedule"), settings.get("warmup_ratio")):
        return "its learning rate has come to its end, so start a new run with resume_adapter_file to go on"
    length = "iters or epochs" if settings.get("epochs") else "iters"
    ends = [length] * enough + ["early_stopping_patience"] * run.best.out_of_patience
    return f"raise {' and '.join(ends)} to go on"


def _take_folder(run: Run) -> None:
    """Make the adapter folder that of this run, with what it continues from."""
    start, outputs, say = run.start, run.outputs, run.reporter.say
    checkpoint, settings = start.checkpoint, run.args.run_settings or {}
    if start.continues:
        outputs.put_foreign_aside()
        goes_on(outputs.folder, start.record)
    else:
        sets = data if isinstance(data := settings.get("data"), list) else [{"path": data}]
        paths = [settings.get("model"), *(entry["path"] for entry in sets)]
        in_use = [Path(path) for path in paths if isinstance(path, str)]
        begin_run(outputs.folder, start.record, say, in_use)
        if outputs.adapter_file.name != ADAPTER_FILE:  # by which a folder is known to be a run's
            record_files(outputs.folder, [outputs.adapter_file.name])
    if checkpoint is None:
        return
    there = checkpoint.folder if checkpoint.folder.exists() else once_put_aside(checkpoint, outputs.folder)
    run.reporter.resume(there.parent.parent / METRICS_FILE, checkpoint)
    outputs.restore_best(checkpoint, there / BEST_ADAPTER_FILE)
    if not start.continues:
        outputs.save_checkpoint()
    say(f"Resuming after iteration {run.state.iteration} from {checkpoint.folder}.")
