"""docs/troubleshooting.md explains messages that exist, each with cause and fix."""

import ast
import re

from tests.documents import text_of
from tests.launch import ROOT

HEADING = re.compile(r"^### `(.+)`\n((?:.*\n)+?)(?=\n#|\Z)", re.MULTILINE)


def messages() -> list[str]:
    """Return every text of the code, one that is put together with gaps where values come in."""
    found = []
    for path in [*(ROOT / "raphael_dist").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [*found, *(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))]


def test_every_message_exists_and_has_a_cause_and_a_fix() -> None:
    entries, texts = HEADING.findall(text_of("docs/troubleshooting.md")), messages()
    assert len(entries) == text_of("docs/troubleshooting.md").count("\n### ") >= 25
    assert len({heading for heading, _ in entries}) == len(entries)
    for heading, body in entries:
        # Parts may stand in texts of their own: a message is often put together from several.
        for part in filter(None, re.split(r"\s*\.\.\.\s*", heading)):
            assert any(part in text for text in texts), f"no message says {part!r}"
        assert "**Cause.**" in body, heading
        assert "**Fix.**" in body, heading
