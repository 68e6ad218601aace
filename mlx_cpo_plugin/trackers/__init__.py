"""Experiment trackers that a run reports to: W&B, TensorBoard, Trackio and SwanLab, each through its own client."""

from mlx_cpo_plugin.trackers.callback import HostWandb, TrackerCallback, described_settings, tracked_run
from mlx_cpo_plugin.trackers.clients import CLIENTS, require_clients

__all__ = ["CLIENTS", "HostWandb", "TrackerCallback", "described_settings", "require_clients", "tracked_run"]
