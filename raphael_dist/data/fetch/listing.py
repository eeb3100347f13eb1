"""Finds the remote files that match a pattern, by listing one folder after another.

The method `glob` of fsspec is not used: it treats a folder whose listing fails as an empty folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

_WILDCARDS = frozenset("*?[")
_ANY_FOLDERS = "**"


def split_pattern(path: str) -> tuple[str, list[str]]:
    """Split a path at the first part (name between slashes) with a wildcard.

    Returns:
        (the path before this part, which names a folder; the list of this part and all parts after it).
    """
    parts = path.split("/")
    first = next((n for n, part in enumerate(parts) if _WILDCARDS.intersection(part)), len(parts))
    return "/".join(parts[:first]), parts[first:]


def find_files(
    list_folder: Callable[[str], Sequence[Mapping[str, Any]]], folder: str, parts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Find the files below `folder` whose paths match a pattern; yield (path, path relative to `folder`) of each file.

    A file may be yielded more than once.

    Args:
        list_folder: Returns the entries of a folder, as `ls` of fsspec does.
        folder: Path of the folder.
        parts: The parts of the pattern, with wildcards (*, ?, [...]). The part ** matches any number of folders.
    """
    for entry in list_folder(folder):
        path = str(entry["name"]).rstrip("/")
        name = path.rpartition("/")[2]
        if path == folder:  # an empty object that stands for the folder
            continue
        for below in _parts_below(name, parts):
            if not below and entry["type"] != "directory":
                yield str(entry["name"]), name
            elif below and entry["type"] == "directory":
                yield from ((full, f"{name}/{inner}") for full, inner in find_files(list_folder, path, below))


def _parts_below(name: str, parts: Sequence[str]) -> list[Sequence[str]]:
    """Match one entry of a folder with a pattern; return the rest of the pattern, as a list of alternatives.

    An alternative is a list of the parts that must match below the entry; [] if the entry matches the whole pattern. There
    may be several alternatives, since ** matches any number of folders. There are none if the entry does not match.

    Args:
        name: name of the entry, a file or folder.
        parts: the parts of the pattern, which was split at slashes.
    """
    if parts[0] == _ANY_FOLDERS:
        # As the last part, ** matches files of all depths.
        return [parts, *_parts_below(name, parts[1:] or ["*"])]
    return [parts[1:]] if fnmatchcase(name, parts[0]) else []
