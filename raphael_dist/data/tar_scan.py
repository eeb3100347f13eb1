"""What is inside one shard: where each sample's members lie, each sample checked without decoding its pixels."""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from raphael_dist.data.captions import read_texts
from raphael_dist.errors import UserError

IMAGE_EXTS = ("webp", "png", "jpg", "jpeg")
EDGE_EXT = "edge.png"
FEATURES_EXT = "features"  # latents, tokens, edges: features.py
EXTS = (*IMAGE_EXTS, "json", "txt", EDGE_EXT, FEATURES_EXT)
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")
MAX_MEMBER_BYTES = 64 << 20
# A gzipped shard may expand to MAX_RATIO times its size, or to SMALL_BYTES where that is more, but never beyond MAX_BYTES.
MAX_RATIO = 50
SMALL_BYTES = 64 << 20
MAX_BYTES = 8 << 30

_HEAD_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def gunzip(source: Path, target: Path) -> None:
    """Expand the gzip file `source` to `target`, a piece at a time.

    UserError: `source` is not a whole gzip file, or expands to more than the limits above (no more than that is written).
    """
    limit = min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * source.stat().st_size))
    written = 0
    try:
        with gzip.open(source) as packed, open(target, "wb") as plain:
            while piece := packed.read(_PIECE_BYTES):
                written += len(piece)
                if written > limit:
                    raise UserError(f"data.shards: {source} expands to more than {limit} bytes; split it, or gunzip it")
                plain.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"data.shards: {source} is damaged or cut short ({error}); write or copy it again") from error


def samples_of(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield (key, {ext: (offset, size)}) of each sample: adjacent members with the same key, by webdataset's naming.

    A member KEY.EXT belongs to the sample KEY; EXT begins at the first dot of the base name. Offsets and sizes are bytes.
    `file` is the plain tar; error messages call it `path`.
    """
    key, members = "", dict[str, tuple[int, int]]()
    for member in _tar_members(path, file):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ext = base.partition(".")
        ext = ext.lower()
        if not stem or not dot or ext not in EXTS:
            continue
        if members and (folder + slash + stem != key or ext in members):
            yield key, members
            members = {}
        key = folder + slash + stem
        members[ext] = (member.offset_data, member.size)
    if members:
        yield key, members


def _tar_members(path: Path, file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """Yield the regular members of a plain tar; UserError if it is compressed, cut short or no tar."""
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"data.shards: {path} is compressed ({kind}); give a plain .tar, or a .tar.gz named so")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million of them in memory
                if member.isreg() and not member.issparse():
                    yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(f"data.shards: {path} is not a whole tar file ({error}); write or copy it again") from error
    # tarfile takes a damaged header in the middle, or a cut between two members, for the end.
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"data.shards: {path} is damaged or cut short at byte {end}; write or copy it again")


def check_sample(fd: int, members: dict[str, tuple[int, int]], seen_text: Callable[[bytes], None]) -> tuple[int, int]:
    """Return (width, height) in pixels of a usable sample; ValueError with the reason if it is not usable.

    `seen_text` is called with the bytes of its json and txt. The size is the one that the json states, else the image
    header's.
    """
    for ext, (_, size) in members.items():
        if size > MAX_MEMBER_BYTES:
            raise ValueError(f"{ext} of {size} bytes, at most {MAX_MEMBER_BYTES} allowed")
    image_ext = next((ext for ext in IMAGE_EXTS if ext in members), None)
    if image_ext is None:
        raise ValueError("no image")
    texts: dict[str, bytes] = {ext: _read(fd, members[ext]) for ext in ("json", "txt") if ext in members}
    seen_text(b"".join(texts.values()))
    meta, _ = read_texts(texts)
    width, height = meta.get("width"), meta.get("height")
    if type(width) is int and type(height) is int and min(width, height) > 0 and max(width, height) < 1 << 24:
        return width, height
    return _image_size(fd, members[image_ext])


def _read(fd: int, span: tuple[int, int], limit: int = MAX_MEMBER_BYTES) -> bytes:
    return os.pread(fd, min(span[1], limit), span[0])


def _image_size(fd: int, span: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) from the image header, read from the first 64 KiB or, failing that, the whole member."""
    for limit in (_HEAD_BYTES, MAX_MEMBER_BYTES):
        try:
            with Image.open(io.BytesIO(_read(fd, span, limit)), formats=IMAGE_FORMATS) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                width, height = (image.height, image.width) if turned else (image.width, image.height)
                if min(width, height) > 0:
                    return width, height
                reason = "image without pixels"
        except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
            reason = f"image header cannot be read ({type(error).__name__})"
    raise ValueError(reason)
