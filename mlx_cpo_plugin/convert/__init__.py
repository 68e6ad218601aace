"""Configurations of TRL, Axolotl and LLaMA-Factory as configurations of this plugin, for ``mlx-cpo convert``."""
