"""``python -m mlx_cpo_plugin``: the same as the command ``mlx-cpo``."""

from mlx_cpo_plugin.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
