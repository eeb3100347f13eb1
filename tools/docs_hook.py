"""A mkdocs hook: includes files from elsewhere in the repository, and rewrites links to files outside the site."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = re.compile(r"^<!-- the file (\S+) -->$", re.MULTILINE)
OUTWARDS = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the Markdown of a page with included files inserted; mkdocs calls this for each page.

    A line `<!-- the file PATH -->` is replaced by the content of that file of the repository. A link to a file outside the
    site is replaced by its text and the file's path in the repository.
    """
    text = INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), markdown)

    def outside(match: re.Match[str]) -> str:
        assert (ROOT / match[2]).exists(), f"{page.file.src_path}: no file {match[2]}"
        return f"{match[1]} (`{match[2]}` in the repository)"

    return OUTWARDS.sub(outside, text)
