"""The command ``mlx-cpo``: train, check, convert, report, compare, demo, doctor, losses, bench and studio."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.bench.command import add_arguments as add_bench_arguments
from mlx_cpo_plugin.bench.command import run_bench
from mlx_cpo_plugin.comparison.command import add_arguments as add_compare_arguments
from mlx_cpo_plugin.comparison.command import run_compare
from mlx_cpo_plugin.console import discard, keep_standard_descriptors
from mlx_cpo_plugin.convert.command import add_arguments as add_convert_arguments
from mlx_cpo_plugin.convert.command import run_convert
from mlx_cpo_plugin.errors import ConfigError, PluginError, UserError
from mlx_cpo_plugin.report.command import add_arguments as add_report_arguments
from mlx_cpo_plugin.report.command import run_report
from mlx_cpo_plugin.studio.command import add_arguments as add_studio_arguments
from mlx_cpo_plugin.studio.command import run_studio

# Subcommands whose arguments are those of mlx_lm_lora.train, read by the parser of the train mode.
TRAINING_COMMANDS = ("train", "check")
RUNNERS = {
    "convert": run_convert,
    "report": run_report,
    "compare": run_compare,
    "bench": run_bench,
    "studio": run_studio,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand with ``arguments`` (the process's own by default) and return its exit code."""
    keep_standard_descriptors()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output, `head` for one, has seen enough
        discard(sys.stdout)
        return 0
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        discard(sys.stdout)
        print("error: the disk under the output is full; free space or let it go elsewhere.", file=sys.stderr)
        return 2


def _run(words: Sequence[str]) -> int:
    if words and words[0] in TRAINING_COMMANDS:
        return {"train": _train, "check": _check}[words[0]](words[1:])
    chosen = build_parser().parse_args(words)
    if chosen.command == "demo":
        return _demo()
    if chosen.command == "doctor":
        return _doctor(chosen)
    if chosen.command in RUNNERS:
        return RUNNERS[chosen.command](chosen)
    return _losses(chosen.json)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand but the two that take the arguments of ``mlx_lm_lora.train``."""
    parser = argparse.ArgumentParser(
        prog="mlx-cpo", description="Contrastive Preference Optimisation (CPO) for mlx-lm-lora."
    )
    parser.add_argument("--version", action="version", version=f"mlx-cpo-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training = "takes the arguments of mlx_lm_lora.train"
    commands.add_parser("train", help=f"train, even where Python skips start-up files; {training}")
    commands.add_parser("check", help=f"show what a run would train on, without loading the model; {training}")
    report = "write a report, or plots, of one run or several"
    add_report_arguments(commands.add_parser("report", help=report, description=report))
    compare = "compare answers and preference accuracy of the base model and the tuned one"
    add_compare_arguments(commands.add_parser("compare", help=compare, description=compare))
    convert = "convert a configuration of TRL, SimPO, Axolotl or LLaMA-Factory into one of this plugin"
    add_convert_arguments(commands.add_parser("convert", help=convert, description=convert))
    commands.add_parser("demo", help="train a tiny model and show what changed")
    doctor = commands.add_parser("doctor", help="check the installation, and with --selftest what this device computes")
    doctor.add_argument("--selftest", action="store_true", help="compute on this device and compare with float64")
    doctor.add_argument(
        "--config", metavar="FILE", help="self-test the model and first rows of this configuration, too"
    )
    losses = commands.add_parser("losses", help="list the losses that dpo_cpo_loss_type can name")
    for command in (doctor, losses):
        command.add_argument("--json", action="store_true", help="print JSON")
    bench = "compare time and memory with mlx-lm-lora's own trainer on the same work"
    add_bench_arguments(commands.add_parser("bench", help=bench, description=bench))
    studio = "open a local page to write a configuration, check data, train and watch"
    add_studio_arguments(commands.add_parser("studio", help=studio, description=studio))
    return parser


def _activate() -> None:
    from mlx_cpo_plugin.activation import finder

    if finder.disabled():
        raise PluginError(f"{finder.DISABLE_VARIABLE} turns the plugin off; unset it to train with CPO.")
    finder.install()


def _train(words: Sequence[str]) -> int:
    _activate()
    import mlx_lm_lora.train as host_train

    with _command_line("mlx-cpo train", words):
        host_train.main()
    return 0


@contextmanager
def _command_line(program: str, words: Sequence[str]) -> Iterator[None]:
    """Let the host's parser read ``words`` as the process's own command line until the context ends."""
    arguments = sys.argv
    sys.argv = [program, *words]
    try:
        yield
    finally:
        sys.argv = arguments


def _check(words: Sequence[str]) -> int:
    _activate()
    with _command_line("mlx-cpo check", words):
        return _check_run(words)


def _check_run(words: Sequence[str]) -> int:
    from mlx_cpo_plugin.commands.check import run_check
    from mlx_cpo_plugin.settings import config

    mode = config.requested_mode(words)
    if mode is None:
        file = config.explicit(words).get("config")
        if file:
            config.read_yaml(file)  # says so where the file is what is wrong
        source = file or "the command line"
        raise ConfigError(
            f"{source} asks for no train mode that `mlx-cpo check` knows; "
            "write train_mode: cpo into the configuration file or pass --train-mode cpo."
        )
    # What is looked at is a training run, whether or not the configuration file has `train: true`.
    resolved = config.resolve([*words, "--train"], mode=mode)
    for note in resolved.notes:
        print(f"note: {note}")
    run_check(resolved.settings)
    return 0


def _demo() -> int:
    _activate()
    from mlx_cpo_plugin.demo.run import run_demo

    return run_demo()


def _doctor(chosen: argparse.Namespace) -> int:
    from mlx_cpo_plugin.commands.doctor import run_doctor

    return run_doctor(chosen.json, chosen.selftest or chosen.config is not None, chosen.config)


def _losses(as_json: bool) -> int:
    from mlx_cpo_plugin.plugins import loss_types
    from mlx_cpo_plugin.settings.cpo_options import CPO_ALPHA, LOSS_OPTION, PRESETS

    rows = [
        {
            "name": loss.name,
            "title": loss.title,
            "formula": loss.formula,
            "source": loss.source,
            "length_normalised": loss.length_normalised,
            "options": [
                {"name": option.name, "default": option.default, "allowed": option.allowed(), "help": option.help}
                for option in loss.options
            ],
            "presets": [
                {"name": preset.name, "title": preset.title, "source": preset.source, "values": dict(preset.values)}
                for preset in PRESETS
                if preset.values[LOSS_OPTION] == loss.name
            ],
        }
        for loss in loss_types().values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_loss(row)
        print(f"With each of them: cpo_alpha, {CPO_ALPHA.allowed()}, default {CPO_ALPHA.default}")
        print(f"{'':10} + cpo_alpha * negative log-likelihood of the chosen answers, averaged over all their tokens")
        print(f"{'':10} Xu et al. 2024, arXiv 2401.08417, section 3")
    return 0


def _print_loss(row: dict[str, Any]) -> None:
    print(f"{row['name']:10} {row['title']}")
    print(f"{'':10} {row['formula']}")
    if row["source"]:
        print(f"{'':10} {row['source']}")
    for option in row["options"]:
        print(f"{'':10} {option['name']}: {option['allowed']}, default {option['default']}")
    for preset in row["presets"]:
        values = ", ".join(f"{name} {value}" for name, value in preset["values"].items() if value != row["name"])
        print(f"{'':10} preset: {preset['name']} sets {values}; {preset['source']}")
