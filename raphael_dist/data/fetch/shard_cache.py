"""Provides shards as local tar files: downloads remote shards into a cache folder of limited size, and unpacks .tar.gz.

The processes of a node share the folder. One of them downloads a shard under a lock while the others wait. A file appears
complete or not at all, and has a checksum. A process that starts later compares each file with its checksum before the first
use, and writes a damaged file again. If the folder is full, the least recently used files are deleted; a process that has
such a file open can still read it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.remote import DEFAULT_RETRY, RemoteError, RetryPolicy
from raphael_dist.data.shards.tar_scan import gunzip
from raphael_dist.errors import UserError
from raphael_dist.storage.checksummed import CRC_SUFFIX, crc_path, is_verified, verify_crc, write_crc
from raphael_dist.storage.files import atomic_path, no_links, sha256, write_all
from raphael_dist.text import hide_secrets

if TYPE_CHECKING:
    from raphael_dist.config.data_sections import Data  # not imported at run time: worker processes do not need pydantic

_log = logging.getLogger(__name__)
_HIDDEN_PARTS = re.compile(r"[?#]\(hidden\)|;[^/;=]*=\(hidden\)")  # of an address from `hide_secrets`
_GZIPPED = re.compile(r"(\.tar\.gz|\.tgz)$", re.IGNORECASE)
_CACHE_VERSION = 1
_SHA256 = "sha256:"  # prefix of a mark that is the digest of the plain tar, since the server states none
_STALE_S = 3600.0  # an older temporary file was left by a killed process
_TOUCH_S = 10.0
# A folder that is read-only, or on a file system without locks.
_NO_LOCK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class ShardError(UserError):
    """A shard (tar file of samples) cannot be read. The message states its base name and the reason.

    Attributes:
        shard: Base name of the shard.
        reason: Why it cannot be read.
        absent: Whether the shard does not exist. False: it cannot be reached or stored now, and may exist.
    """

    def __init__(self, name: str, reason: str, absent: bool = False) -> None:
        """Create the error. `name`: path or URL of the shard, or its base name."""
        super().__init__(base_name(name), reason, absent)  # all three: unpickling passes them to __init__
        self.shard, self.reason, self.absent = base_name(name), reason, absent

    def __str__(self) -> str:
        return f"data.shards: {self.shard} cannot be used: {self.reason}"


@dataclass(frozen=True)
class Stamp:
    """Identifies the version of a shard's file. A file whose stamp has changed must be indexed again.

    Attributes:
        num_bytes: Size of the file in bytes.
        mark: A string that changes with the file: the modification time in ns of a local file, the ETag or SHA-256 of a
            remote one; "" if the server states nothing.
    """

    num_bytes: int
    mark: str


@dataclass(frozen=True)
class ShardStore:
    """Provides shards (tar files of samples) as local, uncompressed files.

    It keeps no file open, so it can be sent to other processes.

    Attributes:
        folder: Folder for unpacked copies of local .tar.gz shards, which are never deleted, and for the index (table of all
            samples).
        fetched: Folder for downloaded shards.
        max_bytes: Size limit of `fetched` in bytes.
        retry: How failed requests to servers are repeated.
    """

    folder: Path
    fetched: Path
    max_bytes: int = 64 << 30
    retry: RetryPolicy = DEFAULT_RETRY

    def stamp(self, name: str) -> Stamp:
        """Return size and version of a shard's file as it is now. `name`: path or URL. ShardError: it cannot be read."""
        if remote.is_remote(name):
            try:
                return Stamp(*remote.stat(name, self.retry))
            except RemoteError as error:
                raise ShardError(name, str(error), error.absent) from error
        try:
            status = Path(name).stat()
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            raise ShardError(name, f"{name}: {error.strerror}", absent) from error
        return Stamp(status.st_size, str(status.st_mtime_ns))

    def fetch_new(self, name: str, stamp: Stamp) -> tuple[Stamp, Path]:
        """Fetch a shard that is not indexed yet; return (its stamp, local path of its uncompressed tar).

        `name`: path or URL of the shard. `stamp`: present version of its file, from the method `stamp`. If the server states
        nothing that changes with the file (`stamp.mark` is ""), the shard is always downloaded, and the returned stamp has
        the SHA-256 of the uncompressed tar as its mark. Raises the same errors as `fetch`.
        """
        if stamp.mark:
            return stamp, self.fetch(name, stamp)
        path = self.path(name, stamp)
        path.unlink(missing_ok=True)
        path = self.fetch(name, stamp)
        stamp = Stamp(stamp.num_bytes, _SHA256 + sha256(path))
        final_path = self.path(name, stamp)
        final_path.parent.mkdir(parents=True, exist_ok=True)
        path.replace(final_path)
        crc_path(path).replace(crc_path(final_path))
        return stamp, final_path

    def path(self, name: str, stamp: Stamp) -> Path:
        """Return the path on this machine at which `fetch` stores a shard's uncompressed tar. The file may not exist yet.

        For a local tar it is the path of the tar itself. `name`: path or URL of the shard. `stamp`: the version of its file,
        on which the path of a copy depends.
        """
        plain = plain_name(name)
        if remote.is_remote(name):
            digest = _digest([name, stamp.num_bytes, stamp.mark])
            return self.fetched / digest[:2] / digest[:32] / plain
        if plain == base_name(name):
            return Path(name)
        # The folder depends on the file's state, so that a changed .tar.gz is expanded again.
        digest = _digest([_CACHE_VERSION, str(Path(name).resolve()), stamp.num_bytes, int(stamp.mark)])
        return self.folder / "expanded" / digest[:32] / plain

    def fetch(self, name: str, stamp: Stamp) -> Path:
        """Return the local path of a shard's uncompressed tar, after downloading or unpacking the shard if necessary.

        An existing copy is compared with its checksum before its first use, and is written again if it is damaged.

        Args:
            name: Path or URL of the shard.
            stamp: Expected version of the shard's file.

        Raises:
            ShardError: The shard cannot be read, does not match `stamp` any more, or cannot be written (disk full, ...).
            DamagedShardError: A .tar.gz cannot be unpacked.
            UserError: The shard is larger than data.shard_cache_gb.
        """
        path = self.path(name, stamp)
        if path == Path(name) or is_verified(path):
            return path
        try:
            with _locked(path):
                if not is_verified(path) and not verify_crc(path):
                    if path.exists():
                        _log.warning("%s does not match its checksum or has none. It is fetched or unpacked again", path)
                        path.unlink()
                    (self._download if remote.is_remote(name) else _expand)(name, stamp, path)
        except RemoteError as error:
            raise ShardError(name, str(error), error.absent) from error
        except OSError as error:
            where = error.filename or path
            raise ShardError(name, f"{where}: {error.strerror or error}; check free space and permissions") from error
        return path

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first `num_bytes` bytes of a shard's file as it is stored, perhaps compressed.

        `name`: path or URL of the shard. Raises ShardError if the file cannot be read.
        """
        try:
            if not remote.is_remote(name):
                with open(name, "rb") as file:
                    return file.read(num_bytes)
            size, _ = remote.stat(name, self.retry)
            return b"".join(remote.pieces(name, size, self.retry, until=num_bytes))
        except (OSError, RemoteError) as error:
            raise ShardError(name, getattr(error, "strerror", None) or str(error)) from error

    def open(self, name: str, stamp: Stamp) -> int:
        """Open a shard's uncompressed tar, fetching it if necessary, and return the file descriptor. The caller closes it.

        `name`: path or URL of the shard. `stamp`: expected version of its file. Raises the same errors as `fetch`, and
        ShardError if a local shard does not match `stamp` any more.
        """
        path = self.fetch(name, stamp)
        for is_last in (False, True):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                break
            except FileNotFoundError as error:
                if is_last or path == Path(name):  # otherwise another process may have evicted it between the two calls
                    raise ShardError(
                        name, f"{path} is missing, although it existed when it was indexed. Restore this file"
                    ) from error
                path = self.fetch(name, stamp)
            except OSError as error:
                raise ShardError(
                    name, f"{path}: {error.strerror}, although it was readable when it was indexed. Make it readable again"
                ) from error
        status = os.fstat(descriptor)
        if path == Path(name) and Stamp(status.st_size, str(status.st_mtime_ns)) != stamp:
            os.close(descriptor)
            raise ShardError(name, f"{path} has changed since it was indexed. Start the run again")
        if path != Path(name) and time.time() - status.st_mtime > _TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        return descriptor

    def _download(self, url: str, stamp: Stamp, path: Path) -> None:
        """Download a remote shard to `path`. If the cache folder is full, delete the least recently used shards first."""
        if stamp.num_bytes > self.max_bytes:
            raise UserError(
                f"data.shard_cache_gb={self.max_bytes / 2**30:g} must be large enough for each shard, but "
                f"{hide_secrets(url)} has {stamp.num_bytes / 2**30:.1f} GiB. Raise data.shard_cache_gb."
            )
        self._evict(stamp.num_bytes)
        try:
            self._write(url, stamp, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._evict(self.max_bytes)  # others fill the same disk: evict everything and try once more
            self._write(url, stamp, path)

    def _write(self, url: str, stamp: Stamp, path: Path) -> None:
        with atomic_path(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for piece in remote.pieces(url, stamp.num_bytes, self.retry):
                    write_all(descriptor, memoryview(piece))
            finally:
                os.close(descriptor)
            changed = RemoteError(
                f"{hide_secrets(url)} has changed since it was indexed. Index it again with tools/index_shards.py"
            )
            by_content = stamp.mark.startswith(_SHA256)
            if not by_content and self.stamp(url) != stamp:
                raise changed
            if _GZIPPED.search(base_name(url)):
                plain = temporary.with_name(f"{temporary.name}.tar")
                try:
                    gunzip(temporary, plain)
                    plain.replace(temporary)
                finally:
                    plain.unlink(missing_ok=True)
            if by_content and _SHA256 + sha256(temporary) != stamp.mark:
                raise changed
            write_crc(path, temporary)

    def _evict(self, num_bytes: int) -> None:
        """Delete the least recently used downloaded files until there is room for `num_bytes` more within `max_bytes`."""
        with _locked(self.fetched / "room"):
            files, now = [], time.time()
            for path in self.fetched.glob("*/*/*"):
                with contextlib.suppress(OSError):  # another process removed it
                    status = path.stat()
                    if path.suffix not in (".lock", CRC_SUFFIX) and (
                        path.suffix != ".tmp" or now - status.st_mtime > _STALE_S
                    ):
                        files.append((status.st_mtime, status.st_size, path))
            excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
            for _, size, path in sorted(files):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                crc_path(path).unlink(missing_ok=True)
                excess -= size


def store_of(d: "Data") -> ShardStore:
    """Return the `ShardStore` for the settings of `d`, a configuration's section `data` (cache_dir, shard_cache, ...)."""
    fetched = d.cache_dir / "shards" if d.shard_cache is None else d.shard_cache
    retry = RetryPolicy(d.retries, d.timeout_s)
    return ShardStore(d.cache_dir / "index", fetched, int(d.shard_cache_gb * 2**30), retry)


def base_name(name: str) -> str:
    """Return the last part of a shard's path or URL, without query and parameters: a.tar for https://host/a.tar;v=1?k=1."""
    return PurePosixPath(_HIDDEN_PARTS.sub("", hide_secrets(name)) if "://" in name else name).name


def plain_name(name: str) -> str:
    """Return the base name of a shard without its compression suffix: a.tar for a.tar.gz."""
    return _GZIPPED.sub(".tar", base_name(name))


def _expand(name: str, _: Stamp, path: Path) -> None:
    """Unpack the local .tar.gz `name` to `path`, and write the checksum of the unpacked file next to it."""
    with atomic_path(path) as temporary:
        gunzip(Path(name), temporary)
        write_crc(path, temporary)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file next to `path`, so that only one process of this node runs the block at a time.

    If the file system does not allow a lock, the block runs without it. Two processes may then do the same work, but files
    still appear complete.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "a", opener=no_links))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
        yield


def _digest(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
