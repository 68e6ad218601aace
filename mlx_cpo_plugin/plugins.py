"""The plugin manager, and the train modes and losses that plugins register."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy

from mlx_cpo_plugin import hookspecs
from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.errors import PluginError
from mlx_cpo_plugin.types import LossType, TrainMode, Values

BUILT_IN = "mlx-cpo-plugin"
BLOCK_VARIABLE = "MLX_CPO_PLUGIN_BLOCK"
# Arguments of the commands that no option may be called as, beside the settings of every run.
OF_COMMANDS = frozenset(("config", "help", "train_mode"))

Entry = TypeVar("Entry", TrainMode, LossType)
# What each hook returns.
KINDS: dict[str, type] = {"register_train_modes": TrainMode, "register_loss_types": LossType}
HOOKS = {kind: hook for hook, kind in KINDS.items()}


@lru_cache(maxsize=1)
def get_plugin_manager() -> pluggy.PluginManager:
    """Return the plugin manager, with the built-in plugin and all entry points loaded.

    A plugin that cannot be imported or registered is skipped with a warning. The names in the environment
    variable ``MLX_CPO_PLUGIN_BLOCK`` (separated by commas) are never loaded.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    for name in os.environ.get(BLOCK_VARIABLE, "").split(","):
        if name.strip():
            manager.set_blocked(name.strip())
    # Imported late, since what it imports imports this module.
    manager.register(import_module("mlx_cpo_plugin.cpo"), name=BUILT_IN)
    loaded = {BUILT_IN: _distribution_of(BUILT_IN)}
    for entry_point in entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        origin = _origin(entry_point)
        if entry_point.name not in loaded:
            _load(manager, entry_point)
            loaded[entry_point.name] = origin
        elif origin != loaded[entry_point.name] and not manager.is_blocked(entry_point.name):
            taken = PluginError(f"{loaded[entry_point.name]} has one of this name")
            _warn_skipped(entry_point.name, taken, origin)
    return manager


def _load(manager: pluggy.PluginManager, entry_point: EntryPoint) -> None:
    if manager.is_blocked(entry_point.name):
        return
    try:
        manager.register(entry_point.load(), name=entry_point.name)
        manager.check_pending()
    except (Exception, SystemExit) as error:  # whatever a third party's module raises, the other plugins go on
        if manager.has_plugin(entry_point.name):
            manager.unregister(name=entry_point.name)
        _warn_skipped(entry_point.name, error)


def _warn_skipped(plugin: str, error: BaseException, origin: str = "") -> None:
    warnings.warn(
        f"Plugin {plugin!r} from {origin or _distribution_of(plugin)} is skipped: {type(error).__name__}: {error}. "
        f"Fix or uninstall it, or set {BLOCK_VARIABLE}={plugin} to silence this.",
        RuntimeWarning,
        stacklevel=2,
    )


def _distribution_of(plugin: str) -> str:
    """Return the distribution that a plugin came from, with its version, e.g. ``rank-loss 1.0``."""
    if plugin == BUILT_IN:
        return f"{BUILT_IN} {__version__}"
    for entry_point in entry_points(group=hookspecs.ENTRY_POINT_GROUP, name=plugin):
        if entry_point.dist is not None:
            return _origin(entry_point)
    return f"the plugin {plugin!r}, registered by code"


def _origin(entry_point: EntryPoint) -> str:
    return f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist is not None else entry_point.value


def train_modes() -> dict[str, TrainMode]:
    """Return every registered train mode by name; raises ``PluginError`` where two plugins claim one name."""
    return _by_name("train mode", TrainMode)


def loss_types() -> dict[str, LossType]:
    """Return every registered loss by name, the built-in ones first; raises as :func:`train_modes` does."""
    return _by_name("loss type", LossType)


def option_origins() -> dict[str, str]:
    """Return the distribution that each option is from, by the option's name, but for this distribution's own."""
    claims: list[tuple[str, TrainMode | LossType]] = [*_claims(TrainMode), *_claims(LossType)]
    origins = {option.name: plugin for plugin, entry in reversed(claims) for option in entry.options}
    return {name: _distribution_of(plugin) for name, plugin in origins.items() if plugin != BUILT_IN}


def claimed_mode(name: str) -> TrainMode | None:
    """Return the train mode of this name, if any; the first one if two plugins register it."""
    return next((mode for _, mode in _claims(TrainMode) if mode.name == name), None)


def is_built_in(mode: TrainMode) -> bool:
    """Whether this distribution registers the mode."""
    return any(entry is mode for plugin, entry in _claims(TrainMode) if plugin == BUILT_IN)


def sets_of(mode: TrainMode, args: object, tokenizer: object) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Return training, validation and test set of a mode, of which None is an empty one.

    Raises:
        PluginError: it returns something else.
    """
    sets: Any = mode.load_dataset(args, tokenizer)
    if isinstance(sets, tuple | list) and len(sets) == 3:
        sets = [() if rows is None else rows for rows in sets]
        if all(hasattr(rows, "__len__") for rows in sets):
            return sets[0], sets[1], sets[2]
    raise _unlike(mode, "load_dataset", sets, "three sequences: training, validation and test rows")


def metrics_of(mode: TrainMode, model: object, rows: object, args: object) -> Mapping[str, float]:
    """Return what a mode evaluates; raises ``PluginError`` where it returns something else."""
    returned: Any = mode.evaluate(model, rows, args)
    with suppress(TypeError, ValueError, AttributeError):
        return {str(name): float(value) for name, value in returned.items()}
    raise _unlike(mode, "evaluate", returned, "a mapping from names to floats")


def _unlike(mode: TrainMode, function: str, returned: object, wanted: str) -> PluginError:
    plugin = next((plugin for plugin, entry in _claims(TrainMode) if entry.name == mode.name), mode.name)
    return PluginError(
        f"{function} of the train mode {mode.name!r}, from {_distribution_of(plugin)}, returns "
        f"{type(returned).__name__}, but must return {wanted}; correct the plugin."
    )


def _by_name(title: str, kind: type[Entry]) -> dict[str, Entry]:
    found: dict[str, tuple[str, Entry]] = {}
    for plugin, entry in _claims(kind):
        if entry.name in found:
            both = (found[entry.name][0], plugin)
            first, second = map(_distribution_of, both)
            advice = " or ".join(f"{BLOCK_VARIABLE}={name}" for name in dict.fromkeys(both) if name != BUILT_IN)
            raise PluginError(
                f"The {title} {entry.name!r} is registered twice, by {first} and by {second}; "
                f"uninstall one of them, or block it with {advice}."
            )
        found[entry.name] = plugin, entry
    return {name: entry for name, (_, entry) in found.items()}


def _claims(kind: type[Entry]) -> list[tuple[str, Entry]]:
    """Return the entries of a kind that each plugin registers, with its name, in the order of registration."""
    hook = HOOKS[kind]
    implementations = getattr(get_plugin_manager().hook, hook).get_hookimpls()
    return [
        (each.plugin_name, entry)
        for each in implementations
        for entry in _returned(hook, each.plugin_name, each.function)
    ]


@lru_cache(maxsize=64)
def _returned(hook: str, plugin: str, function: Callable[[], Iterable[Any]]) -> tuple[Any, ...]:
    """Return what a plugin's implementation of ``hook`` returns, nothing if it raises; it is called once only."""
    try:
        entries = tuple(function())
        for entry in entries:
            if not isinstance(entry, KINDS[hook]):
                raise TypeError(f"{hook} must return {KINDS[hook].__name__} objects, not {type(entry).__name__}")
        for entry in entries:
            _check_entry(entry)
    except (Exception, SystemExit) as error:  # whatever a third party's hook raises, the other plugins go on
        if plugin == BUILT_IN:
            raise
        _warn_skipped(plugin, error)
        return ()
    return entries


def _check_entry(entry: TrainMode | LossType) -> None:
    """Raise TypeError or ValueError where a mode or loss, or one of its options, would fail only when it is used.

    An option that is called as a setting of every run would not have its own value, but that of the setting.
    """
    functions = (entry.fn,) if isinstance(entry, LossType) else (entry.load_dataset, entry.train, entry.evaluate)
    if not (isinstance(entry.name, str) and entry.name):
        raise TypeError(f"the name of a mode or loss must be text, not {entry.name!r}")
    if not all(map(callable, functions)):
        raise TypeError(f"{entry.name} has no function where one is called")
    for option in entry.options:
        if not (isinstance(option.name, str) and option.name.isidentifier()) or option.name in OF_COMMANDS:
            raise ValueError(f"{entry.name} has an option called {option.name!r}, which cannot be one; rename it")
        if option.type not in (int, float, bool, str, dict, list):
            raise TypeError(f"the option {option.name} of {entry.name} is of no type that options have")
    settings = [import_module("mlx_cpo_plugin.settings.options").COMMON_OPTIONS]
    if isinstance(entry, LossType):
        settings.append(import_module("mlx_cpo_plugin.settings.cpo_options").OF_EVERY_LOSS)
    common = {option.name: option for options in settings for option in options}
    for option in entry.options:
        if option.name in common and option is not common[option.name]:
            raise ValueError(f"{entry.name} has an option {option.name}, which is a setting of every run; rename it")


def registered_distributions() -> list[Values]:
    """Return what each loaded plugin is: its name, its distribution, and the modes and losses it registers."""
    modes, losses = _claims(TrainMode), _claims(LossType)
    return [
        {
            "plugin": name,
            "distribution": _distribution_of(name),
            "train_modes": [mode.name for plugin, mode in modes if plugin == name],
            "loss_types": [loss.name for plugin, loss in losses if plugin == name],
        }
        for name, plugin in get_plugin_manager().list_name_plugin()
        if plugin is not None
    ]
