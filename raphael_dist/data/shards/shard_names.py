"""Expands the patterns of data.shards (braces, globs, URLs) to the paths and URLs of shards."""

import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braceexpand import braceexpand

from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.remote import DEFAULT_RETRY, RemoteError, RetryPolicy
from raphael_dist.data.fetch.shard_cache import ShardError
from raphael_dist.data.shards.skipped import HIDDEN, SkipCounts, is_hidden
from raphael_dist.errors import UserError
from raphael_dist.text import hide_secrets, shorten

_log = logging.getLogger(__name__)
_MAX_SHARDS = 1_000_000
_MAX_DEPTH = 16  # of nested braces
_END = r"(-?\d+|[A-Za-z])"
_BACKWARDS = re.compile(r"\{(\d+)\.\.(\d+)[.}]")
_BRACES = re.compile(rf"(\{{{_END}\.\.{_END}(?:\.\.(-?\d+))?\}}|[{{}},])")


@contextmanager
def name_option(option: str) -> Iterator[None]:
    """Return a context manager that replaces "data.shards" by `option` in messages of UserErrors raised in its block.

    The text is only replaced at the start of a message.

    `option`: the option or setting in which the user named the shards, such as "data.val_shards".
    """
    try:
        yield
    except UserError as error:
        if option == "data.shards" or isinstance(error, ShardError):
            raise
        raise UserError(re.sub(r"^data(\.shards)?(?=[:= ])", option, str(error))) from None


def expand_shards(patterns: Sequence[str], retry: RetryPolicy = DEFAULT_RETRY) -> list[str]:
    """Expand patterns to the paths and URLs of shards (tar files of samples), without duplicates.

    Braces and wildcards in the name of an existing file or folder are taken literally.

    Args:
        patterns: Paths or URLs with braces ("a-{0000..0011}.tar", "{a,b}.tar") and wildcards (*, ?, [...]). Relative paths
            start at the working directory.
        retry: How failed requests to servers are repeated.

    Returns:
        First the paths, sorted, then the URLs, sorted.

    Raises:
        UserError: There is no pattern; a file is missing; wildcards match nothing; or a pattern is a pipe or a URL with an
            unsupported scheme.
    """
    files: dict[Path, Path] = {}
    urls: set[str] = set()
    for pattern in patterns:
        if remote.is_remote(pattern):
            for name in _expand_braces(pattern):
                urls.update(_expand_url(name, retry))
            continue
        folder, rest = _split_existing(_expand_home(pattern, pattern))
        for name in _expand_braces(rest):
            try:
                paths = _expand_path(folder, name, pattern)
            except OSError as error:  # such as a name that is too long
                raise UserError(
                    f"data.shards={shorten(pattern)!r} cannot be read ({error.strerror}). Write the path of existing files "
                    "that you may read."
                ) from None
            for path in paths:
                files.setdefault(path.absolute(), path)
    if not files and not urls:
        raise UserError("data.shards=[] must name at least one shard. Set it, for example to 'data/train-{0000..0011}.tar'.")
    return [*(str(path) for path in sorted(files.values())), *sorted(urls)]


def _expand_braces(pattern: str) -> list[str]:
    """Return the names to which the braces of `pattern` expand by the rules of bash and webdataset.

    Raises UserError if the braces cannot be parsed, a range descends, or there are more than _MAX_SHARDS names.
    """
    try:
        _check_ranges(pattern)
        return list(braceexpand(pattern, escape=False))
    except UserError:
        raise
    except ValueError:
        raise UserError(
            f"data.shards={shorten(pattern)!r} must have matching braces, at most {_MAX_DEPTH} deep, but its braces cannot "
            "be parsed. Use {0000..0011} or {a,b}."
        ) from None


def _check_ranges(pattern: str) -> None:
    """Raise UserError if a range {first..last} descends, or `pattern` expands to more than _MAX_SHARDS names.

    Raises ValueError if the braces are nested too deeply.
    """
    for first, last in _BACKWARDS.findall(pattern):
        if int(first) > int(last):
            raise UserError(
                f"data.shards={pattern!r} must have ascending ranges, but {{{first}..{last}}} is descending. Write "
                f"{{{last}..{first}}}."
            )
    if _count_names(pattern) > _MAX_SHARDS:
        raise UserError(
            f"data.shards={shorten(pattern)!r} must name at most {_MAX_SHARDS} files, but its braces expand to more. Use "
            "fewer braces or shorter ranges."
        )


def _count_names(pattern: str) -> int:
    """Return the number of names that the braces of a pattern expand to, without building the names.

    Raises ValueError if the braces are nested too deeply.
    """
    # For each open brace: the names of its completed alternatives, and those of the current alternative.
    completed, current = [0], [1]
    for brace, first, last, step in _BRACES.findall(pattern):
        if first:
            current[-1] *= _range_length(first, last, step)
        elif brace == "{":
            completed.append(0)
            current.append(1)
        elif len(completed) > 1:
            completed[-1] += current[-1]
            current[-1] = 1
            if brace == "}":
                current.pop()
                current[-1] *= completed.pop()
        if len(completed) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if current[-1] > _MAX_SHARDS:
            break
    return current[-1]


def _range_length(first: str, last: str, step: str) -> int:
    """Return the number of names to which the braces {first..last..step} expand.

    If only one of `first` and `last` is a letter, the braces are not a range, and the result is 1.
    """
    if first.isalpha() != last.isalpha():
        return 1
    width = ord(last) - ord(first) if first.isalpha() else int(last) - int(first)
    return abs(width) // (abs(int(step or 1)) or 1) + 1


def _expand_url(url: str, retry: RetryPolicy) -> list[str]:
    address = hide_secrets(url)  # without the query of an https URL, which begins with ?
    can_list = url.partition(":")[0].lower() not in remote.NO_LISTING
    if not any(char in address for char in ("*[" if can_list else "*")):
        return [url]
    if not can_list:
        raise UserError(
            f"data.shards={address!r} has the wildcard *, which requires a server that lists its files, but a web server "
            "does not list them. Use a range such as part-{00000..00511}.tar."
        )
    try:
        if "*" not in address and _exists_remotely(url, retry):
            return [url]
        matches = _without_hidden(url, remote.matches(url, retry))
    except RemoteError as error:
        raise UserError(f"data.shards={address!r} cannot be listed: {error}. Check the name and your access.") from error
    if not matches:
        raise UserError(f"data.shards={address!r} matches no file. Check the name.")
    return matches


def _without_hidden(pattern: str, matches: Iterable[tuple[str, str]]) -> list[str]:
    """Return the paths or URLs of those files in `matches` that are not hidden, and log the number of hidden files.

    `matches`: (path or URL, path relative to the folder before the first wildcard of `pattern`) of each file. Only the
    relative path is checked, so the user may name a hidden folder in `pattern`.
    """
    names, skipped = [], SkipCounts()
    for name, relative in matches:
        if is_hidden(relative):
            skipped.add(HIDDEN, relative)
        else:
            names.append(name)
    for line in skipped.lines():
        _log.warning("data.shards=%s: skipped: %s", shorten(hide_secrets(pattern)), line)
    return names


def _exists_remotely(url: str, retry: RetryPolicy) -> bool:
    try:
        remote.stat(url, retry)
    except RemoteError as error:
        if not error.final:
            raise
        return False
    return True


def _expand_home(name: str, pattern: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"data.shards={pattern!r} begins with the short form of a home folder, but this folder cannot be determined "
            f"({error}). Write the whole path."
        ) from None


def _split_existing(path: Path) -> tuple[Path, str]:
    """Split a path into its longest leading part that exists, and the rest ("" if all of it exists)."""
    folder, parts = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while parts and _exists(folder / parts[0]):
        folder /= parts.pop(0)
    return folder, "/".join(parts)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # for example a name that is too long
        return False


def _expand_path(folder: Path, name: str, pattern: str) -> list[Path]:
    folder, rest = _split_existing(folder / name if folder.parts else _expand_home(name, pattern))
    path = folder / rest
    if any(char in rest for char in "*?["):
        try:
            files = [match for match in folder.glob(rest) if match.is_file()]
        except ValueError as error:
            raise UserError(
                f"data.shards={pattern!r} must be a valid pattern, but its wildcards are invalid ({error}). Use ** only as "
                "a whole folder name."
            ) from None
        names = _without_hidden(pattern, ((str(file), str(file.relative_to(folder))) for file in files))
        if not names:
            raise UserError(f"data.shards={pattern!r} matches no file in {Path.cwd()}. Check the path.")
        return [Path(name) for name in names]
    if path.is_dir():
        raise UserError(
            f"data.shards={str(path)!r} must name files, but it is a folder. Name its tar files, '{path}/*.tar', or make "
            f"shards from its images with `python tools/prepare_data.py {shlex.quote(str(path))} --out SHARDS`."
        )
    if not path.is_file():
        raise UserError(
            f"data.shards={pattern!r} names the file {str(path)!r}, which is missing. Check the path or the range."
        )
    return [path]
