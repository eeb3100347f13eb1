"""Each message that docs/troubleshooting.md quotes can be produced by the code."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from tests.lib.documents import table_rows, text_of
from tests.lib.launch import ROOT

PAGE = "docs/troubleshooting.md"
GAP = re.compile(r"\s*\.\.\.\s*")  # where a quotation leaves out values


def quotations() -> list[str]:
    """Return the headings and the first cells of tables that are one text in backticks."""
    headings = re.findall(r"^#+ `([^`]+)`$", text_of(PAGE), re.MULTILINE)
    return headings + [cell[1] for first, *_ in table_rows(PAGE) if (cell := re.fullmatch(r"`([^`]+)`", first))]


def literals(source: str) -> Iterator[str]:
    """Yield every string of a Python source but docstrings, an f-string with gaps in the place of its values."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


@cache
def messages() -> list[str]:
    sources = [*(ROOT / "raphael_dist").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    texts = [text for path in sources for text in literals(path.read_text())]
    return [*texts, *(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))]


def test_quotations_are_recognised_and_unique() -> None:
    counts = Counter(quotations())
    assert counts
    assert [quotation for quotation, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("quotation", quotations())
def test_quoted_message_is_a_message_of_the_code(quotation: str) -> None:
    """Its parts may come from several strings: a message is often put together."""
    parts = [part for part in GAP.split(quotation) if part]
    missing = [part for part in parts if not any(part in message for message in messages())]
    assert missing == []
    assert any(len(part) >= 10 for part in parts), "too little is quoted to recognise a message"
