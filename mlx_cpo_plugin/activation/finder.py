"""Hooks the plugin into mlx-lm-lora at the moment when mlx-lm-lora is imported.

The start-up files beside this package call :func:`install` in every interpreter, so this module imports nothing but
what the interpreter has loaded anyway and :mod:`.hook_state`. All else is imported once one of the host's modules runs.
"""

from __future__ import annotations

import os
import sys

from mlx_cpo_plugin.activation import hook_state
from mlx_cpo_plugin.activation.hook_state import DISABLE_VARIABLE, TARGETS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

# What `python -m MODULE` executes: the imported, hooked module instead of a second, unhooked copy of its source.
_RUN_AS_SCRIPT = """\
import importlib, sys
_module = importlib.import_module({name!r})
globals().update({{key: value for key, value in vars(_module).items() if not key.startswith("__")}})
if __name__ == "__main__" and hasattr(_module, "main"):
    sys.exit(_module.main())
"""


def disabled() -> bool:
    """Whether ``MLX_CPO_PLUGIN_DISABLE`` turns the plugin off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def install() -> None:
    """Hook into mlx-lm-lora, now if it is imported already, else when it will be; calling it again changes nothing."""
    if not any(isinstance(finder, HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HostFinder())
    if disabled():
        return
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is None or "_mlx_cpo_plugin_hooked" in vars(module):
            continue
        if not getattr(module.__spec__, "_initializing", False):
            hook(module)


def hook(module: ModuleType) -> None:
    """Hook an imported module of the host; a fault bars the way to CPO, and to nothing else."""
    try:
        from mlx_cpo_plugin.activation import patches

        patches.apply(module)
    except Exception as fault:
        hook_state.record_fault(module.__name__, fault)
    if hook_state.faults:
        for name in TARGETS:
            if name in sys.modules:
                _bar_cpo(sys.modules[name])
    module.__dict__["_mlx_cpo_plugin_hooked"] = True


def _bar_cpo(module: ModuleType) -> None:
    """Make every entry to CPO in a host module raise :class:`PluginError`; other modes go through untouched."""
    names = vars(module)
    names.update({name: hook_state.refuse_cpo for name in ("train_cpo", "evaluate_cpo") if name in names})
    run = names.get("run")
    if run is None:
        return

    def guarded_run(args: object, *others: object, **named: object) -> object:
        hook_state.refuse_if_cpo(args)
        return run(args, *others, **named)

    names["run"] = guarded_run


class HostFinder:
    """A finder for :data:`TARGETS` that asks the other finders and wraps the loader they give."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' spec with a :class:`HookingLoader`; None for every module but the targets."""
        if fullname not in TARGETS or disabled():
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = HookingLoader(spec.loader)  # duck-typed: importing the ABC is slow
                return spec
        return None


class HookingLoader:
    """The host's own loader, except that it hooks the module once it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        if name == "_loader":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as the host wrote it, then hook it."""
        self._loader.exec_module(module)
        hook(module)

    def get_code(self, fullname: str) -> CodeType:
        """Code for ``python -m``: it imports the hooked module and calls its ``main``."""
        return compile(_RUN_AS_SCRIPT.format(name=fullname), f"<mlx_cpo_plugin: python -m {fullname}>", "exec")
