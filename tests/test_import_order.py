"""Modules import those below them: no circle, and no arrow that runs up. This is where the order is written down."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import mlx_cpo_plugin

PACKAGE = "mlx_cpo_plugin"
# From the bottom; the parts of one line do not import each other in a circle either, see the second test.
ORDER = (
    (
        *("errors", "parameters", "missing_paths", "atomic_files", "json_output", "console", "_version", "linkage"),
        *("losses", "verdict", "termination", "marked_text"),
    ),
    ("device", "blas", "exchange"),
    ("types",),
    ("hookspecs",),
    ("plugins",),
    ("host",),
    ("kernels",),
    ("data",),
    ("model",),
    ("checkpoints",),
    ("settings",),
    ("trackers", "report", "convert"),
    ("publish",),
    ("training",),
    ("cpo",),
    ("run",),
    ("demo", "comparison", "selftest", "sweep"),
    ("export",),
    ("activation",),
    ("commands",),
    ("bench", "studio"),
    ("cli",),
    ("__main__",),
)
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
# Module -> its distribution, where they differ.
DISTRIBUTIONS = {"ruamel": "ruamel.yaml", "yaml": "pyyaml"}


class Arrow(NamedTuple):
    """One module importing another, both named without the package, and the line that does it."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line} imports {self.imported}"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name without that of the package; the package itself is exempt."""
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def arrows(root: Path) -> list[Arrow]:
    """Every import of one module of the package by another, wherever in the file it stands."""
    known = modules(root)
    return [
        Arrow(name, imported, line)
        for name, path in known.items()
        for line, dotted in imported_names(path)
        if (imported := module_of(dotted, known)) and imported != name
    ]


@cache
def imported_names(module: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of what a module imports, function-level imports and those for type checkers, too."""
    names = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def module_of(dotted: str, known: dict[str, Path]) -> str:
    """Return the longest known module that a dotted name begins with; nothing for other packages."""
    if not dotted.startswith(f"{PACKAGE}."):
        return ""
    name = dotted.removeprefix(f"{PACKAGE}.")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def level(module: str) -> int:
    return LEVELS[module.partition(".")[0]]


def runs_up(arrow: Arrow) -> bool:
    return level(arrow.imported) > level(arrow.importer)


def circle(found: list[Arrow]) -> list[Arrow]:
    """Return the arrows of one circle; none where there is no circle."""
    outgoing: dict[str, list[Arrow]] = {}
    for arrow in found:
        outgoing.setdefault(arrow.importer, []).append(arrow)
    done: set[str] = set()

    def search(module: str, path: list[Arrow]) -> list[Arrow]:
        for start, arrow in enumerate(path):
            if arrow.importer == module:
                return path[start:]
        for arrow in outgoing.get(module, ()) if module not in done else ():
            if closed := search(arrow.imported, [*path, arrow]):
                return closed
        done.add(module)
        return []

    return next((closed for module in outgoing if (closed := search(module, []))), [])


ROOT = Path(mlx_cpo_plugin.__file__).parent


def test_no_module_imports_one_above_it() -> None:
    found = [arrow for arrow in arrows(ROOT) if runs_up(arrow)]

    assert not found, "\n".join(map(str, found))


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = circle(arrows(ROOT))

    assert not found, "\n".join(map(str, found))


def test_every_module_has_its_place_in_the_order() -> None:
    assert {name.partition(".")[0] for name in modules(ROOT)} <= set(LEVELS)


def test_whatever_is_imported_is_declared() -> None:
    """For each folder: the dependencies of all, and for the page and for reports those of their extras."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        "studio": "studio",
        "report": "report",
        "sweep": "report",
        "bench": "bench",
        "comparison": "compare",
        "export": "gguf",
    }
    # Run by Pythons of environments that hold those trainers, not by this one's.
    elsewhere = {"bench.trl_worker": {"torch", "trl", "peft"}, "bench.unsloth_worker": {"unsloth_zoo"}}
    for name, path in modules(ROOT).items():
        folder = name.partition(".")[0]
        declared = [*project["dependencies"], *project["optional-dependencies"].get(extras.get(folder, ""), ())]
        names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in declared}
        imported = {dotted.partition(".")[0] for _, dotted in imported_names(path)}
        foreign = imported - sys.stdlib_module_names - {PACKAGE} - elsewhere.get(name, set())
        assert {DISTRIBUTIONS.get(module, module) for module in foreign} <= names, name


@pytest.mark.parametrize(
    "line",
    [
        "from mlx_cpo_plugin.training import b",
        "from mlx_cpo_plugin.training.b import x",
        "import mlx_cpo_plugin.training.b as other",
        "def f():\n    from mlx_cpo_plugin.training.b import x",
        "if TYPE_CHECKING:\n    from mlx_cpo_plugin.training.b import x",
    ],
)
def test_an_import_is_found_wherever_and_however_it_is_written(line: str, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "b.py").touch()
    (tmp_path / "settings.py").write_text(f"import os\n{line}\n")

    (arrow,) = arrows(tmp_path)

    assert arrow == Arrow("settings", "training.b", 2 + line.count("\n"))
    assert runs_up(arrow)
    assert str(arrow) == f"settings, line {arrow.line} imports training.b"


def test_a_circle_is_found_whatever_leads_to_it() -> None:
    found = [Arrow("a", "b", 1), Arrow("b", "c", 2), Arrow("c", "d", 3), Arrow("d", "b", 4), Arrow("a", "e", 5)]

    assert circle(found) == found[1:4]
    assert circle([*found[:3], found[4]]) == []


def test_the_picture_of_the_folders_has_the_order_of_imports() -> None:
    page = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    lines = [re.findall(r"\b[a-z_]+\b", re.split(r"\s{3,}", line)[0]) for line in picture.splitlines()]
    levels = [[LEVELS[part] for part in line] for line in lines]

    assert all(min(upper) > max(lower) for upper, lower in pairwise(levels))
    assert set(LEVELS) - {part for line in lines for part in line} <= set(ORDER[0])  # "..."
