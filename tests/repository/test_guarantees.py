"""Each guarantee of docs/guarantees.md has tests that exist, and the documents refer only to guarantees that exist."""

import ast
import re
from functools import cache

import pytest

from tests.lib.documents import DOCUMENTS, table_rows, text_of
from tests.lib.launch import ROOT

PAGE = "docs/guarantees.md"
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


@cache
def enabled_tests(file: str) -> frozenset[str]:
    """Return the names of the tests that the one file of this name (maybe with folders before it) runs."""
    paths = [path for path in TEST_FILES if f"/{path.relative_to(ROOT)}".endswith(f"/{file}")]
    assert len(paths) == 1, f"{file} must name one file of tests/, but it names {len(paths)}"
    functions = [node for node in ast.walk(ast.parse(paths[0].read_text())) if isinstance(node, ast.FunctionDef)]
    disabled = re.compile(r"pytest\.mark\.(skip|xfail)\b")
    return frozenset(f.name for f in functions if not any(disabled.match(ast.unparse(d)) for d in f.decorator_list))


GUARANTEES = guarantees()


@pytest.mark.parametrize(("name", "sentence", "tests"), GUARANTEES, ids=[name for name, *_ in GUARANTEES])
def test_guarantee_is_held_by_tests_that_run(name: str, sentence: str, tests: list[str]) -> None:
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
