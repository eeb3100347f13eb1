"""Each argument that a docstring describes is one of its function, on a line of its own: the API pages need it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "raphael_dist"


def described(docstring: str) -> list[str]:
    """Return what stands before the colon of each entry of the section `Args:`."""
    match = re.search(r"^Args:\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return re.findall(r"^    (\S[^:]*):", match[1], re.MULTILINE) if match else []


def unknown_entries(source: str) -> Iterator[str]:
    """Yield "function: entry" for each entry of `Args:` that names no argument of its function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            arguments = {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x}
            entries = described(ast.get_docstring(node) or "")
            yield from (f"{node.name}: {entry}" for entry in entries if entry.lstrip("*") not in arguments)


def test_described_arguments_exist() -> None:
    wrong = [f"{file}: {name}" for file in PACKAGE.rglob("*.py") for name in unknown_entries(file.read_text())]
    assert not wrong


def test_two_names_in_one_entry_are_found() -> None:
    source = 'def read(start, numel):\n    """Read.\n\n    Args:\n        start, numel: the range.\n    """\n'
    assert list(unknown_entries(source)) == ["read: start, numel"]
