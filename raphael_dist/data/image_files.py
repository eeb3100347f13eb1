"""Finds the images in a folder, and the files with their captions."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from raphael_dist.data.folder_files import ARCHIVE_SUFFIXES
from raphael_dist.data.image import IMAGE_SUFFIXES
from raphael_dist.data.shards.skipped import HIDDEN, SkipCounts, is_hidden
from raphael_dist.data.shards.tar_scan import EDGE_EXT

UNSUPPORTED_SUFFIXES = {
    ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpeg2000", ".psd", ".ico",
    ".svg", ".tga", ".exr", ".dng", ".cr2", ".nef", ".arw",
}  # fmt: skip
_TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow"}  # captions and tables


def image_files(folder: Path, files: Sequence[Path]) -> tuple[list[Path], SkipCounts]:
    """Return (paths of the images in a folder; counts of the files that are not used, by reason).

    `files`: all files in `folder` and its subfolders. A symbolic link to a file is used; a symbolic link to a folder is not
    followed. An edge map NAME.edge.png is in neither result.
    """
    paths, skipped = [], SkipCounts()
    captioned = {path.with_suffix("") for path in files if path.suffix.lower() in (".txt", ".json")}
    for path in files:
        name, reason = str(path.relative_to(folder)), _skip_reason(path, captioned)
        is_image = reason or path.suffix.lower() in IMAGE_SUFFIXES
        if is_hidden(name):
            if is_image and path.is_file():
                skipped.add(HIDDEN, name)
        elif path.is_symlink() and path.is_dir():
            skipped.add("linked folder; copy its files, or prepare it separately", name)
        elif not is_image or name.lower().endswith(f".{EDGE_EXT}"):
            continue
        elif not path.is_file():
            if path.is_symlink():
                skipped.add("broken link", name)
        elif reason:
            skipped.add(reason, name)
        else:
            paths.append(path)
    return paths, skipped


def _skip_reason(path: Path, captioned: Container[Path]) -> str:
    """Return why a file that may be meant as an image is not used; "" if it is used, or is not meant as an image.

    `captioned`: paths of the caption files of the folder, without their suffix.
    """
    suffix, inner = path.suffix.lower(), {part.lower() for part in path.suffixes[:-1]}
    supported = ", ".join(IMAGE_SUFFIXES)
    if suffix in UNSUPPORTED_SUFFIXES:
        return f"image in another format than {supported}; convert it"
    if suffix in ARCHIVE_SUFFIXES:
        return "archive in a folder of images; unpack it, or prepare it separately"
    if suffix in IMAGE_SUFFIXES or suffix in _TEXT_SUFFIXES:
        return ""
    if path.with_suffix("") in captioned or path in captioned or inner & {*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES}:
        return f"file with a caption or an image's suffix, whose name does not end in {supported}; rename or convert it"
    return ""


class CaptionFiles:
    """Finds the caption file of an image: for a.png it is a.txt, a.TXT or a.png.txt (or the same names with json)."""

    def __init__(self, files: Iterable[Path], suffix: str) -> None:
        """Select the caption files of a folder: those of `files` whose names end in `suffix` (".txt" or ".json").

        Upper and lower case are not distinguished.
        """
        self._by_stem = {path.with_suffix(""): path for path in files if path.suffix.lower() == suffix and path.is_file()}

    def of(self, image: Path) -> Path | None:
        """Return the file with the captions of an image; None if it has none."""
        return self._by_stem.get(image.with_suffix("")) or self._by_stem.get(image)
