"""``mlx-cpo train`` and ``mlx-cpo check``, which take the arguments of ``mlx_lm_lora.train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_cpo_plugin.activation import finder
from mlx_cpo_plugin.atomic_files import is_stream
from mlx_cpo_plugin.errors import ConfigError, PluginError, named

LONGEST, TIME = "--longest", "--time"


def run_train(words: Sequence[str]) -> int:
    """Run mlx-lm-lora's own command, hooked even where Python reads no start-up files."""
    activate()
    import mlx_lm_lora.train as host_train

    with command_line("mlx-cpo train", words):
        host_train.main()
    return 0


def run_check(words: Sequence[str]) -> int:
    """Print what a training run would make of its data.

    With ``--time`` also how long it takes, measured with the model; with ``--longest`` instead the longest pair that
    there is memory for.

    Raises:
        UserError: the settings, the model's tokenizer or the data are at fault.
    """
    activate()
    from mlx_cpo_plugin.commands import check, longest
    from mlx_cpo_plugin.settings import command_line as calls
    from mlx_cpo_plugin.settings import config, yaml_settings

    if {"-h", "--help"} & set(words):
        check_parser().print_help()
        return 0
    asks_for_longest, asks_for_time = LONGEST in words, TIME in words
    words = [word for word in words if word not in (LONGEST, TIME)]
    with command_line("mlx-cpo check", words):
        file = calls.explicit(words).get("config")
        if file and is_stream(file):
            raise ConfigError(f"{named(file)} can be read only once; give `mlx-cpo check` a file.", key="config")
        mode = calls.requested_mode(words)
        if mode is None:
            if file:
                yaml_settings.read_yaml(file)  # says so where the file is what is wrong
            raise ConfigError(
                f"{file or 'the command line'} asks for no train mode that `mlx-cpo check` knows; "
                "write train_mode: cpo into the configuration file or pass --train-mode cpo.",
                key="train_mode",
            )
        # What is looked at is a training run, whether or not the configuration file has `train: true`.
        resolved = config.resolve([*words, "--train"])
        notes = [*resolved.notes, *([] if _trains(words) else ["the run needs --train, or train: true in its file."])]
    for note in notes:
        print(f"note: {note}")
    if asks_for_longest:
        longest.run_longest(resolved.settings, mode)
    else:
        check.run_check(resolved.settings, mode, timed=asks_for_time)
    return 0


def _trains(words: Sequence[str]) -> bool:
    """Whether a command with these options trains; they are without fault."""
    from mlx_cpo_plugin.settings import config

    try:
        return bool(config.resolve(words).settings.train)
    except ConfigError:  # it does not even test
        return False


def check_parser() -> argparse.ArgumentParser:
    """Return a parser whose help speaks of checking."""
    from mlx_cpo_plugin.settings import command_line as calls

    parser = calls.build_parser(other_modes=False)
    parser.prog, parser.usage = "mlx-cpo check", "%(prog)s --config FILE [--time | --longest] [options of the run]"
    parser.description = (
        "Show what a run would train on: rows read, skipped and cut, lengths, steps,\n"
        "memory, and which tokens are scored; and what the run would refuse.\n"
        "The groups below hold options of the run that is checked."
    )
    parser.add_argument(TIME, action="store_true", help="Load the model and measure how long the run takes.")
    parser.add_argument(LONGEST, action="store_true", help="Show the longest pair that fits this device's memory.")
    return parser


def activate() -> None:
    """Hook into mlx-lm-lora.

    Raises:
        PluginError: the environment turns the plugin off.
    """
    if finder.disabled():
        raise PluginError(
            f"{finder.DISABLE_VARIABLE} turns the plugin off; unset it to train with CPO.", key=finder.DISABLE_VARIABLE
        )
    finder.install()


@contextmanager
def command_line(program: str, words: Sequence[str]) -> Iterator[None]:
    """Let the host's parser read ``words`` as the process's own command line until the context ends."""
    arguments = sys.argv
    sys.argv = [program, *words]
    try:
        yield
    finally:
        sys.argv = arguments
