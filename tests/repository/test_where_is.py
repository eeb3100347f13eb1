"""CONTRIBUTING.md names the file and the function where a topic is implemented: they exist."""

import ast
from pathlib import Path

import pytest

from tests.lib.documents import tables_of

ROOT = Path(__file__).parents[2]
(ROWS,) = [table for table in tables_of("CONTRIBUTING.md") if any(row[0] == "the loss" for row in table)]


def names_in(source: str) -> set[str]:
    """Return the functions, classes, methods (Class.method) and constants that a module defines."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("topic", "file", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_name_of_the_table_is_defined_in_its_file(topic: str, file: str, name: str) -> None:
    assert name.strip("`") in names_in((ROOT / file.strip("`")).read_text())


def test_table_answers_at_least_ten_questions() -> None:
    assert len({topic for topic, *_ in ROWS}) >= 10
