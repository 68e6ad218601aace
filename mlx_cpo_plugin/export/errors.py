"""What an export raises."""

from __future__ import annotations

from mlx_cpo_plugin.errors import UserError


class ExportError(UserError):
    """The target cannot hold the adapter, or the export cannot be written; nothing of it is left."""
