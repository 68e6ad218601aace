"""A virtual environment of its own, in which the plugin is installed by pip and taken away again.

Starting the host takes two seconds of a processor, most of it for imports that have nothing to do with it. On Linux a
process whose start is not what a test is about is a fork of one in which these are done.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

PROJECT = Path(__file__).parents[2]
KINDS = ("wheel", "editable")
WORKSHOP = "MLX_CPO_TEST_WORKSHOP"
SECONDS = 120
FORKING = Path(__file__).with_name("forking_interpreter.py")

HOST_SCRIPT = """\
#!{python}
import sys
from mlx_lm_lora.train import main
if __name__ == "__main__":
    sys.exit(main())
"""


class FreshEnvironment:
    """A virtual environment that borrows every dependency, but not the plugin, from the one that runs the tests.

    The borrowed folder is only put on the path, so start-up files in it are not read. One that exists is used as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site_packages = folder / "lib" / version / "site-packages"
        self._dependencies = self.site_packages / "borrowed_dependencies.pth"
        # For a Python that reads no start-up files, and so does not know where to look either.
        self.search_path = os.pathsep.join([str(self.site_packages), sysconfig.get_path("purelib")])
        self.host_script = folder / "bin" / "mlx_lm_lora.train"
        self._forking: dict[tuple[str, ...], subprocess.Popen[str]] = {}
        if folder.exists():
            return
        _checked([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        self._borrow()
        self.host_script.write_text(HOST_SCRIPT.format(python=self.python))
        self.host_script.chmod(0o755)

    def _borrow(self) -> None:
        self.site_packages.mkdir(parents=True, exist_ok=True)  # pip removes it with the last file in it
        self._dependencies.write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: str) -> None:
        """Run pip on this environment alone."""
        self._dependencies.unlink()  # or pip would see, and uninstall, what is only borrowed
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        try:
            _checked([*pip, *arguments])
        finally:
            self._borrow()

    def install(self, wheel: Path) -> None:
        """Install or reinstall a wheel without its dependencies."""
        self.pip("install", "--no-deps", "--no-index", "--force-reinstall", "--no-compile", str(wheel))

    def uninstall(self) -> None:
        """Uninstall the plugin."""
        self.pip("uninstall", "--yes", "mlx-cpo-plugin")

    def files(self) -> set[Path]:
        """Every file of the environment but bytecode, which the interpreter writes by itself."""
        return {file for file in self.folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}

    def start(
        self, *command: str | Path, folder: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command offline in ``folder``, by default an empty one, with further environment variables."""
        with tempfile.TemporaryDirectory() as empty:
            return subprocess.run(
                [str(word) for word in command],
                cwd=folder or empty,
                env=_environment(variables),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )

    def run(
        self, *arguments: str | Path, folder: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Do what :meth:`start` does with this environment's Python and these arguments, on Linux in a fork."""
        words = [str(word) for word in arguments]
        if sys.platform != "linux":
            return self.start(self.python, *words, folder=folder, **variables)
        flags = list(takewhile(lambda word: word[0] == "-" and word not in ("-c", "-m"), words))
        process = self._forking_interpreter(flags, variables.get("PYTHONPATH", "") if flags else "")
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as told:
            streams = [Path(told, name) for name in ("out", "err")]
            request = {
                "words": words[len(flags) :],
                "folder": str(folder or empty),
                "environment": _environment(variables),
                "streams": [str(stream) for stream in streams],
                "seconds": SECONDS,
            }
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(stream.read_text() for stream in streams))

    def _forking_interpreter(self, flags: list[str], path: str) -> Any:
        """The process that forks where Python has these flags, which is started once."""
        key = (*flags, path)
        if key not in self._forking:
            self._forking[key] = subprocess.Popen(
                [str(self.python), *flags, str(FORKING)],
                env=_environment({"LD_PRELOAD": "", "PYTHONPATH": path}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self._forking[key]

    def printed(self, *arguments: str | Path, folder: Path | None = None, **variables: str) -> str:
        """Do what :meth:`run` does and return the standard output; a failure fails the test."""
        ended = self.run(*arguments, folder=folder, **variables)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


def _environment(variables: dict[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and "MLX_CPO_PLUGIN" not in key}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", **variables}


def _checked(command: list[str], folder: Path | None = None) -> None:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"


def open_workshop() -> Callable[[], None]:
    """Make the folder in which wheels and environments are made once for all worker processes of this run of the tests.

    Returns:
        What removes it.
    """
    os.environ[WORKSHOP] = tempfile.mkdtemp(prefix="mlx-cpo-fresh-")
    return partial(shutil.rmtree, os.environ[WORKSHOP])


def _workshop() -> Path:
    return Path(os.environ[WORKSHOP])


@cache
def built_wheel(kind: str) -> Path:
    """This project as a wheel: ``wheel`` holds the code, ``editable`` only points to it."""
    for module in ("hatchling", "editables", "pip"):
        pytest.importorskip(module, reason=f"building and installing the plugin needs {module}")
    if not (PROJECT / "mlx_cpo_plugin").is_dir():
        pytest.skip("building the plugin needs its source beside the tests")
    folder = _workshop() / f"built-{kind}"
    with FileLock(_workshop() / "building.lock"):
        if not folder.exists():
            hook = {"wheel": "build_wheel", "editable": "build_editable"}[kind]
            build = f"import hatchling.build as build; build.{hook}({str(folder)!r})"
            _checked([sys.executable, "-c", build], PROJECT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@cache
def installed_environment(kind: str) -> FreshEnvironment:
    """The environment, one for all tests, in which the plugin is installed as ``kind``; tests must not change it."""
    wheel = built_wheel(kind)
    folder = _workshop() / kind
    with FileLock(_workshop() / f"{kind}.lock"):
        is_new = not folder.exists()
        environment = FreshEnvironment(folder)
        if is_new:
            environment.install(wheel)
    return environment


def add_distribution(folder: Path, name: str, code: str) -> str:
    """Install a distribution, version 1.0, whose one module is an entry point of the plugin's group.

    Returns:
        The folder where it and others were installed, as PYTHONPATH takes it.
    """
    installed, module = folder / "installed", name.replace("-", "_")
    about = installed / f"{module}-1.0.dist-info"
    about.mkdir(parents=True)
    (installed / f"{module}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[mlx_cpo_plugin]\n{module} = {module}\n")
    return str(installed)
