"""Counts the files (in a folder or tar) that are not used as samples, by reason."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

HIDDEN = "hidden file or folder of the system"
_MAX_NAME = 200
_SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "$recycle.bin", "system volume information",
    "lost+found",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Return whether the path `name` contains a hidden file or folder.

    A name that begins with a dot is hidden. So is a folder that operating systems create for thumbnails, deleted files and
    the like, such as __MACOSX.
    """
    parts = [part.lower() for part in name.split("/")]
    return any((part.startswith(".") and part not in (".", "..")) or part in _SYSTEM_FOLDERS for part in parts)


class SkipCounts:
    """Counts the files in a folder or tar that are not used as samples, by reason.

    Attributes:
        counts: A dict. Its keys are the reasons; its values are (number of files, name of the first of them).
    """

    def __init__(self, counts: Mapping[str, tuple[int, str]] | None = None) -> None:
        """Start with `counts`, a dict as the attribute `counts`. None: start with no file."""
        self.counts: dict[str, tuple[int, str]] = {
            str(reason): (int(count), str(first)) for reason, (count, first) in (counts or {}).items()
        }

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count `count` further files that are skipped for `reason`. `name`: name of the first of them."""
        before, first = self.counts.get(reason, (0, name[:_MAX_NAME]))
        self.counts[reason] = (before + count, first)

    def merge(self, other: "SkipCounts", prefix: str = "") -> None:
        """Add the counts of `other` to this object. `prefix`: text to put in front of the file names in `other`."""
        for reason, (count, first) in other.counts.items():
            self.add(reason, f"{prefix}{first}", count)

    def lines(self) -> Iterator[str]:
        """Yield a line of text for each reason: the number of files, the reason, and the name of the first file."""
        for reason, (count, first) in self.counts.items():
            yield f"{count:,} x {reason}, the first {first!r}"


def most_common_reasons(bad: Iterable[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Count unusable samples for each reason why they are unusable. Reasons that differ only in numbers count as one.

    `bad`: (name, reason) of each sample.

    Returns:
        (reason, number of samples, name of the first sample) for each reason, the most frequent one first.
    """
    counts, first = Counter[str](), dict[str, tuple[str, str]]()
    for name, reason in bad:
        kind = re.sub(r"\d+", "0", reason)
        counts[kind] += 1
        first.setdefault(kind, (reason, name))
    return [(first[kind][0], count, first[kind][1]) for kind, count in counts.most_common()]
