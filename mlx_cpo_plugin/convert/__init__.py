"""Configurations of TRL, SimPO, Axolotl and LLaMA-Factory as configurations of this plugin, for ``mlx-cpo convert``."""
