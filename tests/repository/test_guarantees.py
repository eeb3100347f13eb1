"""Guarantees and faults have tests that exist, and the documents refer only to guarantees that exist.

Guarantees are the rows of docs/guarantees.md, faults those of docs/faults.md.
"""

import ast
import re
from functools import cache

import pytest

from tests.lib.documents import DOCUMENTS, table_rows, tables_of, text_of
from tests.lib.launch import ROOT

PAGE = "docs/guarantees.md"
FAULTS_PAGE = "docs/faults.md"
FIRST_CELL = re.compile(r'<a id="([a-z0-9-]+)"></a>`\1`')
LINK = re.compile(r"\]\([^)\s]*guarantees\.md#([^)\s]+)\)")
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))


def guarantees() -> list[tuple[str, str, list[str]]]:
    """Return (id, sentence, tests) of each row, a test as `file::function`."""
    parsed = []
    for row in table_rows(PAGE):
        assert len(row) == 3, f"{PAGE}: a row has an id, a sentence and tests: {row}"
        first = FIRST_CELL.fullmatch(row[0])
        assert first, f'{PAGE}: a row starts with <a id="ID"></a>`ID`: {row[0]}'
        parsed.append((first[1], row[1], re.findall(r"`([^`]+)`", row[2])))
    return parsed


def faults() -> list[tuple[str, str, list[str]]]:
    """Return (fault, what happens, tests) of each row, without the rows that head a group."""
    (table,) = [table for table in tables_of(FAULTS_PAGE) if any("::" in row[-1] for row in table)]
    assert all(len(row) == 3 for row in table), f"{FAULTS_PAGE}: a row has a fault, what happens and tests"
    return [(row[0], row[1], re.findall(r"`([^`]+)`", row[2])) for row in table if any(row[1:])]


@cache
def enabled_tests(file: str) -> frozenset[str]:
    """Return the names of the tests that the one file of this name (maybe with folders before it) runs."""
    paths = [path for path in TEST_FILES if f"/{path.relative_to(ROOT)}".endswith(f"/{file}")]
    assert len(paths) == 1, f"{file} must name one file of tests/, but it names {len(paths)}"
    functions = [node for node in ast.walk(ast.parse(paths[0].read_text())) if isinstance(node, ast.FunctionDef)]
    disabled = re.compile(r"pytest\.mark\.(skip|xfail)\b")
    return frozenset(f.name for f in functions if not any(disabled.match(ast.unparse(d)) for d in f.decorator_list))


GUARANTEES = guarantees()
ROWS = [*GUARANTEES, *faults()]


@pytest.mark.parametrize(("name", "sentence", "tests"), ROWS, ids=[name for name, *_ in ROWS])
def test_row_is_held_by_tests_that_run(name: str, sentence: str, tests: list[str]) -> None:
    assert sentence
    assert tests, f"{name} names no test"
    for test in tests:
        file, _, function = test.partition("::")
        assert function.startswith("test_"), f"{name}: write file::function, not {test}"
        assert function in enabled_tests(file), f"{name}: {test} does not exist, or is disabled"


def test_guarantee_ids_are_unique() -> None:
    names = [name for name, *_ in GUARANTEES]
    assert names
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_guarantees_name_existing_ids(document: str) -> None:
    assert set(LINK.findall(text_of(document))) <= {name for name, *_ in GUARANTEES}
