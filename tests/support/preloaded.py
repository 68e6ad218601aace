"""What the process imports that prepared ones are forks of; it computes nothing."""

import gc

import mlx_lm.utils  # noqa: F401 - for those who are forked

import mlx_cpo_plugin.cli
import mlx_cpo_plugin.training.trainer  # noqa: F401

gc.freeze()  # or the collector touches every page of each fork, which copies it
