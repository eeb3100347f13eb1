"""Text from outside the program: reads text files, prints untrusted text safely, hides secrets in URLs."""

import codecs
import contextlib
import errno
import io
import json
import logging
import os
import re
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

JsonObject = dict[str, Any]  # what a JSON object becomes
MAX_TEXT = 1 << 30  # bytes; a manifest has some 200 bytes for each tensor of each rank
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, because this mark begins with that of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
               float: "a number", type(None): "null"}  # fmt: skip

HIDDEN = "(hidden)"
# A quote is a part of an address, unless it closes the quote that stands before the address: 'https://h/it's?a=b', ...
_ADDRESS = re.compile(r"""(?:(?<=(['"])))?[A-Za-z][A-Za-z0-9+.-]*://(?:(?!\1(?:[\s,:;)\]}<>'"]|$))[^\s<>])+""")
_PARAMETER = re.compile(r"(;[^/;=]*=)[^/;]*")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_SECRET = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password|passwd)$")
# A straight quote opens where no letter or digit precedes it, and closes where none follows: 24" is a length.
_QUOTED = re.compile(r"""(?<!\w)"([^"]+)"(?!\w)|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»""")


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor. Raises OSError if it is not a regular file (e.g. a FIFO)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_text(path: Path, regular: bool = True) -> str:
    """Read a UTF-8 text file and return its text.

    Args:
        path: the file.
        regular: accept regular files only. False also accepts a FIFO, such as a shell's `<(command)` that a user passes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, or larger than MAX_TEXT bytes.
    """
    with open(open_regular(path) if regular else path, "rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"the file is larger than {MAX_TEXT >> 20} MiB")
    return decode_text(data)


def decode_text(data: bytes) -> str:
    """Decode UTF-8 bytes and return the string.

    Args:
        data: the bytes. A byte order mark is removed, line ends are kept.

    Raises:
        ValueError: the bytes have another encoding.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    try:
        if encoding is None and b"\0" not in data[:4]:  # UTF-16 without a mark
            return data.decode("utf-8-sig")
        where = encoding or "it has NUL characters, as UTF-16 does"
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
    raise ValueError(f"not UTF-8 ({where}); save it as UTF-8")


def split_lines(text: str) -> list[str]:
    r"""Split a string at \n and \r\n only (`str.splitlines` also splits at form feeds and U+2028); return its lines."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def parse_json(text: str, make_object: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:
    """Parse a string in the JSON format and return its value.

    Args:
        text: the string.
        make_object: called for each JSON object with its (key, value) pairs; its result replaces the object. None: `dict`.

    Raises:
        ValueError: the string is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_type(value: object) -> str:
    """Return in words the JSON type of a value that a JSON parser returned, such as "a list", "a number" or "null"."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def reason_unreadable(error: Exception) -> str:
    """Return in words why the content of a file is invalid, given the exception that parsing or using it raised."""
    if isinstance(error, KeyError):
        return f"the entry {error} is missing"
    return "a value has the wrong type" if isinstance(error, TypeError | AttributeError) else str(error)


def read_json(path: Path) -> Any:
    """Read a JSON file and return its value. Raises the errors of `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def escape_control(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters (\n, \x1b, \u202e) written as escapes, so that it cannot forge lines of a log.

    `keep`: a string of the characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def counted(number: float, noun: str, form: str = "") -> str:
    """Return the number with the noun, in the plural unless the number is 1: "1 rank", "2 ranks".

    `form`: the format of the number, for example "," for "2,000 ranks".
    """
    shown = f"{number:{form}}"
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def shorten(text: str) -> str:
    """Return `text` unchanged if it has at most 200 characters, otherwise its first 150 characters and its total length."""
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def hide_secrets(address: str) -> str:
    """Return an address (scheme://...) with user, password and query replaced by "(hidden)"; return a path unchanged.

    In the path of a web address, the values of parameters (;name=value) are hidden, too.
    """
    scheme, is_address, rest = address.partition("://")
    if not is_address:
        return address
    is_web = scheme.lower() in ("http", "https")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, has_user, _ = host.rpartition("@")
    if not has_user and not _HOST.fullmatch(host):  # a password with /, ? or # in it
        user, _, rest = rest.partition("@")
        rest = f"{HIDDEN}@{rest}"
    elif has_user and (is_web or ":" in user or scheme.lower() == "s3"):  # abfs://container@account is no secret
        rest = f"{HIDDEN}@{rest[len(user) + 1 :]}"
    place = re.split(r"[?#]" if is_web else r"\?", rest, maxsplit=1)[0]
    tail = rest[len(place) :]
    if tail and not tail[1:].startswith(HIDDEN):
        tail = tail[0] + HIDDEN
    if is_web:
        place = _PARAMETER.sub(rf"\1{HIDDEN}", place)
    return f"{scheme}://{place}{tail}"


def hide_secrets_in_text(text: str) -> str:
    """Return `text` with user, password and query of every address (scheme://...) in it replaced by "(hidden)"."""
    return _ADDRESS.sub(_shown_in_text, text) if "://" in text else text


def _shown_in_text(match: re.Match[str]) -> str:
    address = match[0].rstrip(":,;.]}'\"")
    return hide_secrets(address) + match[0][len(address) :]


def hide_secrets_in_tree(tree: Any) -> Any:
    """Return a copy of nested dicts and lists in which every address in a string has its secrets hidden.

    That is, user, password and query of scheme://... are replaced by "(hidden)". The address may be the whole string, or a
    part of it, as in shards=https://...
    """
    if isinstance(tree, dict):
        return {key: hide_secrets_in_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [hide_secrets_in_tree(value) for value in tree]
    return hide_secrets_in_text(hide_secrets(tree)) if isinstance(tree, str) else tree


def redact(tree: Any) -> Any:
    """Return a copy of nested dicts and lists with "(hidden)" in place of secrets.

    Secrets are the values of keys such as `token` or `password`, and user, password and query in addresses.
    """
    if isinstance(tree, dict):
        return {k: HIDDEN if _SECRET.search(str(k)) and v is not None else redact(v) for k, v in tree.items()}
    return [redact(value) for value in tree] if isinstance(tree, list) else hide_secrets_in_tree(tree)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print `text` as one line. User, password and query of addresses are hidden, and control characters are escaped.

    `file`: the stream to print to; None: stdout.
    """
    print(escape_control(hide_secrets_in_text(text)), file=file, flush=True)


class LineFormat(logging.Formatter):
    """A log formatter that hides user, password and query of addresses, and escapes control characters.

    The line breaks of a traceback are kept.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the log line of a record, followed by its traceback if it has one. Secrets in addresses are hidden."""
        return escape_control(hide_secrets_in_text(super().format(record)), keep="\n\t")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the log line of a record, with control characters escaped. `format` adds the traceback."""
        return escape_control(super().formatMessage(record))


def prepare_streams() -> None:
    """Prepare stdin, stdout, stderr and the log. Every command calls it first.

    - A closed stream is connected to /dev/null. Otherwise the next opened file would get the stream's descriptor number
      (0, 1 or 2), and printed text would go into that file.
    - stdout and stderr escape a character that their encoding lacks, instead of raising UnicodeEncodeError.
    - Uncaught exceptions and log warnings are printed with secrets hidden.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LineFormat())
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(hide_secrets_in_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def quoted_parts(text: str) -> list[str]:
    """Return the parts of a string that are in double quotes, straight or typographic, without the quotes.

    A quote after a letter or digit does not open a part, since 24" is a length in inches.
    """
    return [next(filter(None, match.groups())) for match in _QUOTED.finditer(text)]
