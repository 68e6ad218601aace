"""Names that stand in :mod:`mlx_cpo_plugin.errors` now."""

from mlx_cpo_plugin.errors import named, printable, shown

__all__ = ["named", "printable", "shown"]
