"""Messages use the words of the field.

`python tests/cli/test_messages.py [--all] FOLDER...` lists violations.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Pattern of a word, and what to write instead.
WORDS = {
    r"beside": "next to, alongside, in addition to, on top of",
    r"told|said|tells? of|is told|speaks?": "reported, logged, stated",
    r"aside": "quarantined, moved to damaged-*",
    r"anew": "again",
    r"go(es)? on|went on|going on": "continue(s)",
    r"reckon\w*": "estimate, compute",
    r"pictures?": "image",
    r"wants|(go|goes|went) with": "requires, is compatible with",
    r"cut up": "sharded",
    r"spread (space |time )?experts|experts (that )?(are |is |were )?spread": "expert parallelism, sharded experts",
    r"the run that it was": "the settings that affect results are unchanged",
    r"knobs?": "option, setting",
    r"stand-ins?": "placeholder, dummy",
    r"objections?|took|patience|beats?": "skip reason, record, timeout factor, heartbeat",
}
NAMES = {"found", "mine", "one", "more", "given", "wanted", "kept", "told", "said"}
PATTERN = re.compile("|".join(rf"(?<![\w-])({words})(?![\w-])" for words in WORDS), re.IGNORECASE)
SHOWN_KEYWORDS = {"help", "description", "epilog", "metavar", "title", "usage"}
# (file, text) that is allowed, with its reason.
ALLOWED: dict[tuple[str, str], str] = {}


class Violation(NamedTuple):
    """A word in a place: `kind` is message, docstring, comment or name."""

    path: Path
    line: int
    kind: str
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.word!r} in {' '.join(self.text.split())[:100]!r}"


def docstrings(tree: ast.AST) -> set[int]:
    """Return the ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every text that a user may read.

    That is each string of several words outside docstrings, wherever it is passed on to: UserError and other exceptions, log
    and print calls, help texts, descriptions of fields. Of an f-string it is each constant part.
    """
    skipped, shown = docstrings(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in SHOWN_KEYWORDS:
            shown |= {id(inner) for inner in ast.walk(node.value)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in skipped:
            continue
        if re.search(r"\w \w|\w[,;:] |^ \w|\w $", node.value) or id(node) in shown:
            yield node.lineno, node.value


def other_texts(source: str, tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, text) of docstrings and comments, and of assigned names that say nothing."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) in skipped:
            yield node.lineno, "docstring", str(node.value)
        elif isinstance(node, ast.arg) and node.arg in NAMES:
            yield node.lineno, "name", node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMES:
            yield node.lineno, "name", node.id
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string


def violations(path: Path, everything: bool = False) -> list[Violation]:
    """Return the violations in a module: of its messages, with `everything` also of docstrings, comments and names."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    texts = [(line, "message", text) for line, text in messages(tree)]
    if everything:
        texts += other_texts(source, tree)
    result = []
    for line, kind, text in texts:
        words = [text] if kind == "name" else [match[0] for match in PATTERN.finditer(text)]
        if (path.name, text) not in ALLOWED:
            result += [Violation(path, line, kind, word, text) for word in words]
    return sorted(result)


def modules(folders: list[Path]) -> list[Path]:
    """Return the Python files below the folders; a file stands for itself."""
    return [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob("*.py")))]


def test_texts_use_the_words_of_the_field() -> None:
    """Docstrings are included: those of settings and commands are shown to users."""
    wrong = [v for path in modules([ROOT / "raphael_dist", ROOT / "tools"]) for v in violations(path, everything=True)]
    lines = [str(violation) for violation in wrong if violation.kind != "name"]
    assert not lines, "\n".join(lines)


def test_word_in_each_kind_of_message_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""A picture."""\n'
        'raise UserError(f"{x}: a picture wants {y}")\n'
        'parser.add_argument("--a", metavar="PICTURE", help="beside")\n'
        'key = Field(1, description="reckoned")\n'
        'log.warning("it goes on after %s", name)\n'
        'sample = tree["picture"]\n'
        'line = "seaside pictured"\n'
    )
    words = [(v.line, v.word) for v in violations(path)]
    assert words == [(2, "picture"), (2, "wants"), (3, "PICTURE"), (3, "beside"), (4, "reckoned"), (5, "goes on")]


def main() -> int:
    """Print violations of the given folders or files; return 1 if there are any."""
    parser = argparse.ArgumentParser(description="List words that messages must not use, with what to write instead.")
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "raphael_dist"])
    parser.add_argument("--all", action="store_true", help="also docstrings, comments and names of variables")
    args = parser.parse_args()
    lines = [violation for path in modules(args.folders) for violation in violations(path, args.all)]
    print("\n".join(map(str, lines)))
    for word, instead in WORDS.items():
        count = sum(bool(re.fullmatch(word, line.word, re.IGNORECASE)) for line in lines)
        if count:
            print(f"{count:5} {word}: write {instead}")
    print(f"{len(lines):5} in all")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
