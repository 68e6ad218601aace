"""``python -m mlx_cpo_plugin``, and the command ``mlx-cpo``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run ``mlx-cpo`` and return its exit code; Ctrl-C ends it alike at work and while its modules are imported."""
    try:
        from mlx_cpo_plugin import cli

        return cli.main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
