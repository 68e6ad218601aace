"""``mlx-cpo doctor``: checks the installation, and says how to fix what is wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from mlx_cpo_plugin import blas
from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.activation import finder
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.termination import stopped_by_termination
from mlx_cpo_plugin.types import Values

START_UP_FILES = ("mlx_cpo_plugin_autoload.pth", "mlx_cpo_plugin_autoload.start")
# Distribution -> the module of it that tells its version.
MODULES = {"mlx-lm-lora": "mlx_lm_lora", "mlx": "mlx.core", "mlx-lm": "mlx_lm", "pluggy": "pluggy"}

# A setting that the plugin refuses and mlx-lm-lora does not: the refusal proves that the plugin read it.
PROBE = {"train_mode": "cpo", "train": True, "beta": -1.0, "model": "no-such-model"}
PROBE_ARGUMENTS = ("--train", "--train-mode", "cpo", "--beta=-1", "--model", "no-such-model")
# What a probe prints that reached the plugin.
REACHED = ("error: beta", "the imported names are the plugin's")
PROBE_SECONDS = 120

NOT_IMPORTED = "cannot be imported"
NEEDS_BACKEND = "on Linux, pip install 'mlx[cpu]' or 'mlx[cuda]'"
REINSTALL = (
    "pip install --force-reinstall --no-deps mlx-cpo-plugin; where Python reads no start-up files, "
    "start with `mlx-cpo train` or call mlx_cpo_plugin.activate()"
)

# The calls of an app, in one interpreter, since starting one takes most of the time; each has its line.
CALLS_PROBE = """\
from types import SimpleNamespace
from mlx_lm_lora.trainer.cpo_trainer import CPOTrainingArgs, evaluate_cpo, train_cpo
import mlx_cpo_plugin.training.trainer as own
is_own = (train_cpo, evaluate_cpo, CPOTrainingArgs) == (own.train_cpo, own.evaluate_cpo, own.CPOTrainingArgs)
print("{imports}|the imported names are", "the plugin's" if is_own else "mlx-lm-lora's")
from mlx_cpo_plugin.errors import ConfigError
from mlx_lm_lora.train import main, run
calls = {{"{main}": lambda: main({probe!r}), "{run}": lambda: run(SimpleNamespace(**{probe!r}), None)}}
for name, call in calls.items():
    try:
        call()
    except Exception as error:
        kind = "error" if isinstance(error, ConfigError) else type(error).__name__
        print(f"{{name}}|{{kind}}: {{str(error).strip().partition(chr(10))[0]}}")
"""
CALLS = {
    "main": "mlx_lm_lora.train.main({...})",
    "run": "mlx_lm_lora.train.run(namespace)",
    "imports": "mlx_lm_lora.trainer.cpo_trainer",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``warning`` (works, but badly) or ``failed``.
        detail: what was found.
        remedy: what to do about it; empty where nothing is wrong.
        about: the same for programs; of a plugin its distribution, train modes and losses.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""
    about: Values = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("--selftest", action="store_true", help="compute on this device and compare with float64")
    parser.add_argument(
        "--config", metavar="FILE", help="self-test the model and first rows of this configuration, too"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


@stopped_by_termination()  # or folders of probes would stay
def run_doctor(as_json: bool = False, selftest: bool = False, config_file: str | None = None) -> int:
    """Print what was found; return 0 if CPO can run and 1 if something has failed.

    Args:
        selftest: compute on this device, too, and compare with float64.
        config_file: a configuration whose model and first rows the self-test takes, too.

    Raises:
        UserError: the configuration is at fault.
    """
    findings = diagnose()
    healthy = all(finding.status != "failed" for finding in findings)
    if not as_json:
        _print_findings(findings)
    checks: list[Values] = []
    if selftest and healthy:
        from mlx_cpo_plugin.selftest.command import as_plain, run_selftest

        # JSON has standard output for itself.
        checks = as_plain(run_selftest(config_file, sys.stderr if as_json else sys.stdout))
        healthy = all(check["status"] != "failed" for check in checks)
    if as_json:
        found = {"ok": healthy, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps({**found, "selftest": checks} if selftest else found, indent=2))
    else:
        print("CPO is ready." if healthy else "CPO is not ready: see what failed above.")
    return 0 if healthy else 1


def _print_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        print(f"{finding.status:8} {finding.name}: {finding.detail}")
        if finding.remedy:
            print(f"{'':8} -> {finding.remedy}")


def diagnose() -> list[Finding]:
    """Look at versions, backend, start-up files, entry routes and plugins."""
    findings = [
        *check_versions(),
        *check_backend(),
        *check_switch(),
        check_start_up_files([Path(folder) for folder in sys.path], start_up_files_are_read()),
    ]
    if any(finding.status == "failed" and NOT_IMPORTED in finding.detail for finding in findings):
        return [*findings, Finding("routes, plugins", "warning", "not tried while something above cannot be imported")]
    return [*findings, *check_routes(), *check_plugins()]


def check_versions() -> list[Finding]:
    """Versions of Python, the plugin and what it stands on, as this interpreter imports them."""
    return [
        Finding("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("mlx-cpo-plugin", "ok", __version__),
        *(check_version(distribution, module) for distribution, module in MODULES.items()),
    ]


def check_version(distribution: str, module_name: str) -> Finding:
    """The version of the module that is imported, whatever is installed; the host's has to be a tested one."""
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return Finding(distribution, "failed", f"{NOT_IMPORTED}: {error}", _remedy_for(distribution))
    version = str(getattr(module, "__version__", "of unknown version"))
    installed = _installed_version(distribution)
    detail = version
    if version != installed:
        detail += f", imported from {Path(str(module.__file__)).parent}; installed is {installed or 'none'}"
    if distribution != "mlx-lm-lora":
        return Finding(distribution, "ok", detail)
    from mlx_cpo_plugin.activation.patches import too_old, untested_host_warning

    if too_old(version):
        return Finding(
            distribution, "failed", detail, f"{too_old(version)}; take its folder off the import path, if any"
        )
    warning = untested_host_warning(version)
    return Finding(distribution, "warning" if warning else "ok", detail, warning)


def _remedy_for(distribution: str) -> str:
    """Return what to do about a distribution that cannot be imported."""
    if _installed_version(distribution) is None:
        return f"pip install {distribution}"
    try:
        import mlx.core  # noqa: F401 - whether it can be
    except ImportError:
        return NEEDS_BACKEND
    return f"pip install --force-reinstall {distribution}"


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_backend() -> list[Finding]:
    """MLX's default device, and on a Linux CPU which BLAS multiplies the matrices."""
    try:
        from mlx_cpo_plugin.device import current_device, device_name
    except ImportError as error:
        return [Finding("backend", "failed", f"mlx {NOT_IMPORTED}: {error}", NEEDS_BACKEND)]
    return [Finding("backend", "ok", f"{current_device().kind}, {device_name()}"), *check_blas(), *check_kernels()]


def check_blas() -> list[Finding]:
    """The BLAS that a run uses and its speed; nothing where MLX calls none that could be exchanged."""
    try:
        blas.use_fast_blas()
    except ConfigError as error:
        return [Finding("blas", "failed", str(error), f"correct or unset {blas.VARIABLE}")]
    used = blas.in_use()
    if used is None:
        return []
    detail = f"{blas.description()} ({used.file})"
    if not used.is_reference:
        return [Finding("blas", "ok", detail)]
    return [Finding("blas", "warning", detail, blas.advice() or f"unset {blas.VARIABLE}")]


def check_kernels() -> list[Finding]:
    """Whether long runs on this CPU have compiled kernels; nothing on other devices."""
    from mlx_cpo_plugin.kernels import library

    if not library.suits_device():
        return []
    try:
        choice, file = library.wanted(), library.cached_file()
    except ConfigError as error:
        return [Finding("kernels", "failed", str(error), f"correct or unset {library.VARIABLE}")]
    except library.KernelError as error:
        return [Finding("kernels", "warning", f"cannot be kept: {error}", "set XDG_CACHE_HOME to a folder")]
    if choice == library.NONE:
        return [Finding("kernels", "ok", f"switched off by {library.VARIABLE}")]
    if library.is_whole(file):
        return [Finding("kernels", "ok", f"compiled ({file})")]
    if not os.access(next(parent for parent in file.parents if os.path.lexists(parent)), os.W_OK):
        remedy = "make it writable, or set XDG_CACHE_HOME to a folder that is"
        return [Finding("kernels", "warning", f"not compiled, and cannot be kept in {file.parent}", remedy)]
    if (path := library.compiler()) is not None:
        return [Finding("kernels", "ok", f"not compiled yet; {path} will do it when a long run begins")]
    remedy = f"install one of {', '.join(library.COMPILERS)}; long runs on a CPU are about twice as fast with kernels"
    return [Finding("kernels", "warning", "there is no C++ compiler", remedy)]


def check_switch() -> list[Finding]:
    """Whether the environment turns the plugin off."""
    if not finder.disabled():
        return []
    variable = finder.DISABLE_VARIABLE
    return [Finding("switch", "failed", f"{variable} turns the plugin off", f"unset {variable}")]


def check_start_up_files(folders: Sequence[Path], are_read: bool) -> Finding:
    """Whether both start-up files lie beside each other in one of ``folders``, and a new interpreter reads them."""
    found = {folder: [name for name in START_UP_FILES if (folder / name).is_file()] for folder in folders}
    for folder, names in found.items():
        if len(names) == len(START_UP_FILES):
            detail = f"{' and '.join(names)} in {folder}"
            if are_read:
                return Finding("start-up files", "ok", detail)
            return Finding("start-up files", "failed", f"{detail}, where this Python does not read them", REINSTALL)
    detail = "; ".join(f"only {names[0]} in {folder}" for folder, names in found.items() if names)
    return Finding("start-up files", "failed", detail or "none on the import path of this interpreter", REINSTALL)


def start_up_files_are_read() -> bool:
    """Whether a new interpreter has the finder before anything is imported."""
    script = f"import sys; sys.exit({finder.__name__!r} not in sys.modules)"
    return subprocess.run([sys.executable, "-c", script], check=False, timeout=PROBE_SECONDS).returncode == 0


def check_routes() -> list[Finding]:
    """Whether each way into mlx-lm-lora reaches the plugin, tried in a fresh interpreter each but for calls."""
    commands = {name: tuple(command) for name, command in routes().items()}
    tried = list(dict.fromkeys(commands.values()))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        told = dict(zip(tried, workers.map(told_by, tried), strict=True))
    return [route_finding(name, told[command]) for name, command in commands.items()]


def routes() -> dict[str, list[str]]:
    """Every way into mlx-lm-lora -> a command that goes it with a setting that the plugin refuses."""
    python = sys.executable
    script = _script("mlx-lm-lora", "mlx_lm_lora.train")
    calls = [python, "-c", CALLS_PROBE.format(probe=PROBE, **CALLS)]
    return {
        "mlx_lm_lora.train": [python, str(script), *PROBE_ARGUMENTS],
        "python -m mlx_lm_lora train": [python, "-m", "mlx_lm_lora", "train", *PROBE_ARGUMENTS],
        "python -m mlx_lm_lora.train": [python, "-m", "mlx_lm_lora.train", *PROBE_ARGUMENTS],
        **dict.fromkeys(CALLS.values(), calls),
    }


def _script(distribution: str, name: str) -> Path:
    """Where a distribution's script was installed, which is not beside the interpreter under ``pip install --user``."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(distribution) or ():
            if file.name == name:
                return Path(str(file.locate()))
    return Path(sysconfig.get_path("scripts")) / name


def told_by(command: Sequence[str]) -> list[str] | Exception:
    """Run a probe, in an empty folder and without a network; return the lines that it prints, or why it did not end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-doctor-") as folder:
        try:
            probe = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return error
    return (probe.stderr + probe.stdout).strip().splitlines()


def route_finding(name: str, told: list[str] | Exception) -> Finding:
    route = f"route {name}"
    if isinstance(told, Exception):
        return Finding(route, "failed", f"the probe did not end: {told}")
    own = [line.removeprefix(f"{name}|") for line in told if line.startswith(f"{name}|")]
    lines = own or [line for line in told if not line.startswith(tuple(f"{call}|" for call in CALLS.values()))]
    remedy = f"unset {finder.DISABLE_VARIABLE}" if finder.disabled() else REINSTALL
    if any("mlx-cpo-plugin is only partly hooked" in line for line in lines):
        remedy = ""  # it reached the plugin, which says itself what is wrong
    if any(line.startswith(REACHED) for line in lines):
        return Finding(route, "ok", "hooked")
    return Finding(route, "failed", f"not hooked: {lines[-1] if lines else 'the probe printed nothing'}", remedy)


def check_plugins() -> list[Finding]:
    """Which plugins are loaded, from which distributions, what they register, and which were skipped."""
    from mlx_cpo_plugin import plugins

    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        try:
            plugins.train_modes()
            plugins.loss_types()
            registered = plugins.registered_distributions()
        # A third party's hook may raise anything, which is a finding, too.
        except Exception as error:
            return [Finding("plugins", "failed", f"{type(error).__name__}: {error}", "fix, block or uninstall it")]
    loaded = [Finding(f"plugin {plugin['plugin']}", "ok", _summary(plugin), about=plugin) for plugin in registered]
    return [*loaded, *(Finding("plugins", "warning", str(warning.message)) for warning in skipped)]


def _summary(plugin: Values) -> str:
    modes, losses = (", ".join(plugin[kind]) or "none" for kind in ("train_modes", "loss_types"))
    return f"{plugin['distribution']}; modes: {modes}; losses: {losses}"
