"""Takes apart the documents for test_docs.py: commands, words in backticks, tables; and which files there are."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tests.launch import ROOT

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "slurm/README.md", "data/emoji/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
PROGRAMS = (
    "python",
    "python3",
    ".venv/bin/python",
    "make",
    "deepspeed",
    "torchrun",
    "mpirun",
    "sbatch",
    "bash",
    "scancel",
    "pip",
)
# Code blocks that hold no command, by their first line.
NO_COMMANDS = (
    "raphael_dist/train.py  sample.py ",  # the tree
    "runs/NAME/config.yaml ",  # what a run leaves
    "out[j] = sum_k ",
    "seconds = n (W - 1) / W ",
    "options: {members: ",  # what mkdocs fills in
    "base: raphael-sd2",  # configurations, which tests/test_recipes.py reads
    "recipe:",
    "data:",  # sources, whose like tests/test_index.py reads
    '"""All weights in one safetensors file',  # a layout, which tests/test_layouts.py runs
)


@dataclass(frozen=True)
class Code:
    """A command, or a whole block of Python, and where it stands."""

    place: str
    text: str


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def blocks_of(document: str) -> list[tuple[int, list[str]]]:
    """Return (number of the first line, lines) of each indented or fenced code block, `\\` at the end of a line undone."""
    blocks: list[tuple[int, list[str]]] = []
    fenced = inside = False
    for number, line in enumerate(text_of(document).splitlines(), start=1):
        if line.startswith("```"):
            fenced, inside = not fenced, False
        elif fenced or line.startswith("    "):
            if not inside:
                blocks.append((number, []))
            lines = blocks[-1][1]
            if lines and lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1] + line.strip()
            else:
                lines.append(line if fenced else line[4:])
            inside = True
        else:
            inside = False
    return blocks


def in_backticks(document: str) -> list[tuple[int, str]]:
    """Return (number of the line, text) of everything in backticks, code blocks left out."""
    blank = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text_of(document), flags=re.DOTALL | re.MULTILINE)
    text = "\n".join("" if line.startswith("    ") else line for line in blank.splitlines())
    return [(text[: m.start()].count("\n") + 1, " ".join(m[1].split())) for m in re.finditer(r"`([^`]+)`", text)]


def is_command(text: str) -> bool:
    """Return whether a text is a program with arguments, maybe after settings as `DRY_RUN=1`."""
    words = re.sub(r"^([A-Z_]+=\S+ )+", "", text).split()
    ours = bool(words) and re.fullmatch(r"(tools|slurm)/[\w/]+\.(py|sh)", words[0]) is not None
    return len(words) > 1 and (words[0] in PROGRAMS or ours)


def find_code() -> list[Code]:
    """Return all commands and blocks of Python of all documents, each text once."""
    found: dict[str, Code] = {}
    for document in DOCUMENTS:
        for number, lines in blocks_of(document):
            if lines[0].startswith(("from ", "import ")):
                found.setdefault("\n".join(lines), Code(f"{document}:{number}", "\n".join(lines)))
            elif not lines[0].startswith(NO_COMMANDS):
                for offset, line in enumerate(lines):
                    command = shlex.join(shlex.split(line, comments=True))
                    found.setdefault(line, Code(f"{document}:{number + offset}", command))
        for number, text in in_backticks(document):
            if is_command(text):
                found.setdefault(text, Code(f"{document}:{number}", text))
    return list(found.values())


@cache
def our_files() -> list[str]:
    """Return the paths of all files of the repository that documents may name."""
    tops = ("raphael_dist", "tools", "tests", "slurm", "docs", "ds_configs", "data", "models")
    paths = [*ROOT.glob("*.*"), *(path for top in tops for path in (ROOT / top).rglob("*"))]
    return ["/" + str(path.relative_to(ROOT)) for path in paths]


def words_of(document: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the line, word) of everything in backticks, without marks around the words."""
    for number, text in in_backticks(document):
        for word in text.split():
            yield number, word.strip("()[],;:'\"")


def rows(document: str, first: str) -> dict[str, list[str]]:
    """Return the rows of the table whose heading begins with `first`: the first cell without backticks, and the others."""
    _, _, rest = text_of(document).partition(f"\n| {first} |")
    body = re.match(r"[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", rest)
    assert body, f"{document} has no table that begins with {first!r}"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1].splitlines()]
    return {first.strip("`"): others for first, *others in cells}
