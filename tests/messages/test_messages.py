"""Every text that a person may read stands in one file, so that a change of wording shows as a whole.

    python tests/messages/test_messages.py

writes the file anew; read its diff as an editor would.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("messages.txt")
FEWEST_WORDS = 4


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the strings of at least :data:`FEWEST_WORDS` words that are no docstrings.

    What is filled in stands in braces, as the source has it.
    """
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"  # type: ignore[attr-defined]  # a FormattedValue
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
            text = node.value
        else:
            continue
        if len(text.split()) >= FEWEST_WORDS:
            yield node.lineno, text


def snapshot() -> str:
    """Return all texts of the package, by module and in the order in which they stand there."""
    pages = []
    for path in sorted((PROJECT / "mlx_cpo_plugin").rglob("*.py")):
        found = sorted(texts(ast.parse(path.read_text(encoding="utf-8"))))
        if found:
            lines = [text.replace("\\", "\\\\").replace("\n", "\\n") for _, text in found]
            pages.append("\n".join([f"== {path.relative_to(PROJECT)}", *lines]))
    return "\n\n".join(pages) + "\n"


def test_every_text_is_as_the_snapshot_has_it() -> None:
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8"), "write the snapshot anew and read its diff"


def test_a_text_is_found_whole_with_what_is_filled_in_and_no_docstring_is_one() -> None:
    source = "\n".join(
        [
            '"""A docstring of several words."""',
            "name = 1",
            'print(f"This is {name:>3} of " "several words")',
            'x = "one two"',
        ]
    )

    assert list(texts(ast.parse(source))) == [(3, "This is {name} of several words")]


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
