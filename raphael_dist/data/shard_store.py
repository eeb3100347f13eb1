"""How shards are reached: as local files, or through a bounded folder of what was fetched or expanded.

Processes of one node share the folder: a lock per shard lets one of them fetch it while the others wait, and a file appears
whole or not at all. What was used longest ago makes room; whoever has it open reads on.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raphael_dist.data import remote
from raphael_dist.data.remote import PATIENCE, Patience, RemoteError, shown
from raphael_dist.data.tar_scan import gunzip
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path, write_all

if TYPE_CHECKING:
    from raphael_dist.config import Data  # worker processes do without pydantic

_GZIPPED = re.compile(r"(\.tar\.gz|\.tgz)$", re.IGNORECASE)
_CACHE_VERSION = 1
_STALE_S = 3600.0  # a temporary file that old is of a process that was killed
_TOUCH_S = 10.0


class ShardError(UserError):
    """A shard that cannot be read as a whole: `shard` (base name) and `reason` say which and why."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(shard, reason)  # both, so that it can be sent to another process
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        return f"data.shards: {self.shard}: {self.reason}"


@dataclass(frozen=True)
class Stamp:
    """What a shard's source looked like: its size in bytes, and what changes when it changes (mtime in ns, ETag)."""

    num_bytes: int
    mark: str


@dataclass(frozen=True)
class ShardStore:
    """Gives local files for shards. Holds no open file, so that it can be sent to other processes.

    folder: where gzipped local shards are expanded to, for good; None: they are refused. fetched: where remote shards are
    kept, at most `max_bytes` of them.
    """

    folder: Path | None = None
    fetched: Path | None = None
    max_bytes: int = 64 << 30
    patience: Patience = PATIENCE

    def stamp(self, name: str) -> Stamp:
        """Return what the shard `name` (path or URL) looks like now. ShardError: it is not there, or not readable."""
        if remote.is_remote(name):
            try:
                return Stamp(*remote.stat(name, self.patience))
            except RemoteError as error:
                raise ShardError(base_name(name), str(error)) from error
        try:
            status = Path(name).stat()
        except OSError as error:
            raise ShardError(base_name(name), f"{name}: {error.strerror}") from error
        return Stamp(status.st_size, str(status.st_mtime_ns))

    def path(self, name: str, stamp: Stamp) -> Path:
        """Return where the plain tar of a shard lies on this machine, or will lie once it is there."""
        plain = _GZIPPED.sub(".tar", base_name(name))
        if remote.is_remote(name):
            if self.fetched is None:
                raise UserError(f"data.shards: {shown(name)} is remote and there is no cache folder to fetch it to")
            digest = _digest([name, stamp.num_bytes, stamp.mark])
            return self.fetched / digest[:2] / digest[:32] / plain
        if plain == base_name(name):
            return Path(name)
        if self.folder is None:
            raise UserError(f"data.shards: {name} is gzipped and there is no cache folder to expand it in; gunzip it")
        # The folder follows the file, so that a changed .tar.gz is expanded anew; the base name is the plain tar's.
        digest = _digest([_CACHE_VERSION, str(Path(name).resolve()), stamp.num_bytes, int(stamp.mark)])
        return self.folder / "expanded" / digest[:32] / plain

    def bring(self, name: str, stamp: Stamp) -> Path:
        """Return the local path of a shard's plain tar, fetched or expanded first if need be.

        ShardError: it cannot be read, has changed since `stamp`, or does not fit into the folder. DamagedError: not gzip.
        """
        path = self.path(name, stamp)
        if path == Path(name) or path.is_file():
            return path
        try:
            if remote.is_remote(name):
                with _locked(path):
                    if not path.is_file():
                        self._fetch(name, stamp, path)
            else:
                with atomic_path(path) as temporary:
                    gunzip(Path(name), temporary)
        except RemoteError as error:
            raise ShardError(base_name(name), str(error)) from error
        except OSError as error:
            where = error.filename or path
            raise ShardError(base_name(name), f"{where}: {error.strerror or error}; check room and rights") from error
        return path

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a shard's source. ShardError: it cannot be read."""
        try:
            if not remote.is_remote(name):
                with open(name, "rb") as file:
                    return file.read(num_bytes)
            size, _ = remote.stat(name, self.patience)
            return b"".join(remote.pieces(name, min(num_bytes, size), self.patience))
        except (OSError, RemoteError) as error:
            raise ShardError(base_name(name), getattr(error, "strerror", None) or str(error)) from error

    def open(self, name: str, stamp: Stamp) -> int:
        """Return a descriptor of a shard's plain tar; the caller closes it. Raises as `bring` does."""
        path = self.bring(name, stamp)
        for last in (False, True):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                break
            except FileNotFoundError as error:
                if last or path == Path(name):  # another process may have made room between the two calls
                    raise ShardError(base_name(name), f"{path}: is gone; it was there when it was indexed") from error
                path = self.bring(name, stamp)
            except OSError as error:
                raise ShardError(
                    base_name(name), f"{path}: {error.strerror}; it was readable when it was indexed"
                ) from error
        status = os.fstat(descriptor)
        if path == Path(name) and Stamp(status.st_size, str(status.st_mtime_ns)) != stamp:
            os.close(descriptor)
            raise ShardError(base_name(name), f"{path} has changed since it was indexed; start again")
        if path != Path(name) and time.time() - status.st_mtime > _TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        return descriptor

    def _fetch(self, url: str, stamp: Stamp, path: Path) -> None:
        """Write a remote shard to `path`; room is made first."""
        if stamp.num_bytes > self.max_bytes:
            limit = f"data.shard_cache_gb={self.max_bytes / 2**30:g}"
            raise UserError(f"{limit} is too little for {shown(url)}, which has {stamp.num_bytes} bytes; raise it")
        self._make_room(stamp.num_bytes)
        try:
            self._write(url, stamp, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._make_room(self.max_bytes)  # others fill the same disk: everything goes, and once more
            self._write(url, stamp, path)

    def _write(self, url: str, stamp: Stamp, path: Path) -> None:
        with atomic_path(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for piece in remote.pieces(url, stamp.num_bytes, self.patience):
                    write_all(descriptor, memoryview(piece))
            finally:
                os.close(descriptor)
            if self.stamp(url) != stamp:
                raise RemoteError(f"{shown(url)} has changed since it was indexed; index it again")
            if _GZIPPED.search(base_name(url)):
                plain = temporary.with_name(f"{temporary.name}.tar")
                try:
                    gunzip(temporary, plain)
                    plain.replace(temporary)
                finally:
                    plain.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the files used longest ago until `num_bytes` more fit below the limit."""
        assert self.fetched is not None
        with _locked(self.fetched / "room"):
            found, now = [], time.time()
            for path in self.fetched.glob("*/*/*"):
                with contextlib.suppress(OSError):  # another process removed it
                    status = path.stat()
                    if path.suffix != ".lock" and (path.suffix != ".tmp" or now - status.st_mtime > _STALE_S):
                        found.append((status.st_mtime, status.st_size, path))
            excess = sum(size for _, size, _ in found) + num_bytes - self.max_bytes
            for _, size, path in sorted(found):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                excess -= size


def store_of(d: "Data") -> ShardStore:
    """Return how the shards of a configuration are reached."""
    fetched = d.cache_dir / "shards" if d.shard_cache is None else d.shard_cache
    patience = Patience(d.retries, d.timeout_s)
    return ShardStore(d.cache_dir / "index", fetched, int(d.shard_cache_gb * 2**30), patience)


def base_name(name: str) -> str:
    """Return the last part of a path or URL."""
    return PurePosixPath(shown(name)).name


def plain_name(name: str) -> str:
    """Return the base name that the shard has as a plain tar."""
    return _GZIPPED.sub(".tar", base_name(name))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside `path` that other processes of this node respect."""
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
