"""The arguments of ``mlx-cpo studio``, and what they start."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from mlx_cpo_plugin.errors import ConfigError

NEEDED = ("gradio", "matplotlib", "ruamel.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file to open")
    parser.add_argument("--port", type=int, help="port of the page on this machine")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")


def run_studio(chosen: argparse.Namespace) -> int:
    """Serve the page from the folder at hand until Ctrl-C.

    What it, its runs and Gradio write can be read by its owner alone.

    Raises:
        ConfigError: a package is missing, the configuration cannot be read, or the port is taken.
    """
    missing = [name for name in NEEDED if find_spec(name.split(".")[0]) is None]
    if missing:
        raise ConfigError(f"mlx-cpo studio needs {' and '.join(missing)}; run pip install 'mlx-cpo-plugin[studio]'.")
    from mlx_cpo_plugin.studio.run_process import OWNER_ONLY

    os.umask(OWNER_ONLY)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the folder below goes, too
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-studio-") as folder:
        # Gradio asks for it when it is imported; by default all accounts share one folder. Runs outlive this one, so
        # they are not told of it.
        tempfile.tempdir = folder
        return _serve(chosen)


def _serve(chosen: argparse.Namespace) -> int:
    from mlx_cpo_plugin.studio import document, page, server

    root = Path.cwd()
    name = ""
    if chosen.config is not None:
        path = document.path_in(root, str(chosen.config))
        document.read_document(path)  # what cannot be opened is refused at once
        name = str(path.relative_to(root))
    port = server.free_port(chosen.port)
    server.serve(page.build_page(root, name), port, page.appearance(), not chosen.no_browser)
    return 0
