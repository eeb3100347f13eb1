"""Files that survive a crash: written and synced before anything refers to them, replaced in one step, checked by SHA-256.

Nothing is buffered here, so that tests can kill a process between any two calls to the operating system.
"""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_TEXT = 1 << 30  # a manifest has some 200 bytes for each tensor of each rank


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`: the operating system may take less at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the device. Raises OSError, FileExistsError among them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends well, and is removed when it does not.

    So whoever reads `path` sees the old contents or the new ones, never half of them. shared: other processes may be writing
    the same file. Without it the temporary path is `.NAME.new`, and the next process uses the one that a killed one left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f".{path.name}.new")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Give `path` other contents in one step; no other process may write it. durable: wait until they are on the device."""
    with atomic_path(path, shared=False) as temporary:
        if durable:
            temporary.unlink(missing_ok=True)
            write_bytes(temporary, data)
        else:
            temporary.write_bytes(data)
    if durable:
        sync(path.parent)


def open_regular(path: Path) -> int:
    """Return a descriptor to read from. Raises OSError for what is no regular file, and never waits for one (a FIFO)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


def read_text(path: Path) -> str:
    """Return the text of a regular file. Raises OSError, and ValueError for what is no UTF-8 or larger than MAX_TEXT."""
    with open(open_regular(path), encoding="utf-8") as file:
        text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it is larger than {MAX_TEXT >> 20} MiB")
    return text


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this process may still write to the file system of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def sha256(path: Path, *, from_device: bool = False) -> str:
    """Return the checksum of a file, as hex; from_device: of what the device returns, not of the copy in memory."""
    with open(open_regular(path), "rb", buffering=0) as file:
        if from_device:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(files: Iterable[tuple[Path, dict[str, Any]]], tell: Callable[[str], None] = lambda _: None) -> str | None:
    """Return what is wrong with the first file that does not agree with its manifest's entry (bytes, sha256), or None.

    tell: gets a word about every file before it is read.
    """
    for path, entry in files:
        tell(f"the checksum of {path.name}")
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{path} does not match its checksum"
    return None
