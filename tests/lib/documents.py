"""Parse the documents, so that tests can check their facts: commands, words in backticks, tables, links and file names.

A `document` is the path of a Markdown file in the repository, as in DOCUMENTS.
"""

import re
import shlex
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

from tests.lib.launch import ROOT

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "slurm/README.md", "data/emoji/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]  # raphael-train and such
PROGRAMS = {
    *("python", "python3", ".venv/bin/python", "make", "deepspeed", "torchrun", "mpirun", "sbatch", "bash", "scancel"),
    *("pip", *COMMANDS),
}
SHELLS = ("bash", "sh", "shell")


@dataclass(frozen=True)
class Code:
    """A command or a block of Python (`text`), and where it is: `place` is DOCUMENT:LINE."""

    place: str
    text: str


@dataclass(frozen=True)
class Block:
    """A code block of a document, indented or fenced.

    Attributes:
        number: number of its first line in the document, from 1.
        language: the word after the opening fence; empty if there is none.
        lines: its text.
    """

    number: int
    language: str
    lines: list[str]

    def is_python(self) -> bool:
        """Return whether the block is a complete Python program. Such blocks start with an import."""
        return self.language in ("", "python") and self.lines[0].startswith(("from ", "import "))

    def is_shell(self) -> bool:
        """Return whether the block has shell commands: it says so, or names no language and has at least one command."""
        return self.language in SHELLS or (self.language == "" and any(map(is_command, self.lines)))


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def blocks_of(document: str) -> list[Block]:
    """Return all code blocks of a document, with lines joined that end in a backslash."""
    blocks: list[Block] = []
    fenced = inside = False
    language = ""
    for number, line in enumerate(text_of(document).splitlines(), start=1):
        if line.startswith("```"):
            fenced, inside, language = not fenced, False, "" if fenced else line[3:].strip()
        elif fenced or line.startswith("    "):
            if not inside:
                blocks.append(Block(number, language, []))
            lines = blocks[-1].lines
            if lines and lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1] + line.strip()
            else:
                lines.append(line if fenced else line[4:])
            inside = True
        else:
            inside = False
    return blocks


def in_backticks(document: str) -> list[tuple[int, str]]:
    """Return (line number, text) of each text in backticks outside of code blocks."""
    blank = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text_of(document), flags=re.DOTALL | re.MULTILINE)
    text = "\n".join("" if line.startswith("    ") else line for line in blank.splitlines())
    return [(text[: m.start()].count("\n") + 1, " ".join(m[1].split())) for m in re.finditer(r"`([^`]+)`", text)]


def is_command(text: str) -> bool:
    """Return whether `text` is a command: a known program with arguments, also after variables such as `DRY_RUN=1`."""
    words = re.sub(r"^([A-Z_]+=\S+ )+", "", text).split()
    ours = bool(words) and re.fullmatch(r"(tools|slurm)/[\w/]+\.(py|sh)", words[0]) is not None
    return len(words) > 1 and (words[0] in PROGRAMS or ours)


def find_code() -> list[Code]:
    """Return all commands and Python programs in all documents. A text that occurs several times is returned once."""
    code: dict[str, Code] = {}
    for document in DOCUMENTS:
        for block in blocks_of(document):
            if block.is_python():
                code.setdefault("\n".join(block.lines), Code(f"{document}:{block.number}", "\n".join(block.lines)))
            elif block.is_shell():
                for offset, line in enumerate(block.lines):
                    if command := shlex.join(shlex.split(line, comments=True)):
                        code.setdefault(line, Code(f"{document}:{block.number + offset}", command))
        for number, text in in_backticks(document):
            if is_command(text):
                code.setdefault(text, Code(f"{document}:{number}", text))
    return list(code.values())


@cache
def our_files() -> list[str]:
    """Return the paths of all files and folders of the repository that documents may mention, with a leading slash."""
    tops = ("raphael_dist", "tools", "tests", "slurm", "docs", "ds_configs", "data", "models", "containers")
    paths = [*ROOT.glob("*.*"), *(path for top in tops for path in (ROOT / top).rglob("*"))]
    return ["/" + str(path.relative_to(ROOT)) for path in paths]


def words_of(document: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, word) of each word in backticks, without brackets and punctuation marks around it."""
    for number, text in in_backticks(document):
        for word in text.split():
            yield number, word.strip("()[],;:'\"")


@cache
def tables_of(document: str) -> list[list[list[str]]]:
    """Return all tables of a document. A table is a list of rows, without the header; a row is a list of cells."""
    tables = re.findall(r"^\|[^\n]*\n\|[-:| ]+\|\n((?:\|[^\n]*(?:\n|\Z))+)", text_of(document), re.MULTILINE)
    return [[[c.strip() for c in line.strip("|").split(" | ")] for line in body.strip().splitlines()] for body in tables]


def table_rows(document: str) -> list[list[str]]:
    """Return the rows of all tables of a document."""
    return [row for table in tables_of(document) for row in table]


def table_of(keys: Collection[str]) -> dict[str, list[str]]:
    """Return that table of all documents whose first column has most of the entries `keys`.

    A test finds a table by its content, so that documents, headings and columns can be renamed and moved.

    Returns:
        By the first cell of each row, without backticks: the other cells of the row.

    Raises:
        AssertionError: no table has any of the keys.
    """

    def listed(table: list[list[str]]) -> int:
        return len({key for row in table for key in split_cell(row[0])} & set(keys))

    table = max((table for document in DOCUMENTS for table in tables_of(document)), key=listed)
    assert listed(table), f"no table of the documents lists {sorted(keys)}"
    return {first.strip("`"): others for first, *others in table}


def split_cell(cell: str) -> list[str]:
    """Return the entries of a table cell that lists several, separated by commas, without backticks."""
    return [entry.strip("`") for entry in cell.split(", ")]


def anchors_of(document: str) -> set[str]:
    """Return all valid `#` targets of links into a document: explicit anchors, and headings as GitHub converts them."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text_of(document)))
