"""What is hooked in this interpreter, and the refusal of CPO where something is not.

The finder imports this module in every interpreter, so it imports nothing.
"""

from __future__ import annotations

DISABLE_VARIABLE = "MLX_CPO_PLUGIN_DISABLE"
TRAIN_MODULE = "mlx_lm_lora.train"
CPO_MODULE = "mlx_lm_lora.trainer.cpo_trainer"
DATASETS_MODULE = "mlx_lm_lora.trainer.datasets"
# The modules of mlx-lm-lora that are hooked once they are imported.
TARGETS = (DATASETS_MODULE, CPO_MODULE, TRAIN_MODULE)

active: list[str] = []
"""Names of the host's functions that the plugin has replaced, in order."""
faults: dict[str, str] = {}
"""Module that could not be hooked, or that failed when it was called -> why."""


def record_fault(module: str, fault: Exception) -> None:
    """Note why CPO does not run; whatever is wrong with the plugin, other train modes must go on."""
    faults[module] = f"{type(fault).__name__}: {fault}"


def refuse_cpo(*_arguments: object, **_named: object) -> object:
    """Stand in for the host's own functions for CPO, which are not to run in the plugin's place.

    Raises:
        PluginError: always; says why CPO does not run and what to do.
    """
    from mlx_cpo_plugin.errors import PluginError

    if faults:
        reasons = "; ".join(f"{module}: {reason}" for module, reason in faults.items())
        raise PluginError(
            f"mlx-cpo-plugin is only partly hooked into mlx-lm-lora ({reasons}), so CPO does not run; "
            f"run `mlx-cpo doctor`, or set {DISABLE_VARIABLE}=1 to use mlx-lm-lora without the plugin."
        )
    raise PluginError(
        "No loaded plugin registers the train mode 'cpo', so it does not run; run `mlx-cpo doctor` to see which "
        f"plugins are loaded, or set {DISABLE_VARIABLE}=1 to use mlx-lm-lora's own."
    )


def refuse_if_cpo(call: object) -> None:
    """Refuse a call whose argument asks for CPO: a mapping, or an object with the settings as attributes.

    A command line passes: the host makes a namespace of it and calls ``run``, which refuses then.
    """
    from collections.abc import Mapping

    mode = call.get("train_mode") if isinstance(call, Mapping) else getattr(call, "train_mode", None)
    if mode == "cpo":
        refuse_cpo()
