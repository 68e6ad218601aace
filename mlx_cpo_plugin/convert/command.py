"""``mlx-cpo convert``: read another program's configuration, and write ours."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.convert import axolotl, llama_factory, simpo, trl
from mlx_cpo_plugin.convert.conversion import Conversion, Converter, Source, account, in_words
from mlx_cpo_plugin.convert.writing import as_yaml, told_lines
from mlx_cpo_plugin.errors import ConfigError, named, shown
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings, read_bytes, read_yaml
from mlx_cpo_plugin.types import Values


def _having(marks: Collection[str]) -> Callable[[Values], bool]:
    return lambda values: any(mark in values for mark in marks)


SOURCES: dict[str, tuple[Callable[[Values], bool], Converter]] = {
    "axolotl": (_having(axolotl.MARKS), axolotl.convert_axolotl),
    "llama-factory": (_having(llama_factory.MARKS), llama_factory.convert_llama_factory),
    "simpo": (simpo.recognises, simpo.convert_simpo),
    "trl": (_having(trl.MARKS), trl.convert_trl),
}
"""Value of ``--from`` -> whether a file is one of it, and its converter; TRL, whose keys are everywhere, is last."""

PROGRAMS = (".py", ".sh", ".ipynb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument(
        "file", metavar="FILE", help="configuration of TRL, Axolotl, LLaMA-Factory or SimPO, YAML or JSON"
    )
    parser.add_argument("--output", metavar="OUT.yaml", help="file to write; the result is printed without it")
    parser.add_argument(
        "--from",
        dest="source",
        choices=sorted(SOURCES),
        help="where FILE is from; by default seen from its keys",
    )
    parser.add_argument("--rows", type=int, help="rows of the training set, those that are held out among them")
    parser.add_argument("--drop-reference", action="store_true", help="convert DPO, too, without its reference model")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.yaml")


def run_convert(arguments: argparse.Namespace) -> int:
    """Carry out ``mlx-cpo convert``.

    Raises:
        ConfigError: the file cannot be read, is of no known source or trains no preferences; a value of it is not
            allowed here; or the output file is there already.
    """
    output = Path(arguments.output) if arguments.output else None
    if output is not None and output.exists() and not arguments.force:
        raise ConfigError(
            f"{named(str(output))} is there already; give another --output, or --force to overwrite it.", key="output"
        )
    if arguments.rows is not None and arguments.rows < 1:
        raise ConfigError(f"--rows is {arguments.rows}, but must be at least 1.", key="rows")
    settings = read_settings(arguments.file)
    source = Source(settings)
    _, converter = SOURCES[arguments.source or recognised(settings, arguments.drop_reference)]

    def convert(source: Source) -> Conversion:
        return converter(source, arguments.rows, arguments.drop_reference)

    conversion = convert(source)
    check_result(conversion, source, convert)
    told = told_lines(conversion, source, account(source, conversion, convert))
    text = as_yaml(conversion, told)
    if output is None:
        sys.stdout.write(text)
        return 0
    try:
        replace_whole(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{named(str(output))} cannot be written ({error.strerror}); give another --output.", key="output"
        ) from error
    print("\n".join(told))
    print(f"\nWritten to {named(str(output))}; look at its rows with `mlx-cpo check --config {quote(str(output))}`.")
    return 0


def read_settings(file: str) -> YamlSettings:
    """Read YAML, or JSON where the file's name says so: YAML has no tabs.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    suffix = Path(file).suffix.lower()
    if suffix in PROGRAMS and Path(file).is_file():
        raise ConfigError(
            f"{named(file)} is a program, and none is run here; write the arguments that it trains with into a YAML "
            "file, one 'key: value' a line.",
            place=file,
        )
    if suffix != ".json":
        return read_yaml(file)
    try:
        values = json.loads(read_bytes(file), object_pairs_hook=partial(_once_each, file))
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{named(file)} is not valid JSON; correct it.", place=file) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{named(file)} holds no JSON object; give one with the training arguments.", place=file)
    return YamlSettings(file, values, {})


def _once_each(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; refuse one with a key twice, as YAML is."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{named(file)} has the key {named(twice)} twice; remove one.", key=twice, place=file)
    return values


def recognised(settings: YamlSettings, drop_reference: bool = False) -> str:
    """Return which program a configuration is from, by its keys.

    Args:
        drop_reference: whether it may be one of TRL's DPO, too.

    Raises:
        ConfigError: none of them has such keys, or several of TRL's trainers may have.
    """
    file, values = named(settings.file), settings.values
    if "train_mode" in values:
        raise ConfigError(
            f"{file} has train_mode, so it is a configuration of mlx-lm-lora already; train with it.", key="train_mode"
        )
    if "rlhf_type" in values:
        raise ConfigError(
            f"rlhf_type is {shown(values['rlhf_type'])} {settings.place('rlhf_type')}, so the file is for ms-swift, "
            "whose defaults differ from TRL's; write its values as a CPOConfig, loss_type and cpo_alpha included.",
            key="rlhf_type",
            place=settings.place("rlhf_type"),
        )
    name = next((name for name, (recognises, _) in SOURCES.items() if recognises(values)), None)
    if name is None:
        raise ConfigError(
            f"{file} has no key by which a configuration of TRL, Axolotl, LLaMA-Factory or SimPO is recognised; say "
            "which it is with --from.",
            key="from",
            allowed=", ".join(SOURCES),
        )
    if name == "trl" and not (drop_reference or trl.is_surely_cpo(values) or trl.names_another_trainer(values)):
        raise ConfigError(
            f"{file} has none of the keys that only a CPOConfig has (cpo_alpha, simpo_gamma, loss_type: simpo), so it "
            "may be for DPO, ORPO or another trainer; give --from trl if it is a CPOConfig, or --drop-reference if it "
            "is for DPO.",
            key="from",
            allowed="trl",
        )
    return name


def check_result(conversion: Conversion, source: Source, convert: Callable[[Source], Conversion]) -> None:
    """Find out whether training takes the result, while the place in the file that it comes from can still be named.

    Args:
        source: the file, after its conversion.
        convert: what converted it.

    Raises:
        ConfigError: a value is not allowed.
    """
    from mlx_cpo_plugin.settings import config

    def refusal(conversion: Conversion, place: str = "") -> ConfigError | None:
        try:
            config.resolve(conversion.settings, call_place=place)
        except ConfigError as error:
            return error
        return None

    refused = refusal(conversion, f"converted from {named(source.settings.file)}")
    if refused is None:
        return
    value = conversion.settings.get(str(refused.key))
    for path in sorted(source.read(), key=lambda path: bool(source.value_at(path) != value)):  # likely ones first
        with suppress(ConfigError):  # there are keys that no file can do without
            without = refusal(convert(source.without(path)))
            if without is None or without.key != refused.key:
                name = in_words(path)
                refused = refusal(conversion, f"from {name} {source.settings.place(name)}") or refused
                break
    raise refused
