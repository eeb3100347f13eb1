"""What is inside one shard: where each sample lies, each sample checked without decoding its pixels.

Shards are untrusted. They are read as plain tars by offset; a .tar.gz becomes one first, within bounds. No member is
extracted, unpickled or run; links and devices are passed over; a member's name is never used as a path.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from raphael_dist.data.captions import read_texts

IMAGE_EXTS = ("webp", "png", "jpg", "jpeg")
EDGE_EXT = "edge.png"
FEATURES_EXT = "features"  # latents, tokens, edges: features.py
EXTS = (*IMAGE_EXTS, "json", "txt", EDGE_EXT, FEATURES_EXT)
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")
MAX_MEMBER_BYTES = 64 << 20
MAX_SAMPLE_BYTES = 256 << 20
# A gzipped shard may expand to MAX_RATIO times its size, or to SMALL_BYTES where that is more, but never beyond MAX_BYTES.
MAX_RATIO = 50
SMALL_BYTES = 64 << 20
MAX_BYTES = 8 << 30

_HEAD_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_REGULAR = (b"0", b"\0")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedError(Exception):
    """A shard that ends too early or is no tar; the text says where and why."""


def gunzip(source: Path, target: Path) -> None:
    """Expand the gzip file `source` to `target`, a piece at a time.

    DamagedError: `source` is not a whole gzip file, or expands to more than the limits above (no more than that is written).
    """
    limit = min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * source.stat().st_size))
    written = 0
    try:
        with gzip.open(source) as packed, open(target, "wb") as plain:
            while piece := packed.read(_PIECE_BYTES):
                written += len(piece)
                if written > limit:
                    raise DamagedError(f"expands to more than {limit} bytes; split it, or gunzip it")
                plain.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedError(f"is damaged or cut short ({error}); write or copy it again") from error


@dataclass(frozen=True)
class FoundSample:
    """A sample of a tar: {ext: (offset, size)} of its members' data, and the stretch from its first header on, in bytes."""

    key: str
    members: dict[str, tuple[int, int]]
    start: int
    end: int


def samples_of(file: io.BufferedReader) -> Iterator[FoundSample]:
    """Yield the samples of a plain tar: adjacent members with the same key, by webdataset's naming.

    A member KEY.EXT belongs to the sample KEY; EXT begins at the first dot of the base name. DamagedError once the samples
    before the damage were given.
    """
    key, members, start, end = "", dict[str, tuple[int, int]](), 0, 0
    for member in _tar_members(file):
        named = key_and_ext(member.name)
        if named is None:
            continue
        if members and (named[0] != key or named[1] in members):
            yield FoundSample(key, members, start, end)
            members = {}
        if not members:
            start = member.offset
        key, end = named[0], member.offset_data + member.size
        members[named[1]] = (member.offset_data, member.size)
    if members:
        yield FoundSample(key, members, start, end)


def key_and_ext(name: str) -> tuple[str, str] | None:
    """Return the key and the extension of a member's name; None for a member that is not used."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    ext = ext.lower()
    return (folder + slash + stem, ext) if stem and dot and ext in EXTS else None


def members_of(stretch: bytes, key: str) -> dict[str, bytes]:
    """Return {ext: data} of the sample `key`, whose headers and members are `stretch`; ValueError: it is not there."""
    found: dict[str, bytes] = {}
    for name, first, size in _headers(stretch):
        named = key_and_ext(name)
        if named is not None and named[0] == key:
            found.setdefault(named[1], stretch[first : first + size])
    if not found:
        raise ValueError("it is not where it was indexed")
    return found


def _headers(stretch: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte, size) of the regular members in a stretch of a tar."""
    at, end = 0, len(stretch)
    while at + tarfile.BLOCKSIZE <= end:
        head = stretch[at : at + tarfile.BLOCKSIZE]
        # Plain headers, as webdataset writes them, are read here; tarfile takes ten times as long and knows all others.
        if head[156:157] not in _REGULAR or head[257:262] != b"ustar" or head[345] or not head[124:135].isdigit():
            yield from ((m.name, at + m.offset_data, m.size) for m in _other_headers(stretch[at:]))
            return
        size = int(head[124:135], 8)
        name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        yield name, at + tarfile.BLOCKSIZE, size
        at += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _other_headers(stretch: bytes) -> list[tarfile.TarInfo]:
    padded = stretch + bytes(-len(stretch) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    try:
        with tarfile.open(fileobj=io.BytesIO(padded), mode="r:") as tar:
            return [member for member in tar if member.isreg() and not member.issparse()]
    except (tarfile.TarError, OverflowError) as error:
        raise ValueError(f"its headers cannot be read ({error})") from error


def _tar_members(file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """Yield the regular members of a plain tar; DamagedError if it is compressed, cut short or no tar."""
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DamagedError(f"is compressed ({kind}); give a plain .tar, or a .tar.gz named so")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million of them in memory
                if member.isreg() and not member.issparse():
                    yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DamagedError(f"is not a whole tar file ({error}); write or copy it again") from error
    # tarfile takes a damaged header in the middle, or a cut between two members, for the end.
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise DamagedError(f"is damaged or cut short at byte {end}; write or copy it again")


def check_sample(fd: int, sample: FoundSample, seen_text: Callable[[bytes], None]) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return (width, height) in pixels of a usable sample and what its json holds; ValueError: it is not usable, and why.

    `seen_text` is called with the bytes of its json and txt. The size is the one that the json states, else the image
    header's.
    """
    members = sample.members
    for ext, (_, size) in members.items():
        if size > MAX_MEMBER_BYTES:
            raise ValueError(f"{ext} of {size} bytes, at most {MAX_MEMBER_BYTES} allowed")
    if sample.end - sample.start > MAX_SAMPLE_BYTES:
        raise ValueError(f"its members lie {sample.end - sample.start} bytes apart, at most {MAX_SAMPLE_BYTES} allowed")
    image_ext = next((ext for ext in IMAGE_EXTS if ext in members), None)
    if image_ext is None:
        raise ValueError("no image")
    texts: dict[str, bytes] = {ext: _read(fd, members[ext]) for ext in ("json", "txt") if ext in members}
    seen_text(b"".join(texts.values()))
    meta, _ = read_texts(texts)
    width, height = meta.get("width"), meta.get("height")
    if type(width) is int and type(height) is int and min(width, height) > 0 and max(width, height) < 1 << 24:
        return (width, height), meta
    return _image_size(fd, members[image_ext]), meta


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
