"""Files with a checksum, for derived data such as an index: undetected damage in them would change results.

A *sealed* file ends with the 32 bytes of the SHA-256 of the data before them. A sealed folder contains `sums.json`, a sealed
file with the size and SHA-256 of each other file. The CRC-32 of a large file is in a small file next to the large one. After
its start, a process compares a large file with the CRC-32 only once. If a file is damaged, the caller computes the data
again and writes a new file.
"""

import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from raphael_dist.storage.files import atomic_folder, atomic_path, integrity_error, sha256
from raphael_dist.text import open_regular

SUMS = "sums.json"
CRC_SUFFIX = ".crc32"
_DIGEST_BYTES = hashlib.sha256().digest_size
_PIECE_BYTES = 1 << 20
_START_TIME = time.time()  # of this process or, if it was forked, of its parent
_verified: set[tuple[str, int]] = set()  # (path, inode) of the large files that need no further comparison


def write_sealed(path: Path, data: bytes) -> None:
    """Write `data`, followed by the 32 bytes of its SHA-256, as one file. A reader sees the whole file or none.

    Raises OSError if the file cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.write(hashlib.sha256(data).digest())


def read_sealed(path: Path) -> bytes:
    """Return the data of a file that `write_sealed` wrote, without the checksum.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the data do not match the checksum.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read()
    data, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} does not match its checksum")
    return data


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array in NumPy's .npy format, followed by the SHA-256 of these bytes, as one file. Read it by `read_array`.

    Args:
        path: the file.
        values: the array.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_sealed(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """Return the array in a file that `write_array` wrote.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: its bytes do not match the checksum.
    """
    return np.load(io.BytesIO(read_sealed(path)), allow_pickle=False)


@contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """Return a context that yields a temporary folder to write into. When its block ends, the folder is renamed to `folder`.

    Before the rename, a file sums.json with the size and SHA-256 of every file is added. Several processes may write the
    same folder: the files of the first one to finish are used, and the files of the others are discarded.

    Raises:
        OSError: writing failed, and no other process has written the folder.
    """
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
            paths = sorted(temporary.iterdir())
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
            write_sealed(temporary / SUMS, json.dumps(files).encode())
            if not (folder / SUMS).is_file():
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        if not (folder / SUMS).is_file():
            raise


def folder_damage(folder: Path) -> str | None:
    """Return a message about the first missing or damaged file in a folder that `sealed_folder` wrote; None if all match."""
    try:
        files = json.loads(read_sealed(folder / SUMS))
        return integrity_error((folder / name, entry) for name, entry in files.items())
    except FileNotFoundError:
        return f"{folder / SUMS} is missing"
    except (OSError, ValueError) as error:
        return str(error)


def crc_path(path: Path) -> Path:
    """Return the path of the small file with the CRC-32 of the large file `path`."""
    return path.with_name(f".{path.name}{CRC_SUFFIX}")


def write_crc(path: Path, content: Path) -> None:
    """Compute the CRC-32 of the file `content`, and store it as the CRC-32 of `path`, the large file's final path.

    The caller then renames `content` to `path`, which must not exist yet. Raises OSError if the CRC-32 cannot be written.
    """
    with atomic_path(crc_path(path)) as temporary:
        temporary.write_text(f"{_crc(content):08x}\n")


def is_verified(path: Path) -> bool:
    """Return whether this or another process has written or verified the large file `path` since this process started.

    A process that writes or verifies a large file also sets the modification time of the small file with the CRC-32. The
    other processes check this time. So it is enough that one process of a node reads the large file.
    """
    try:
        key = (str(path), path.stat().st_ino)
        if key not in _verified and crc_path(path).stat().st_mtime > _START_TIME:
            _verified.add(key)
    except OSError:
        return False
    return key in _verified


def verify_crc(path: Path) -> bool:
    """Read a large file and compare it with its CRC-32.

    Args:
        path: the file.

    Returns:
        Whether it matches. If so, `is_verified` returns True for it from now on. False if the file is damaged, or if
            the file or its CRC-32 is missing.
    """
    try:
        key = (str(path), path.stat().st_ino)
        if f"{_crc(path):08x}\n" != crc_path(path).read_text():
            return False
    except (OSError, ValueError):
        return False
    _verified.add(key)
    with suppress(OSError):  # the folder may be read-only
        os.utime(crc_path(path), (time.time(), time.time()))
    return True


def _crc(path: Path) -> int:
    crc = 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc
