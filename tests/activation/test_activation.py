"""Installing the plugin is enough: whichever way mlx-lm-lora is entered, CPO is the plugin's."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fresh_environment import KINDS, PROJECT, FreshEnvironment, built_wheel, installed_environment

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.activation import finder
from mlx_cpo_plugin.commands.doctor import START_UP_FILES

pytestmark = pytest.mark.slow

# The plugin refuses this value and mlx-lm-lora does not, so the refusal proves whose code ran.
REFUSED = ["--train", "--train-mode", "cpo", "--beta=-1", "--model", "no-such-model"]
REFUSAL = "beta is -1.0"

CALL_FUNCTIONS = """
from types import SimpleNamespace
from mlx_cpo_plugin.errors import ConfigError
from mlx_lm_lora.train import main, run
settings = {"train_mode": "cpo", "train": True, "beta": -1.0, "model": "no-such-model"}
for call in (lambda: main(settings), lambda: run(SimpleNamespace(**settings), None)):
    try:
        call()
    except ConfigError as error:
        print(error)
"""
IMPORT_LIKE_STUDIO = """
from mlx_lm_lora.trainer.cpo_trainer import CPOTrainingArgs, evaluate_cpo, train_cpo
from mlx_lm_lora.train import CONFIG_DEFAULTS
import mlx_lm_lora.train as host
import mlx_cpo_plugin.training.trainer as own
assert train_cpo is own.train_cpo is host.train_cpo
assert evaluate_cpo is own.evaluate_cpo is host.evaluate_cpo
assert CPOTrainingArgs is own.CPOTrainingArgs is host.CPOTrainingArgs
print(CPOTrainingArgs(beta=0.05, batch_size=3, qat_enable=True))
"""


@pytest.fixture(params=KINDS)
def environment(request: pytest.FixtureRequest) -> FreshEnvironment:
    """The plugin installed by pip, from a wheel and with ``-e``."""
    return installed_environment(request.param)


@pytest.fixture
def wheel_environment() -> FreshEnvironment:
    """The plugin installed from a wheel."""
    return installed_environment("wheel")


def told(environment: FreshEnvironment, script: str, *flags: str) -> str:
    """What a script prints in a process that is started for it."""
    ended = environment.start(environment.python, *flags, "-c", script)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_environment_holds_the_plugin_itself(environment: FreshEnvironment) -> None:
    where = Path(told(environment, "import mlx_cpo_plugin; print(mlx_cpo_plugin.__file__)"))

    editable = environment is installed_environment("editable")
    assert where.is_relative_to(PROJECT if editable else environment.site_packages)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("wheel", "-m mlx_lm_lora train"),
        ("wheel", "-m mlx_lm_lora.train"),
        ("editable", "console script"),
    ],
)
def test_every_command_reaches_the_plugin(kind: str, entry: str) -> None:
    environment = installed_environment(kind)
    commands = {
        "console script": [environment.host_script],
        "-m mlx_lm_lora train": [environment.python, "-m", "mlx_lm_lora", "train"],
        "-m mlx_lm_lora.train": [environment.python, "-m", "mlx_lm_lora.train"],
    }

    ended = environment.start(*commands[entry], *REFUSED)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {REFUSAL}")
    assert ended.stdout == ""


def test_every_function_reaches_the_plugin(wheel_environment: FreshEnvironment) -> None:
    lines = wheel_environment.printed("-c", CALL_FUNCTIONS).splitlines()

    assert len(lines) == 2
    assert all(line.startswith(REFUSAL) for line in lines)


def test_imports_of_the_trainer_get_the_plugins(wheel_environment: FreshEnvironment) -> None:
    printed = wheel_environment.printed("-c", IMPORT_LIKE_STUDIO)

    assert "beta=0.05" in printed
    assert "batch_size=3" in printed


def test_a_yaml_config_reaches_the_plugin(wheel_environment: FreshEnvironment, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train_mode: cpo\ntrain: true\nbeta: -1.0\n")

    ended = wheel_environment.run(wheel_environment.host_script, "--config", "my.yaml", folder=tmp_path)

    assert ended.returncode == 2
    assert ended.stderr.startswith("error: beta is -1.0 in my.yaml, line 3")
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["my.yaml"]


def test_a_run_from_the_console_trains_and_says_what_is_hooked(
    wheel_environment: FreshEnvironment, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(json.dumps(settings))

    ended = wheel_environment.run(wheel_environment.host_script, "--config", "my.yaml", folder=tmp_path)

    assert ended.returncode == 0, ended.stderr
    announcements = [line for line in ended.stdout.splitlines() if line.startswith("mlx-cpo-plugin ")]
    assert len(announcements) == 1
    line, *products = announcements[0].split("; BLAS: ")
    assert line.endswith("hooks active: train_cpo, evaluate_cpo, CPOTrainingArgs, main, run")
    assert all(named.endswith(" GFLOP/s") for named in products)
    assert bool(products) == blas.is_used_here()
    assert "Training Mode:" in ended.stdout
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()


def test_help_of_a_cpo_run_shows_the_registered_options(wheel_environment: FreshEnvironment) -> None:
    ended = wheel_environment.run(wheel_environment.host_script, "--train-mode", "cpo", "--help")

    assert ended.returncode == 0
    assert "--chosen-feature" in ended.stdout


def test_help_without_a_mode_is_that_of_all_modes_and_with_another_mode_the_hosts(
    wheel_environment: FreshEnvironment,
) -> None:
    of_all = wheel_environment.run(wheel_environment.host_script, "--help")
    words = ("--train-mode", "sft", "--help")
    with_plugin = wheel_environment.run(wheel_environment.host_script, *words)
    without = wheel_environment.run(wheel_environment.host_script, *words, MLX_CPO_PLUGIN_DISABLE="1")

    assert of_all.returncode == 0
    assert {"preference loss:", "--latent-weight LATENT_WEIGHT"} <= {
        line.strip() for line in of_all.stdout.splitlines()
    }
    assert with_plugin.stdout == without.stdout


def test_start_up_imports_nothing_but_the_finder(environment: FreshEnvironment) -> None:
    script = "import sys; print(*sorted(sys.modules))"
    with_plugin = set(told(environment, script).split())
    bare = set(told(environment, script, "-S").split())

    own = {name for name in with_plugin - bare if name.startswith("mlx")}
    assert own == {
        "mlx_cpo_plugin",
        "mlx_cpo_plugin._version",
        "mlx_cpo_plugin.activation",
        "mlx_cpo_plugin.activation.finder",
        "mlx_cpo_plugin.activation.hook_state",
    }
    assert not with_plugin & {"yaml", "pluggy", "numpy", "dataclasses", "importlib.metadata"}


def test_a_start_up_file_whose_package_is_gone_says_nothing() -> None:
    line = (Path(finder.__file__).parent / START_UP_FILES[0]).read_text()

    ended = subprocess.run([sys.executable, "-I", "-S", "-c", line], capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert line.startswith("import ")
    assert line.count("\n") == 1


def test_a_hooked_module_has_a_loader_that_can_be_copied() -> None:
    loader = finder.HookingLoader(SimpleNamespace(name="any"))

    assert copy.deepcopy(loader).name == "any"
    assert pickle.loads(pickle.dumps(loader)).name == "any"


def test_where_start_up_files_are_not_read_activate_hooks_in(wheel_environment: FreshEnvironment) -> None:
    path = wheel_environment.search_path
    activate = "import mlx_cpo_plugin; mlx_cpo_plugin.activate()\n"

    without = wheel_environment.run("-S", "-c", IMPORT_LIKE_STUDIO, PYTHONPATH=path)
    wheel_environment.printed("-S", "-c", activate + IMPORT_LIKE_STUDIO, PYTHONPATH=path)
    late = f"import mlx_lm_lora.train\n{activate}{CALL_FUNCTIONS}{IMPORT_LIKE_STUDIO}"
    printed = wheel_environment.printed("-S", "-c", late, PYTHONPATH=path)

    assert "AssertionError" in without.stderr
    assert printed.startswith(REFUSAL)


@pytest.mark.parametrize("command", [["-m", "mlx_cpo_plugin"], ["bin/mlx-cpo"]], ids=["module", "script"])
def test_the_own_train_command_takes_the_hosts_arguments(
    wheel_environment: FreshEnvironment, command: list[str]
) -> None:
    words = [wheel_environment.folder / word if "/" in word else word for word in command]

    ended = wheel_environment.run(*words, "train", *REFUSED)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {REFUSAL}")


def test_the_variable_turns_the_plugin_off(wheel_environment: FreshEnvironment) -> None:
    script = (
        "import mlx_lm_lora.train as host; print(host.train_cpo.__module__, host.main.__module__, host.run.__module__)"
    )

    printed = wheel_environment.printed("-c", script, MLX_CPO_PLUGIN_DISABLE="1")

    assert printed.split() == ["mlx_lm_lora.trainer.cpo_trainer", "mlx_lm_lora.train", "mlx_lm_lora.train"]


def test_the_variable_is_read_when_the_host_is_imported(wheel_environment: FreshEnvironment) -> None:
    script = (
        "import os; os.environ['MLX_CPO_PLUGIN_DISABLE'] = '1'\n"
        "import mlx_lm_lora.trainer.cpo_trainer as trainer; print(trainer.train_cpo.__module__)"
    )

    assert wheel_environment.printed("-c", script).strip() == "mlx_lm_lora.trainer.cpo_trainer"


def test_the_hosts_own_functions_stay_reachable_and_a_reloaded_host_is_hooked_again(
    wheel_environment: FreshEnvironment,
) -> None:
    script = (
        "import importlib, mlx_lm_lora.train as host, mlx_lm_lora.trainer.cpo_trainer as trainer\n"
        "own = trainer._host_train_cpo, trainer._host_evaluate_cpo, host._host_main\n"
        "print(*(function.__module__ for function in own))\n"
        "importlib.reload(trainer); importlib.reload(host)\n"
        "print(trainer.train_cpo.__module__, host.train_cpo.__module__, host.main.__wrapped__.__module__)"
    )

    own, reloaded = wheel_environment.printed("-c", script).splitlines()

    assert own.split() == ["mlx_lm_lora.trainer.cpo_trainer"] * 2 + ["mlx_lm_lora.train"]
    assert reloaded.split() == ["mlx_cpo_plugin.training.trainer"] * 2 + ["mlx_lm_lora.train"]


def test_processes_that_are_spawned_are_hooked(wheel_environment: FreshEnvironment, tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing\n"
        "def module_of_train_cpo(_):\n"
        "    from mlx_lm_lora.trainer.cpo_trainer import train_cpo\n"
        "    return train_cpo.__module__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(module_of_train_cpo, [0])[0])\n"
    )

    assert wheel_environment.printed(tmp_path / "spawning.py").strip() == "mlx_cpo_plugin.training.trainer"


@pytest.mark.parametrize("kind", KINDS)
def test_installing_twice_is_harmless_and_uninstalling_leaves_no_file(tmp_path: Path, kind: str) -> None:
    environment = FreshEnvironment(tmp_path / "environment")
    before = environment.files()
    environment.install(built_wheel(kind))
    once = environment.files()
    installed = {file.name for file in once - before}
    assert {"mlx_cpo_plugin_autoload.pth", "mlx_cpo_plugin_autoload.start", "mlx-cpo"} <= installed

    environment.install(built_wheel(kind))
    assert environment.files() == once
    finders = (
        "import sys, mlx_cpo_plugin; mlx_cpo_plugin.activate(); mlx_cpo_plugin.activate()\n"
        "print([type(finder).__name__ for finder in sys.meta_path].count('HostFinder'))"
    )
    assert told(environment, finders) == "1"

    environment.uninstall()
    assert environment.files() == before
    assert told(environment, "import sys; print('mlx_cpo_plugin' in sys.modules)") == "False"


# Stands for any fault in the plugin: one of its modules cannot be imported.
BREAKING = "import sys; sys.modules[{module!r}] = None\n"
TRY_ALL_ENTRIES = """
import types
import mlx_lm_lora.train as host
from mlx_lm_lora.trainer import cpo_trainer
entries = {
    "main": lambda: host.main({"train_mode": "cpo", "train": True, "model": "no-such-model"}),
    "run": lambda: host.run(types.SimpleNamespace(train_mode="cpo")),
    "train_cpo": lambda: cpo_trainer.train_cpo(model=None),
    "evaluate_cpo": lambda: cpo_trainer.evaluate_cpo(model=None),
    "train_cpo of train": lambda: host.train_cpo(model=None),
}
for name, entry in entries.items():
    try:
        entry()
    except Exception as error:
        print(f"{name}|{type(error).__name__}|{error}")
"""
TRAIN_IN_ANOTHER_MODE = """
host.from_pretrained = lambda **_: (None, None, 'a file')
host.save_pretrained_merged = lambda **_: None
host.load_dataset = lambda args, _: ([], [], [])
host.train_model = lambda args, **_: print('trains', args.train_mode, args.iters)
import sys; sys.argv = ['train', '--train', '--iters', '7']; host.main()
"""
BREAKABLE = ["mlx_cpo_plugin.activation.patches", "mlx_cpo_plugin.training.trainer", "mlx_cpo_plugin.settings.config"]


@pytest.mark.parametrize("module", BREAKABLE)
def test_with_a_fault_in_the_plugin_every_entry_to_cpo_says_so_and_other_modes_run(
    wheel_environment: FreshEnvironment, module: str
) -> None:
    script = BREAKING.format(module=module) + TRY_ALL_ENTRIES + TRAIN_IN_ANOTHER_MODE

    printed = wheel_environment.printed("-c", script)

    refusals = [line.split("|") for line in printed.splitlines() if line.count("|") == 2]
    assert [name for name, _, _ in refusals] == ["main", "run", "train_cpo", "evaluate_cpo", "train_cpo of train"]
    for _, kind, message in refusals:
        assert kind == "PluginError"
        assert "only partly hooked" in message
        assert f"ModuleNotFoundError: import of {module} halted" in message
        assert "mlx-cpo doctor" in message
    assert "trains sft 7" in printed


def test_a_host_without_a_function_that_is_replaced_is_a_fault(
    wheel_environment: FreshEnvironment, tmp_path: Path
) -> None:
    host = tmp_path / "mlx_lm_lora"
    (host / "trainer").mkdir(parents=True)
    (host / "__init__.py").write_text("__version__ = '9.0.0'\n")
    (host / "trainer" / "__init__.py").write_text("")
    (host / "trainer" / "cpo_trainer.py").write_text("def train_cpo(**settings): print('the host trains')\n")
    script = "from mlx_lm_lora.trainer.cpo_trainer import train_cpo; train_cpo()"

    ended = wheel_environment.run("-c", script, PYTHONPATH=str(tmp_path))

    assert ended.returncode == 1
    assert "PluginError: mlx-cpo-plugin is only partly hooked" in ended.stderr
    assert "of mlx-lm-lora 9.0.0 has no evaluate_cpo, CPOTrainingArgs" in ended.stderr
    assert "the host trains" not in ended.stdout


def host_versions() -> list[Path]:
    """Unpacked wheels of mlx-lm-lora in the folder that MLX_CPO_TEST_HOSTS names."""
    folder = os.environ.get("MLX_CPO_TEST_HOSTS")
    return sorted(Path(folder).glob("mlx_lm_lora-*")) if folder else []


@pytest.mark.skipif(not host_versions(), reason="MLX_CPO_TEST_HOSTS names no folder of unpacked mlx-lm-lora wheels")
@pytest.mark.parametrize("host", host_versions(), ids=lambda path: path.name)
def test_tested_versions_of_the_host_train(
    wheel_environment: FreshEnvironment, host: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    version = host.name.split("-")[1]
    for number, command in enumerate((["-m", "mlx_lm_lora", "train"], ["-m", "mlx_lm_lora.train"])):
        settings["adapter_path"] = str(tmp_path / f"adapters-{number}")
        (tmp_path / "my.yaml").write_text(json.dumps(settings))

        ended: subprocess.CompletedProcess[str] = wheel_environment.start(
            wheel_environment.python, *command, "--config", "my.yaml", folder=tmp_path, PYTHONPATH=str(host)
        )

        assert ended.returncode == 0, ended.stderr
        assert f"in mlx-lm-lora {version}; hooks active" in ended.stdout
        assert "outside the range" not in ended.stderr
        assert (tmp_path / f"adapters-{number}" / "adapters.safetensors").is_file()
