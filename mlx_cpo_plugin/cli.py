"""The command ``mlx-cpo``: it picks the subcommand, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.bench import command as bench
from mlx_cpo_plugin.commands import doctor, losses, train
from mlx_cpo_plugin.comparison import command as compare
from mlx_cpo_plugin.console import discard, keep_standard_descriptors, lasting_output
from mlx_cpo_plugin.convert import command as convert
from mlx_cpo_plugin.errors import UserError, first_line, is_out_of_memory, named
from mlx_cpo_plugin.export import command as export
from mlx_cpo_plugin.publish import command as push
from mlx_cpo_plugin.report import command as report
from mlx_cpo_plugin.studio import command as studio
from mlx_cpo_plugin.sweep import command as sweep

# Subcommands whose arguments are those of mlx_lm_lora.train, read by the parser of the train mode.
TRAINING_COMMANDS = {"train": train.run_train, "check": train.run_check}

# Without which there is nothing to train with.
HOST_PACKAGES = ("mlx", "mlx_lm", "mlx_lm_lora")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand with ``arguments`` (the process's own by default) and return its exit code."""
    keep_standard_descriptors()
    if sys.stdout is None:  # closed when Python started, as standard error may be
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show is no reason to lose the rest
        sys.stdout.reconfigure(errors="replace")
    try:
        with lasting_output(streams=("stderr",)):
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever reads the output, `head` for one, has seen enough
        discard(sys.stdout)
        return 0
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in HOST_PACKAGES:
            raise
        fault = f"{error.name} cannot be imported ({first_line(error)})"
        print(f"error: {fault}; `mlx-cpo doctor` says what to do.", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: {named(str(error.filename))} is too long for a path; give another.", file=sys.stderr)
            return 2
        if error.errno != errno.ENOSPC:
            raise
        if error.filename is None:
            discard(sys.stdout)
        place = "the output" if error.filename is None else named(str(error.filename))
        print(f"error: the disk under {place} is full; free space or write elsewhere.", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: The device is out of memory; close other programs, or give a smaller model.", file=sys.stderr)
        return 2


def _run(words: Sequence[str]) -> int:
    if words and words[0] in TRAINING_COMMANDS:
        return TRAINING_COMMANDS[words[0]](words[1:])
    chosen = build_parser().parse_args(words)
    return int(chosen.run(chosen))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand but the two that take the arguments of ``mlx_lm_lora.train``."""
    parser = argparse.ArgumentParser(
        prog="mlx-cpo", description="Contrastive Preference Optimisation (CPO) for mlx-lm-lora."
    )
    parser.add_argument("--version", action="version", version=f"mlx-cpo-plugin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        subcommand: argparse.ArgumentParser = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}."
        )
        subcommand.set_defaults(run=run)
        return subcommand

    training = "takes the arguments of mlx_lm_lora.train"
    commands.add_parser("train", help=f"train, even where Python skips start-up files; {training}")
    commands.add_parser(
        "check",
        help="show what a run would train on and what it would refuse, without loading the model; with --time, how "
        f"long it takes, measured with the model; with --longest, the longest pair that fits in memory; {training}",
    )
    report.add_arguments(add("report", report.run_report, "write a report, or plots, of one run or several"))
    compare.add_arguments(
        add(
            "compare",
            compare.run_compare,
            "say which model is better: the base model or tuned ones, by held-out pairs, answers, rewards and judges",
        )
    )
    export.add_arguments(
        add("export", export.run_export, "write an adapter in the form of another program, and score it there")
    )
    sweep.add_arguments(
        add("sweep", sweep.run_sweep, "train with many settings and seeds, and write the best configuration")
    )
    convert.add_arguments(
        add(
            "convert",
            convert.run_convert,
            "convert a configuration of TRL, SimPO, Axolotl or LLaMA-Factory into one of this plugin",
        )
    )
    push.add_arguments(
        add(
            "push",
            push.run_push,
            "push an adapter or a model, with its card, to the Hugging Face hub",
        )
    )
    add("demo", _demo, "train a tiny model and show what changed")
    doctor.add_arguments(
        add("doctor", _doctor, "check the installation, and with --selftest what this device computes")
    )
    losses.add_arguments(add("losses", losses.run_losses, "list the losses that dpo_cpo_loss_type can name"))
    bench.add_arguments(
        add("bench", bench.run_bench, "compare time and memory with mlx-lm-lora's own trainer on the same work")
    )
    studio.add_arguments(
        add("studio", studio.run_studio, "open a local page to write a configuration, check data, train and watch")
    )
    return parser


def _demo(chosen: argparse.Namespace) -> int:
    train.activate()
    from mlx_cpo_plugin.demo.run import run_demo

    return run_demo()


def _doctor(chosen: argparse.Namespace) -> int:
    return doctor.run_doctor(chosen.json, chosen.selftest or chosen.config is not None, chosen.config)
