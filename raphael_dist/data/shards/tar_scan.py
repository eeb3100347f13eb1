"""Finds the samples of one shard and checks each without decoding its pixels.

Shards are untrusted. They are read as plain tars by offset; a .tar.gz is expanded first, within limits. No member is
extracted, unpickled or executed. Links and devices are skipped and counted. A member's name is never used as a path.
"""

import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raphael_dist.data.captions import read_texts
from raphael_dist.data.image import upright_size
from raphael_dist.data.shards.skipped import HIDDEN, SkipCounts, is_hidden
from raphael_dist.text import quoted_parts

IMAGE_EXTS = ("webp", "png", "jpg", "jpeg")
EDGE_EXT = "edge.png"
FEATURES_EXT = "features"  # latents, tokens and edge maps (features/packing.py)
EXTS = (*IMAGE_EXTS, "json", "txt", EDGE_EXT, FEATURES_EXT)
QUOTED_COLUMN = "quoted_text"  # for filters: characters that a caption has in quotes
MAX_MEMBER_BYTES = 64 << 20
MAX_SAMPLE_BYTES = 256 << 20
# A gzipped shard or a parquet file may expand to MAX_RATIO times its size, or to SMALL_BYTES if that is more, but never
# beyond MAX_BYTES.
MAX_RATIO = 50
SMALL_BYTES = 64 << 20
MAX_BYTES = 8 << 30

_HEAD_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_REGULAR = (b"0", b"\0")
_JPEG = b"\xff\xd8"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedShardError(Exception):
    """A shard that ends too early or is not a tar; the text has the place and the reason."""


def expanded_limit(num_bytes: int) -> int:
    """Return the bytes that a compressed file of `num_bytes` may expand to."""
    return min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * num_bytes))


def gunzip(source: Path, target: Path) -> None:
    """Expand the gzip file `source` to `target` in pieces.

    Raises:
        DamagedShardError: `source` is not a complete gzip file or expands beyond the limit; no more than that is written.
    """
    limit = expanded_limit(source.stat().st_size)
    written = 0
    try:
        with gzip.open(source) as packed, open(target, "wb") as plain:
            while piece := packed.read(_PIECE_BYTES):
                written += len(piece)
                if written > limit:
                    raise DamagedShardError(f"expands to more than {limit} bytes; split it, or gunzip it")
                plain.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedShardError(f"is damaged or cut short ({error}); write or copy it again") from error


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar.

    members: (offset, size) in bytes of each member's data, by extension. start, end: bytes from the first header on.
    """

    key: str
    members: dict[str, tuple[int, int]]
    start: int
    end: int


def iter_samples(file: io.BufferedReader, skipped: SkipCounts) -> Iterator[TarSample]:
    """Yield the samples of a plain tar: adjacent members with the same key, by the naming of webdataset.

    A member KEY.EXT belongs to the sample KEY; EXT begins at the first dot of the base name.

    Args:
        skipped: Receives the members that belong to no sample.

    Raises:
        DamagedShardError: The tar is damaged; the samples before the damage were yielded.
    """
    key, members, start, end = "", dict[str, tuple[int, int]](), 0, 0
    for member in _tar_members(file, skipped):
        named = ("", "") if member is None else key_and_ext(member.name)
        if named is None:
            assert member is not None
            skipped.add(_skip_reason(member.name), member.name)
            continue
        if members and (named[0] != key or named[1] in members):
            yield TarSample(key, members, start, end)
            members = {}
        if member is None:
            continue
        if not members:
            start = member.offset
        key, end = named[0], member.offset_data + member.size
        members[named[1]] = (member.offset_data, member.size)


def key_and_ext(name: str) -> tuple[str, str] | None:
    """Return the key and the extension of a member's name; None for a member that is not used."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    ext = ext.lower()
    return (folder + slash + stem, ext) if stem and dot and ext in EXTS and not is_hidden(name) else None


def _skip_reason(name: str) -> str:
    if is_hidden(name):
        return HIDDEN
    if name.lower().endswith(tuple(f".{ext}" for ext in EXTS)):
        return "member with a dot in its key: a name KEY.EXT may have only one dot before EXT; rename it"
    return "member that is not an image, a text or an edge map"


def members_of(data: bytes, key: str) -> dict[str, bytes]:
    """Return {ext: data} of the sample `key`, given the bytes of its headers and members.

    Raises:
        ValueError: The bytes hold no such sample.
    """
    members: dict[str, bytes] = {}
    for name, first, size in _headers(data):
        named = key_and_ext(name)
        if named is not None and named[0] == key:
            members.setdefault(named[1], data[first : first + size])
    if not members:
        raise ValueError("it is not where it was indexed")
    return members


def _headers(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte, size) of the regular members in a part of a tar."""
    at, end = 0, len(data)
    while at + tarfile.BLOCKSIZE <= end:
        head = data[at : at + tarfile.BLOCKSIZE]
        # This loop reads plain headers, as webdataset writes them; tarfile reads all kinds and takes ten times as long.
        if head[156:157] not in _REGULAR or head[257:262] != b"ustar" or head[345] or not head[124:135].isdigit():
            yield from ((m.name, at + m.offset_data, m.size) for m in _other_headers(data[at:]))
            return
        size = int(head[124:135], 8)
        name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        yield name, at + tarfile.BLOCKSIZE, size
        at += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _other_headers(data: bytes) -> list[tarfile.TarInfo]:
    padded = data + bytes(-len(data) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    try:
        with tarfile.open(fileobj=io.BytesIO(padded), mode="r:") as tar:
            return [member for member in tar if member.isreg() and not member.issparse()]
    except (tarfile.TarError, OverflowError) as error:
        raise ValueError(f"its headers cannot be read ({error})") from error


def _tar_members(file: io.BufferedReader, skipped: SkipCounts) -> Iterator[tarfile.TarInfo | None]:
    """Yield the regular members of a plain tar and of tars appended to it, and None at the end of each tar.

    Raises:
        DamagedShardError: The file is compressed, cut short or not a tar.
    """
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DamagedShardError(f"is compressed ({kind}); use a plain .tar, or a file with the suffix .tar.gz")
    start: int | None = 0
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million of them in memory
                    if member.isreg() and not member.issparse():
                        yield member
                    elif not member.isdir():
                        skipped.add("link, device or sparse file", member.name)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            where = f" from byte {start} on" if start else ""
            raise DamagedShardError(f"is not a complete tar file{where} ({error}); write or copy it again") from error
        # tarfile treats a damaged header in the middle, or a cut between two members, as the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise DamagedShardError(f"is damaged or cut short at byte {end}; write or copy it again")
        yield None
        start = _next_tar(file.fileno(), end)


def _next_tar(fd: int, at: int) -> int | None:
    """Return the offset of the first block from `at` on that is not zeros: the next of several concatenated tars."""
    while piece := os.pread(fd, _PIECE_BYTES, at):
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return at + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(piece)
    return None


def check_sample(
    fd: int, sample: TarSample, hash_text: Callable[[bytes], None]
) -> tuple[tuple[int, int], dict[str, object]]:
    """Check that a sample is usable.

    Args:
        fd: Descriptor of the plain tar.
        hash_text: Called with the bytes of the sample's json and txt.

    Returns:
        (width, height) in pixels by the image header, after the EXIF rotation, and the fields of the json with the
        characters in quotes (of the caption that has the fewest).

    Raises:
        ValueError: The sample is not usable; the text is the reason.
    """
    members = sample.members
    for ext, (_, size) in members.items():
        if size > MAX_MEMBER_BYTES:
            raise ValueError(f"{ext} has {size} bytes, but at most {MAX_MEMBER_BYTES} are allowed")
    if sample.end - sample.start > MAX_SAMPLE_BYTES:
        raise ValueError(f"its members span {sample.end - sample.start} bytes, but at most {MAX_SAMPLE_BYTES} are allowed")
    image_ext = next((ext for ext in IMAGE_EXTS if ext in members), None)
    if image_ext is None:
        raise ValueError("no image")
    texts: dict[str, bytes] = {ext: _read(fd, members[ext]) for ext in ("json", "txt") if ext in members}
    hash_text(b"".join(texts.values()))
    meta, captions = read_texts(texts)
    quoted = min(sum(map(len, quoted_parts(caption))) for caption in captions)
    meta.pop(QUOTED_COLUMN, None)  # first, since a shard may have more columns than are kept
    return _image_size(fd, members[image_ext]), {QUOTED_COLUMN: quoted, **meta}


def _read(fd: int, span: tuple[int, int], limit: int = MAX_MEMBER_BYTES) -> bytes:
    return os.pread(fd, min(span[1], limit), span[0])


def _image_size(fd: int, span: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the upright image, of a JPEG from its first 64 KiB where they hold the header."""
    head = _read(fd, span, _HEAD_BYTES)
    if head.startswith(_JPEG) and span[1] > _HEAD_BYTES:
        with contextlib.suppress(Exception):
            return upright_size(head)
    try:
        return upright_size(_read(fd, span))
    except ValueError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
        raise ValueError(f"image header cannot be read ({type(error).__name__})") from error
