"""Adapters, checkpoints and runs on disk: what lies in an adapter folder, and under which name."""

ADAPTER_FILE = "adapters.safetensors"
# Folder of the best adapter, which mlx_lm loads like the adapter folder itself.
BEST = "best"
# The best adapter in a checkpoint; earlier versions had it under this name in the adapter folder, too.
BEST_ADAPTER_FILE = "best_adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
METRICS_FILE = "metrics.jsonl"
RUN_SETTINGS = "run_settings.yaml"
# The identity of the run whose folder it is.
RECORD = "run.json"
# Of each rank but the first with "-rank-N" behind it.
CHECKPOINTS = "checkpoints"
# What earlier runs have left, in a folder for each.
PREVIOUS = "previous"
# Held by the run that writes into the folder.
LOCK = ".lock"
