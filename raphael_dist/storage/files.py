"""Writes files so that they survive a crash: fsync before another file refers to them, atomic replacement, SHA-256.

Writes are not buffered, so that tests can kill a process between any two calls to the operating system.
"""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from raphael_dist.text import open_regular


class FileEntry(TypedDict):
    """A file in a checkpoint's manifest: its size in bytes and its SHA-256 (hex)."""

    bytes: int
    sha256: str


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` to a file descriptor, with as many calls of `os.write` as necessary."""
    while data:
        data = data[os.write(descriptor, data) :]


def no_links(path: str | Path, flags: int) -> int:
    """Open a regular file and return its descriptor; refuse symbolic links. Pass this function as `opener` to `open`.

    Use it for files with a predictable name: another user who can write to the folder could put a symbolic link there, and
    this process would overwrite the file that the link points to. `flags`: the flags for `os.open`.

    Raises:
        OSError: the path is a symbolic link, a folder, a FIFO or a device.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{Path(path).name} is a symbolic link; remove it", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{Path(path).name} is not a regular file; remove it", str(path))
    return descriptor


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` as a new file and fsync it. Raises OSError, such as FileExistsError if `path` exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Return a context that yields a temporary path to write a file to. When its block ends, the file is renamed to `path`.

    If the block raises, the temporary file is removed. A reader of `path` sees the old content or the new one, never a part.

    Args:
        path: the file; its folder is created.
        shared: whether other processes may write the same file at the same time. If not, the temporary file has the fixed
            name `.NAME.new`, so that a file which a killed process has left is reused instead of accumulating.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f".{path.name}.new")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Return a context that yields a new folder to write into. When its block ends, the folder is renamed to `path`.

    If the block raises, the new folder is removed. Raises OSError if `path` is a folder with content when the block ends,
    because another process has written it in the meantime.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the content of a file by `data` atomically. No other process may write the file at the same time.

    `durable`: fsync the file and its folder, so that the new content survives a power failure.
    """
    with atomic_path(path, shared=False) as temporary:
        if durable:
            temporary.unlink(missing_ok=True)
            write_bytes(temporary, data)
        else:
            with open(temporary, "wb", opener=no_links) as file:
                file.write(data)
    if durable:
        sync(path.parent)


def apply_umask(folder: Path) -> None:
    """Set the permissions of all *.safetensors files below `folder` to what the umask allows (0666 minus the umask).

    The safetensors library creates files that only their owner can read.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of files of a folder, is stored on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the free space in bytes, for this user, on the file system that contains `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def sha256(path: Path, *, from_device: bool = False) -> str:
    """Return the SHA-256 of a file's content, in hex. `from_device`: read the file from the disk, not the page cache."""
    with open(open_regular(path), "rb", buffering=0) as file:
        if from_device:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def integrity_error(files: Iterable[tuple[Path, FileEntry]], report: Callable[[str], None] = lambda _: None) -> str | None:
    """Compare the size and SHA-256 of files with those that a manifest lists.

    Args:
        files: (path, manifest entry) of each file.
        report: called with a line of progress before each file is read.

    Returns:
        A message about the first file that is missing or does not match; None if all match.
    """
    for path, entry in files:
        report(f"verifying the checksum of {path.name}")
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, but the manifest states {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{path} does not match its checksum"
    return None
