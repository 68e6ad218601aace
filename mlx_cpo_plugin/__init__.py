"""Contrastive Preference Optimisation (CPO) for mlx-lm-lora.

Importing this package imports nothing heavy: every public name is resolved when it is first used.
"""

from __future__ import annotations

from importlib import import_module

from mlx_cpo_plugin._version import __version__

# Every Python in the environment imports this at start-up, and typing would take most of the time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from mlx_cpo_plugin.activation.finder import install as activate
    from mlx_cpo_plugin.commands.call import TrainingResult, train
    from mlx_cpo_plugin.hookspecs import hookimpl
    from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, evaluate_cpo, train_cpo
    from mlx_cpo_plugin.types import LossType, Option, TrainMode

_HOMES = {
    "CPOTrainingArgs": "mlx_cpo_plugin.training.trainer",
    "LossType": "mlx_cpo_plugin.types",
    "Option": "mlx_cpo_plugin.types",
    "TrainMode": "mlx_cpo_plugin.types",
    "TrainingResult": "mlx_cpo_plugin.commands.call",
    "activate": "mlx_cpo_plugin.activation.finder",
    "evaluate_cpo": "mlx_cpo_plugin.training.trainer",
    "hookimpl": "mlx_cpo_plugin.hookspecs",
    "train": "mlx_cpo_plugin.commands.call",
    "train_cpo": "mlx_cpo_plugin.training.trainer",
}

__all__ = [
    "CPOTrainingArgs",
    "LossType",
    "Option",
    "TrainMode",
    "TrainingResult",
    "__version__",
    "activate",
    "evaluate_cpo",
    "hookimpl",
    "train",
    "train_cpo",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return getattr(home, "install" if name == "activate" else name)
