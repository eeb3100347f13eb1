"""Files that survive a crash: synced before anything refers to them, replaced atomically, verified by SHA-256.

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
    """Size and SHA-256 of a file, as a manifest lists them."""

    bytes: int
    sha256: str


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`; `os.write` may write less at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def no_links(path: str | Path, flags: int) -> int:
    """Open a file of a fixed name, as the `opener` of `open`. Raises OSError for a link and for anything but a regular file.

    Another user who can write to the folder could create a symbolic link to a file of this user, which is then overwritten.
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
    """Write a new file and sync it. Raises OSError, and FileExistsError if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces `path` when the block ends, and is removed when the block raises.

    A reader of `path` sees the old content or the new one, never half of it.

    Args:
        path: the file; its folder is created.
        shared: other processes may write the same file. If False, the temporary path is `.NAME.new`, and the file of a
            killed process is overwritten.
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
    """Yield a new folder to write into. It becomes `path` when the block ends, and is removed when the block raises.

    Raises OSError when `path` is a folder that is not empty by then, as when another process was faster.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the content of a file atomically. No other process may write it. durable: sync it."""
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
    """Give the safetensors files in a folder the permissions that the umask allows; safetensors makes them private."""
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
    """Wait until a file, or the entries of a folder, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this process can still write to the file system of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def sha256(path: Path, *, from_device: bool = False) -> str:
    """Return the SHA-256 of a file, in hex. from_device: read from the device instead of the page cache."""
    with open(open_regular(path), "rb", buffering=0) as file:
        if from_device:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def integrity_error(files: Iterable[tuple[Path, FileEntry]], report: Callable[[str], None] = lambda _: None) -> str | None:
    """Return what is wrong with the first file that does not match its manifest entry, or None.

    `report` is called with a line about every file before it is read.
    """
    for path, entry in files:
        report(f"the checksum of {path.name}")
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, but the manifest states {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{path} does not match its checksum"
    return None
