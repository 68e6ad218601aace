"""``python -m mlx_cpo_plugin``, and the command ``mlx-cpo``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run ``mlx-cpo`` and return its exit code; Ctrl-C while its modules are imported ends it as later on."""
    try:
        from mlx_cpo_plugin import cli
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
