"""For mkdocs: pages that are kept elsewhere in the repository, and links to files that the site does not hold."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = re.compile(r"^<!-- the file (\S+) -->$", re.MULTILINE)
OUTWARDS = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the file that a page names; of links to files that the site does not hold keep the file's name."""
    text = INCLUDED.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), markdown)

    def outside(found: re.Match[str]) -> str:
        assert (ROOT / found[2]).exists(), f"{page.file.src_path}: no file {found[2]}"
        return f"{found[1]} (`{found[2]}` in the repository)"

    return OUTWARDS.sub(outside, text)
