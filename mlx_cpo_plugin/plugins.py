"""Which plugins there are, and which train modes and losses they register."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy

from mlx_cpo_plugin import hookspecs
from mlx_cpo_plugin.errors import PluginError
from mlx_cpo_plugin.types import LossType, TrainMode

BUILT_IN = "mlx-cpo-plugin"
BLOCK_VARIABLE = "MLX_CPO_PLUGIN_BLOCK"
TRACE_VARIABLE = "MLX_CPO_PLUGIN_TRACE"

Registered = TypeVar("Registered", TrainMode, LossType)


@lru_cache(maxsize=1)
def get_plugin_manager() -> pluggy.PluginManager:
    """Return the plugin manager, with the built-in plugin and all entry points loaded.

    A plugin that cannot be imported or registered is named in a warning and left out. The names in the environment
    variable ``MLX_CPO_PLUGIN_BLOCK`` (separated by commas) are never loaded. ``MLX_CPO_PLUGIN_TRACE=1`` prints
    every hook call to standard error.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE_VARIABLE, "") not in ("", "0"):
        manager.add_hookcall_monitoring(_trace_before, _trace_after)
    for name in os.environ.get(BLOCK_VARIABLE, "").split(","):
        if name.strip():
            manager.set_blocked(name.strip())
    from mlx_cpo_plugin import cpo

    manager.register(cpo, name=BUILT_IN)
    for entry_point in entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        _load(manager, entry_point)
    return manager


def _load(manager: pluggy.PluginManager, entry_point: EntryPoint) -> None:
    if manager.is_blocked(entry_point.name) or manager.has_plugin(entry_point.name):
        return
    try:
        plugin = entry_point.load()
        manager.register(plugin, name=entry_point.name)
        manager.check_pending()
    except Exception as error:  # whatever a stranger's module raises, the other plugins go on
        if manager.has_plugin(entry_point.name):
            manager.unregister(name=entry_point.name)
        _warn_skipped(entry_point.name, _distribution_of(entry_point.name), error)


def _trace_before(hook_name: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    names = ", ".join(implementation.plugin_name for implementation in implementations)
    print(f"mlx-cpo-plugin trace: {hook_name}({arguments or ''}) -> {names}", file=sys.stderr)


def _trace_after(outcome: Any, hook_name: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    result = repr(outcome.exception) if outcome.exception else f"{len(outcome.get_result())} results"
    print(f"mlx-cpo-plugin trace: {hook_name} returned {result}", file=sys.stderr)


def _warn_skipped(plugin: str, distribution: str, error: BaseException) -> None:
    warnings.warn(
        f"Plugin {plugin!r} from {distribution} is skipped: {type(error).__name__}: {error}. "
        f"Mend or uninstall it, or set {BLOCK_VARIABLE}={plugin} to silence this.",
        RuntimeWarning,
        stacklevel=2,
    )


def _distribution_of(plugin_name: str) -> str:
    """Return the distribution that a plugin came from, with its version, e.g. ``rank-loss 1.0``."""
    if plugin_name == BUILT_IN:
        from mlx_cpo_plugin._version import __version__

        return f"{BUILT_IN} {__version__}"
    for entry_point in entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        if entry_point.name == plugin_name and entry_point.dist is not None:
            return f"{entry_point.dist.name} {entry_point.dist.version}"
    return f"the plugin {plugin_name!r}, registered by code"


def train_modes() -> dict[str, TrainMode]:
    """Return every registered train mode by name.

    Raises:
        PluginError: two plugins claim one name.
    """
    return _collect("register_train_modes", TrainMode, "train mode")


def loss_types() -> dict[str, LossType]:
    """Return every registered loss by name; the built-in ones come first.

    Raises:
        PluginError: two plugins claim one name.
    """
    return _collect("register_loss_types", LossType, "loss type")


def _collect(hook: str, kind: type[Registered], words: str) -> dict[str, Registered]:
    """Call one hook plugin by plugin, so that what each returned can be told apart."""
    manager = get_plugin_manager()
    found: dict[str, Registered] = {}
    owners: dict[str, str] = {}
    for name, plugin in manager.list_name_plugin():
        if plugin is None:
            continue
        try:
            entries = _entries(manager, plugin, hook, kind)
        except Exception as error:  # a stranger's hook may raise anything; it is named and left out
            if name == BUILT_IN:
                raise
            _warn_skipped(name, _distribution_of(name), error)
            continue
        for entry in entries:
            if entry.name in owners:
                first, second = _distribution_of(owners[entry.name]), _distribution_of(name)
                raise PluginError(
                    f"The {words} {entry.name!r} is registered twice, by {first} and by {second}; "
                    f"uninstall one of them or block it with {BLOCK_VARIABLE}."
                )
            owners[entry.name] = name
            found[entry.name] = entry
    return found


def _entries(manager: pluggy.PluginManager, plugin: Any, hook: str, kind: type[Registered]) -> list[Registered]:
    """Return what one plugin's implementation of ``hook`` returns."""
    others = [other for _, other in manager.list_name_plugin() if other is not None and other is not plugin]
    entries = [entry for result in manager.subset_hook_caller(hook, others)() for entry in result]
    for entry in entries:
        if not isinstance(entry, kind):
            raise TypeError(f"{hook} must return {kind.__name__} objects, not {type(entry).__name__}")
    return entries


def registered_distributions() -> list[dict[str, Any]]:
    """Return what each loaded plugin is: its name, its distribution, and the modes and losses it registers."""
    manager = get_plugin_manager()
    return [
        {
            "plugin": name,
            "distribution": _distribution_of(name),
            "train_modes": [mode.name for mode in _entries(manager, plugin, "register_train_modes", TrainMode)],
            "loss_types": [loss.name for loss in _entries(manager, plugin, "register_loss_types", LossType)],
        }
        for name, plugin in manager.list_name_plugin()
        if plugin is not None
    ]
