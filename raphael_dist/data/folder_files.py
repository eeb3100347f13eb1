"""Lists the files in a folder of the user, and counts those that may be meant as input but are not used."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from raphael_dist.data.shards.skipped import HIDDEN, SkipCounts, is_hidden
from raphael_dist.errors import UserError

ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".zip", ".7z", ".rar")
_CAPTION_SUFFIXES = (".txt", ".json")


def files_below(folder: Path) -> list[Path]:
    """Return the paths of the files in a folder and its subfolders, sorted.

    A symbolic link to a folder is in the result, but the files in the linked folder are not. Raises UserError if a folder
    cannot be listed, unless it is a hidden subfolder (`is_hidden`).
    """

    def stop(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder or not is_hidden(str(path.relative_to(folder))):
            raise UserError(
                f"{path} must be a folder that can be listed, but listing it failed ({error.strerror}). Change its "
                f"permissions, or move it out of {folder}."
            ) from error

    paths = []
    for root, folders, files in os.walk(folder, onerror=stop):
        paths += [Path(root, name) for name in files]
        paths += [path for path in (Path(root, name) for name in folders) if path.is_symlink()]
    return sorted(paths)


def count_unused_archives(folder: Path, files: Iterable[Path], shards: Iterable[str]) -> SkipCounts:
    """Count, by reason, the archives in a folder that are not used as shards.

    Args:
        folder: The folder.
        files: Paths of all files in the folder and its subfolders.
        shards: Paths of the archives that are used as shards.
    """
    used, skipped = {Path(shard) for shard in shards}, SkipCounts()
    for path in files:
        if path in used or not path.name.lower().endswith(ARCHIVE_SUFFIXES):
            continue
        name = str(path.relative_to(folder))
        if is_hidden(name):
            skipped.add(HIDDEN, name)
        elif path.parent != folder:
            skipped.add("archive in a subfolder; move it, or name its shards as SOURCE, such as 'FOLDER/*/*.tar'", name)
        else:
            skipped.add("archive whose name does not end in .tar, .tar.gz or .tgz; rename or convert it", name)
    return skipped


def count_texts_without_image(folder: Path, files: Sequence[Path]) -> SkipCounts:
    """Count the .txt and .json files in a folder that have no image. For example, a.txt and a.png.txt belong to a.png.

    `files`: paths of all files in `folder` and its subfolders.
    """
    skipped = SkipCounts()
    others = [path for path in files if path.suffix.lower() not in _CAPTION_SUFFIXES]
    named = {*others, *(path.with_suffix("") for path in others)}
    for path in files:
        name = str(path.relative_to(folder))
        if path.suffix.lower() in _CAPTION_SUFFIXES and path.with_suffix("") not in named and not is_hidden(name):
            skipped.add("txt or json without an image of the same name", name)
    return skipped
