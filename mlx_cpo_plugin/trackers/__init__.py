"""Experiment trackers that a run reports to: W&B, TensorBoard, Trackio and SwanLab, each through its own client."""

from mlx_cpo_plugin.trackers.callback import TrackerCallback, tracked_run
from mlx_cpo_plugin.trackers.clients import CLIENTS, require_clients

__all__ = ["CLIENTS", "TrackerCallback", "require_clients", "tracked_run"]
