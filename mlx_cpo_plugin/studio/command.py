"""The arguments of ``mlx-cpo studio``, and what they start."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.termination import stopped_by_termination

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
    with stopped_by_termination(), tempfile.TemporaryDirectory(prefix="mlx-cpo-studio-") as folder:
        # Gradio asks for it when it is imported; by default all accounts share one folder. Runs outlive this one, so
        # they are not told of it.
        tempfile.tempdir = folder
        return serve(chosen)


def serve(chosen: argparse.Namespace) -> int:
    """Serve the page from the folder at hand until Ctrl-C; raises as :func:`run_studio`."""
    from mlx_cpo_plugin.studio import address, document

    root = Path.cwd()
    name = ""
    if chosen.config is not None:
        path = document.path_in(root, str(chosen.config))
        document.read_document(path)  # what cannot be opened is refused at once
        name = str(path.relative_to(root))
    token = secrets.token_urlsafe(32)
    with address.listen(chosen.port) as listening, suppress(KeyboardInterrupt):
        # A browser starts, and waits, while the page is built.
        address.announce(listening.getsockname()[1], token, not chosen.no_browser)
        with gradio_writes_no_stubs():
            from mlx_cpo_plugin.studio import page, server
        server.serve(page.build_page(root, name), listening, token, page.appearance())
    return 0


@contextmanager
def gradio_writes_no_stubs() -> Iterator[None]:
    """Within the context Gradio is imported without writing stubs for editors beside its modules.

    That takes as long as the rest of the import, each time.
    """
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _WithoutStubs:
    """Finds the module that writes them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "gradio.component_meta" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _StubsLeftOut(spec.loader.name, spec.loader.path)
        return spec


class _StubsLeftOut(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["create_or_modify_pyi"] = lambda *_: None
