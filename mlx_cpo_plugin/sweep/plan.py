"""The runs that a sweep file asks for: a grid or random draws over options, with every seed, all checked at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints.resuming import AUTO
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.errors import ConfigError, DataError, named
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.nested import LORA_PARAMETERS, auto_if_true
from mlx_cpo_plugin.settings.options import DATA_OPTIONS
from mlx_cpo_plugin.settings.run_settings import recorded_settings
from mlx_cpo_plugin.settings.validation import Place, check, refused, unknown
from mlx_cpo_plugin.settings.yaml_settings import YamlSettings, read_yaml
from mlx_cpo_plugin.types import Option, Values

METRICS = ("verdict", "accuracy", "nll", "margin", "loss")
KEYS = ("base", "grid", "random", "seeds", "metric", "halve_at", "output")
MOST_RUNS = 10_000
# What is decided by the sweep in a configuration: each run has a folder of its own, and is continued there.
_OF_SWEEP: Values = {"fuse": False, "push_to_hub": None, "resume": AUTO}
_NOT_SWEPT = ("adapter_path", "config", *_OF_SWEEP, "seed", "train", "train_mode")
_LISTED = ", ".join(name for name in _NOT_SWEPT if name != "seed")
_UNIFORM, _LOG = "uniform", "log"
_DIGITS = 4

_N = Option("n", int, 1, "", minimum=1, maximum=MOST_RUNS)
_SEED = Option("seed", int, 0, "", minimum=0, maximum=2**32 - 1)
_METRIC = Option("metric", str, METRICS[0], "", choices=METRICS)
_FRACTION = Option("fraction", float, 0.5, "", above=0, below=1)


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        options: the options that the sweep varies, and their values here.
        seed: of the run.
        values: its whole configuration, without the folder.
        digest: of its settings and its rows; the same run has the same one, whatever else the sweep holds.
    """

    options: Values
    seed: int
    values: Values
    digest: str

    @property
    def setting(self) -> str:
        """The same text for the same options, which all seeds of a setting have."""
        return json.dumps(self.options, sort_keys=True, default=str)

    @property
    def name(self) -> str:
        """The name of its folder: readable, and different from that of any other run."""
        parts = [f"{key.rpartition('.')[2]}-{_short(value)}" for key, value in self.options.items()]
        return "_".join([*parts, f"seed-{self.seed}"])[:80] + f"-{self.digest}"


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for.

    Attributes:
        base: the configuration that is varied.
        runs: setting by setting, each with all seeds.
        metric: one of :data:`METRICS`, by which the best setting is chosen.
        halve_at: the shares of a run after which the worse half of the settings is given up, in their order.
        output: folder of all that the sweep writes.
        notes: advice, one sentence each.
    """

    file: Path
    base: Values
    runs: tuple[PlannedRun, ...]
    metric: str
    halve_at: tuple[float, ...]
    output: Path
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, list[PlannedRun]]:
        """The runs of each setting, by :attr:`PlannedRun.setting`."""
        found: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            found.setdefault(run.setting, []).append(run)
        return found


def read_sweep(file: Path, output: Path | None = None) -> Sweep:
    """Read a sweep file and check every run that it asks for.

    Raises:
        ConfigError: the file, or a setting of a run, is at fault.
        DataError: the rows cannot be read, or there are none to validate on.
    """
    given = read_yaml(file)
    values, place = given.values, given.place
    for key in values:
        if key not in KEYS:
            raise unknown("key", key, KEYS, place(key))
    base = _base(given, file)
    settings = [
        *_grid(values.get("grid"), place),
        *(("random", draw) for draw in random_draws(values.get("random"), place)),
    ]
    seeds = _seeds(values.get("seeds"), base, place)
    if not settings and len(seeds) < 2:
        raise ConfigError(
            f"{named(str(file))} asks for one run only; write a grid, random or several seeds.", key="grid"
        )
    if max(1, len(settings)) * len(seeds) > MOST_RUNS:
        raise ConfigError(
            f"{named(str(file))} asks for more than {MOST_RUNS:,} runs; make the grid smaller.", key="grid"
        )
    runs: dict[str, PlannedRun] = {}
    inputs = _Inputs()
    for origin, options in settings or [("", {})]:
        for seed in seeds:
            run = _planned(options, origin, seed, base, given, inputs)
            runs.setdefault(run.digest, run)
    metric = check(_METRIC, values.get("metric") or METRICS[0], place)
    folder = output or Path(
        check(Option("output", str, "", ""), values.get("output") or str(file.with_suffix("")), place)
    )
    if folder.is_file():
        raise refused("output", str(folder), place("output"), "a folder")
    planned = tuple(runs.values())
    return Sweep(
        file,
        base.values,
        planned,
        metric,
        _fractions(values.get("halve_at"), place),
        folder.expanduser(),
        tuple(_notes(planned, metric)),
    )


def described(options: Mapping[str, object]) -> str:
    """Return options in words: ``beta 0.1, learning_rate 1e-05``; ``as it is`` where nothing is varied."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in options.items()) or "as it is"


def value_text(value: object) -> str:
    """Return a value of an option on one line, as a reader would write it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(text.split())


def with_options(values: Values, options: Mapping[str, object]) -> Values:
    """Return a configuration with options in place of its own; null stands for the default."""
    merged = deepcopy(values)
    for key, value in options.items():
        name, _, inner = key.partition(".")
        if inner:
            held = merged.get(name)
            merged[name] = {**(held if isinstance(held, Mapping) else {}), inner: value}
        else:
            merged[name] = value
    return {key: value for key, value in merged.items() if value is not None}


def _short(value: object) -> str:
    return "".join(character if character.isalnum() or character in ".-+" else "-" for character in value_text(value))


def _base(given: YamlSettings, file: Path) -> YamlSettings:
    """Return the configuration that is varied, with the lines of the file that it stands in."""
    base = given.values.get("base")
    if isinstance(base, Mapping):
        lines = {key.removeprefix("base."): line for key, line in given.lines.items() if key.startswith("base.")}
        read = YamlSettings(given.file, dict(base), lines)
    elif isinstance(base, str):
        beside = file.parent / Path(base).expanduser()
        read = read_yaml(beside if beside.exists() else Path(base).expanduser())
    else:
        raise refused("base", base, given.place("base"), "a configuration file, or its settings")
    if "config" in read.values:
        raise refused("config", read.values["config"], read.place("config"), "left out: base is the configuration")
    if auto_if_true(resume := read.values.get("resume")) not in (None, AUTO):
        raise refused("resume", resume, read.place("resume"), "left out: each run begins anew, and goes on by itself")
    return YamlSettings(read.file, {"train_mode": "cpo", **read.values, "train": True}, read.lines)


def _grid(grid: object, place: Place) -> Iterator[tuple[str, Values]]:
    """Yield every combination of each mapping from an option to its values, after the key that the mapping has."""
    for number, part in enumerate(grid if isinstance(grid, list) else [] if grid is None else [grid]):
        key = f"grid.{number}" if isinstance(grid, list) else "grid"
        if not isinstance(part, Mapping) or not part:
            raise refused(key, part, place(key), "a mapping from an option to a list of values, or a list of such")
        for name, values in part.items():
            _refuse_unswept(name, f"{key}.{name}", place)
            if values == []:
                raise refused(f"{key}.{name}", values, place(f"{key}.{name}"), "a list with at least one value")
        _refuse_parts_of_others(part, key, place)
        lists = [values if isinstance(values, list) else [values] for values in part.values()]
        yield from ((key, dict(zip(part, combination, strict=True))) for combination in itertools.product(*lists))


def random_draws(asked: object, place: Place) -> Iterator[Values]:
    """Yield draws of options; more of them begin with those that fewer had."""
    if asked is None:
        return
    if not isinstance(asked, Mapping):
        raise refused("random", asked, place("random"), "a mapping with n and options with their ranges")
    count = check(_N, asked.get("n"), place, "random.n")
    generator = random.Random(check(_SEED, asked.get("seed", 0), place, "random.seed"))
    draws: dict[str, Callable[[], object]] = {}
    for name, spread in asked.items():
        if name not in ("n", "seed"):
            _refuse_unswept(name, f"random.{name}", place)
            draws[name] = _draw(name, spread, generator, place)
    _refuse_parts_of_others(draws, "random", place)
    if not draws:
        raise refused("random", dict(asked), place("random"), "a mapping with options beside n")
    yield from ({name: draw() for name, draw in draws.items()} for _ in range(count))


def _draw(name: str, spread: object, generator: random.Random, place: Place) -> Callable[[], object]:
    key = f"random.{name}"
    if isinstance(spread, list) and spread:
        return lambda: generator.choice(spread)
    kind, bounds = next(iter(spread.items())) if isinstance(spread, Mapping) and len(spread) == 1 else ("", None)
    numbers = bounds if isinstance(bounds, list) and len(bounds) == 2 else []
    fit = [isinstance(bound, int | float) and not isinstance(bound, bool) for bound in numbers]
    if kind not in (_UNIFORM, _LOG) or not numbers or not all(fit) or not numbers[0] < numbers[1]:
        raise refused(key, spread, place(key), "{uniform: [low, high]}, {log: [low, high]} or a list of values")
    low, high = map(float, numbers)
    if kind == _LOG and low <= 0:
        raise refused(key, spread, place(key), "{log: [low, high]} with low > 0")
    whole = _type_of(name) is int

    def draw() -> float | int:
        if kind == _LOG:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        return round(value) if whole else float(f"{value:.{_DIGITS}g}")

    return draw


def _type_of(name: str) -> type | None:
    inside = {f"lora_parameters.{option.name}": option for option in LORA_PARAMETERS}
    option = {**_options(), **inside}.get(name)
    return option.type if option else None


def _options() -> dict[str, Option]:
    return known_options(train_modes().values(), loss_types().values())


def _refuse_unswept(name: object, key: str, place: Place) -> None:
    if name in _NOT_SWEPT or not isinstance(name, str):
        instead = "seeds, beside grid and random" if name == "seed" else f"an option, but not {_LISTED}"
        raise refused(key, name, place(key), instead)


def _refuse_parts_of_others(options: Iterable[object], key: str, place: Place) -> None:
    """Refuse an option beside a part of it, of which only one could hold."""
    names = [str(name) for name in options]
    for name in names:
        whole = name.partition(".")[0]
        if whole != name and whole in names:
            at = f"{key}.{name}"
            raise refused(at, name, place(at), f"without {whole}, which holds it, or a part of each of its values")


def _seeds(seeds: object, base: YamlSettings, place: Place) -> list[int]:
    """Return the seeds: those of a list, as many as a number says, or that of the base alone."""
    if seeds is None:
        return [check(_SEED, base.values.get("seed") or 0, base.place)]
    if isinstance(seeds, list) and seeds:
        return list(dict.fromkeys(check(_SEED, seed, place, f"seeds.{i}") for i, seed in enumerate(seeds)))
    if isinstance(seeds, list):
        raise refused("seeds", seeds, place("seeds"), "a list of whole numbers, or how many there are")
    return list(range(check(_N, seeds, place, "seeds")))


def _fractions(given: object, place: Place) -> tuple[float, ...]:
    listed = [] if given is None else given if isinstance(given, list) else [given]
    fractions = [check(_FRACTION, value, place, f"halve_at.{i}") for i, value in enumerate(listed)]
    return tuple(sorted(set(fractions)))


def _planned(
    options: Values, origin: str, seed: int, base: YamlSettings, sweep: YamlSettings, inputs: _Inputs
) -> PlannedRun:
    """Return a run whose settings hold; raises as the run would, with the line of the sweep file.

    Args:
        origin: the key of the sweep file under which the options stand.
    """
    values = with_options(base.values, {**options, "seed": seed, **_OF_SWEEP})
    names = {key.partition(".")[0] for key in options} | {"seed", *_OF_SWEEP}
    varied = {key: value for key, value in values.items() if key in names}
    kept = YamlSettings(base.file, {key: value for key, value in values.items() if key not in names}, base.lines)
    where = f"in {named(sweep.file)}"
    try:
        settings = resolve(varied, kept, call_place=where).settings
        digest = inputs.digest_of(settings)
    except (ConfigError, DataError) as error:
        wrong = [key for key in options if error.key in (key, key.partition(".")[0])]
        elsewhere = isinstance(error, ConfigError) and error.place not in ("", where)  # in the base
        if elsewhere or not wrong:
            raise
        at, text = sweep.place(f"{origin}.{wrong[0]}"), str(error)
        text = text.replace(where, at, 1) if where in text else f"{text.removesuffix('.')} ({wrong[0]} {at})."
        kind = DataError if isinstance(error, DataError) else ConfigError
        raise kind(text, key=error.key, place=at, allowed=error.allowed) from error
    # Without what is left at its default, so that a later version with more options knows the run.
    defaults = {name: option.default for name, option in _options().items()}
    recorded = {
        key: value
        for key, value in recorded_settings(settings).items()
        if key not in ("adapter_path", "fuse") and (key not in defaults or value != defaults[key])
    }
    text = json.dumps([recorded, digest], sort_keys=True, default=str)
    return PlannedRun(options, seed, values, hashlib.sha256(text.encode()).hexdigest()[:8])


class _Inputs:
    """What runs read, each model's tokenizer and each set of rows once."""

    def __init__(self) -> None:
        self._models: set[str] = set()
        self._known: dict[str, str] = {}

    def digest_of(self, settings: RunSettings) -> str:
        """Return the digest of the rows.

        Raises:
            ConfigError: there is no such model.
            DataError: the rows cannot be read, or there are none to validate on.
        """
        if settings.model not in self._models:
            load_chat_tokenizer(settings.model)
            self._models.add(settings.model)
        if settings.val_batches == 0:
            raise DataError("val_batches is 0, but a sweep compares validations: set it to -1.", key="val_batches")
        key = repr([getattr(settings, option.name) for option in DATA_OPTIONS if option.name != "max_seq_length"])
        if key not in self._known:
            splits = read_splits(settings, ("train", "valid"))
            if not settings.valid_fraction and not any(group.rows for group in splits["valid"]):
                raise DataError(
                    "A sweep compares validations, but the data holds no valid rows: add some, or set valid_fraction.",
                    key="valid_fraction",
                )
            digest = hashlib.sha256()
            for split, groups in splits.items():
                for row in (row for group in groups for row in group.rows):
                    digest.update(json.dumps([split, row.value], default=str).encode())
            self._known[key] = digest.hexdigest()
        return self._known[key]


def _notes(runs: Sequence[PlannedRun], metric: str) -> Iterator[str]:
    """Yield advice where the metric has another scale in each run."""
    options: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.options.items():
            options.setdefault(key, set()).add(repr(value))
    of_loss = {option.name for loss in loss_types().values() for option in loss.options}
    scaling = [key for key in options if key in {*of_loss, LOSS_OPTION, "cpo_alpha", "preset"}]
    if metric in ("loss", "margin") and scaling:
        yield (
            f"metric is {metric}, whose scale depends on {' and '.join(scaling)}; accuracy, nll and verdict can be "
            "compared between all runs."
        )


def varied(runs: Sequence[PlannedRun]) -> dict[str, list[Any]]:
    """Return the options that a sweep varies, and their values in the order in which they come up."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in run.options.items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return found
