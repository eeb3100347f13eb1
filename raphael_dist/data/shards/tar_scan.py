"""Finds the samples of one shard and checks each without decoding its pixels.

Shards may come from others and are not trusted. Files in a tar (members) are read by their offset. No member is extracted,
unpickled or executed, and its name is never used as a path. Links and devices are skipped and counted. A .tar.gz is unpacked
first, up to a size limit.
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
MAX_HEADER_BYTES = 1 << 20
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
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_JPEG = b"\xff\xd8"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


# What tarfile raises for damaged headers. It calls itself for each extended header in front of a file.
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class TarHeader(tarfile.TarInfo):
    """The header of a file in a tar. It limits the size of extended headers (pax, long names of GNU) against attacks.

    The standard library's `tarfile` reads extended headers of any size into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "TarHeader":
        """Return the header in `buf`, a block of the tar. ReadError: an extended header of more than 1 MiB follows."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"an extended header has {header.size} bytes, but at most {MAX_HEADER_BYTES} are allowed"
            )
        return header


class DamagedShardError(Exception):
    """A shard (tar file of samples) is cut short, damaged or not a tar file.

    The message states the reason, and the byte position of the damage if it is known.
    """


def expanded_limit(num_bytes: int) -> int:
    """Return how many bytes the content of a compressed file of `num_bytes` bytes may have when it is unpacked.

    The limit is MAX_RATIO (50) times `num_bytes`, but at least SMALL_BYTES (64 MiB) and at most MAX_BYTES (8 GiB).
    """
    return min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * num_bytes))


def gunzip(source: Path, target: Path) -> None:
    """Unpack the gzip file `source` to the file `target`, in blocks.

    Raises:
        DamagedShardError: `source` is not a complete gzip file, or its content is larger than `expanded_limit` allows
            for a file of its size.
    """
    limit = expanded_limit(source.stat().st_size)
    written = 0
    try:
        with gzip.open(source) as packed, open(target, "wb") as plain:
            while piece := packed.read(_PIECE_BYTES):
                written += len(piece)
                if written > limit:
                    raise DamagedShardError(f"expands to more than {limit} bytes; split or gunzip the shard")
                plain.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedShardError(f"is damaged or cut short ({error}); write or copy the shard again") from error


@dataclass(frozen=True)
class TarSample:
    """Where the files of one sample lie in a tar.

    Attributes:
        key: Name of the sample: its files are named KEY.EXT.
        members: (offset, size) in bytes of the content of each of its files, by extension.
        start, end: The bytes from `start` up to `end` of the tar contain all these files and their headers.
    """

    key: str
    members: dict[str, tuple[int, int]]
    start: int
    end: int


def iter_samples(file: io.BufferedReader, skipped: SkipCounts) -> Iterator[TarSample]:
    """Yield the samples of an uncompressed tar. A sample is a group of adjacent files with the same key, as in webdataset.

    A file KEY.EXT belongs to the sample KEY. EXT begins after the first dot of the base name.

    Args:
        file: The tar, open for reading.
        skipped: Object to which the files that belong to no sample are added.

    Raises:
        DamagedShardError: The tar is damaged. The samples before the damage have been yielded.
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
    """Split the name of a file in a tar, KEY.EXT, into (key of its sample, extension in lower case).

    Return None for a file that is not used: a hidden one, or one with an unknown extension.
    """
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
    """Return the content of each file of a sample, by the file's extension.

    Args:
        data: A part of a tar, with the sample's files and their headers.
        key: The key (name) of the sample.

    Raises:
        ValueError: The bytes do not contain this sample.
    """
    members: dict[str, bytes] = {}
    for name, first, size in _headers(data):
        named = key_and_ext(name)
        if named is not None and named[0] == key:
            members.setdefault(named[1], data[first : first + size])
    if not members:
        raise ValueError("the shard no longer has the sample at the byte offset that the index states")
    return members


def _headers(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the content, size) of each regular file in a part of a tar."""
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
        with tarfile.open(fileobj=io.BytesIO(padded), mode="r:", tarinfo=TarHeader) as tar:
            return [member for member in tar if member.isreg() and not member.issparse()]
    except TAR_ERRORS as error:
        raise ValueError(f"the tar headers of the sample cannot be read ({error})") from error


def _tar_members(file: io.BufferedReader, skipped: SkipCounts) -> Iterator[tarfile.TarInfo | None]:
    """Yield the regular files of an uncompressed tar and of tars appended to it, and None at the end of each tar.

    `skipped`: object to which links, devices and sparse files are added.

    Raises:
        DamagedShardError: The file is compressed, cut short or not a tar.
    """
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DamagedShardError(
                f"is compressed ({kind}), but its name does not end in .tar.gz; decompress the shard, or use gzip and the "
                "name ending .tar.gz"
            )
    start: int | None = 0
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=TarHeader) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million of them in memory
                    if member.isreg() and not member.issparse():
                        yield member
                    elif not member.isdir():
                        skipped.add("link, device or sparse file", member.name)
                end = tar.offset
        except TAR_ERRORS as error:
            where = f" from byte {start} on" if start else ""
            raise DamagedShardError(f"is not a complete tar file{where} ({error}); write or copy the shard again") from error
        # tarfile treats a damaged header in the middle, or a cut between two members, as the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise DamagedShardError(f"is damaged or cut short at byte {end}; write or copy the shard again")
        yield None
        start = _next_tar(file.fileno(), end)


def _next_tar(fd: int, at: int) -> int | None:
    """Return where the next of several concatenated tars begins: the first 512-byte block from `at` on that is not zero.

    None: there is no other tar.
    """
    while piece := os.pread(fd, _PIECE_BYTES, at):
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return at + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(piece)
    return None


def check_sample(
    fd: int, sample: TarSample, hash_text: Callable[[bytes], None]
) -> tuple[tuple[int, int], dict[str, object]]:
    """Check that a sample can be used, without decoding the pixels of its image.

    Args:
        fd: File descriptor of the uncompressed tar.
        sample: Where the files of the sample lie in the tar.
        hash_text: Called once with the bytes of the sample's json file followed by those of its txt file.

    Returns:
        - (width, height) of the image in pixels, from its header, after the EXIF rotation;
        - the fields of the sample's json file, and "quoted_text": the number of characters in double quotes in the caption
          (if there are several captions, the smallest of these numbers).

    Raises:
        ValueError: The sample cannot be used; the message is the reason.
    """
    members = sample.members
    for ext, (_, size) in members.items():
        if size > MAX_MEMBER_BYTES:
            raise ValueError(f"the {ext} file has {size} bytes, but at most {MAX_MEMBER_BYTES} are allowed")
    if sample.end - sample.start > MAX_SAMPLE_BYTES:
        num_bytes = sample.end - sample.start
        raise ValueError(f"the sample's files have {num_bytes} bytes, but at most {MAX_SAMPLE_BYTES} are allowed")
    image_ext = next((ext for ext in IMAGE_EXTS if ext in members), None)
    if image_ext is None:
        raise ValueError("no image")
    texts: dict[str, bytes] = {ext: _read(fd, members[ext]) for ext in ("json", "txt") if ext in members}
    hash_text(b"".join(texts.values()))
    meta, captions = read_texts(texts)
    quoted = min(sum(map(len, quoted_parts(caption))) for caption in captions)
    meta.pop(QUOTED_COLUMN, None)  # the new value comes first, since only the first columns of a shard are kept
    return _image_size(fd, members[image_ext]), {QUOTED_COLUMN: quoted, **meta}


def _read(fd: int, span: tuple[int, int], limit: int = MAX_MEMBER_BYTES) -> bytes:
    return os.pread(fd, min(span[1], limit), span[0])


def _image_size(fd: int, span: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the image after its EXIF rotation. `span`: (offset, size) of the image file in the tar.

    Of a JPEG, only the first 64 KiB are read if they contain the header.
    """
    head = _read(fd, span, _HEAD_BYTES)
    if head.startswith(_JPEG) and span[1] > _HEAD_BYTES:
        with contextlib.suppress(Exception):
            return upright_size(head)
    try:
        return upright_size(_read(fd, span))
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
        raise ValueError(f"image header cannot be read ({type(error).__name__})") from error
