"""Reading files of https://, s3://, gs://, hf:// and whatever else fsspec opens: whole, in pieces, with retries.

Credentials and endpoints come from where each service's library looks for them (AWS_*, HF_TOKEN, ...), never from here, and
what a URL may hold of them (user:password@, ?signature) is not shown in messages.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from raphael_dist.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs")
NO_LISTING = ("http", "https")
PIECE_BYTES = 16 << 20
_FINAL = {400, 401, 403, 404, 410}  # answers that asking again does not change
_MAX_PAUSE_S = 30.0


class RemoteError(Exception):
    """A remote file that could not be read; the text says why, without secrets. `final`: asking again is of no use."""

    def __init__(self, text: str, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


@dataclass(frozen=True)
class Patience:
    """How often a request is made again, after a pause that doubles, and how long one may take."""

    retries: int = 5
    timeout_s: float = 60.0
    pause_s: float = 0.5


PATIENCE = Patience()


def is_remote(name: str) -> bool:
    """Return whether a name is a URL that is read here; UserError: a scheme that is not."""
    match = _SCHEME.match(name)
    if match is None:
        return False
    if match[1].lower() not in SCHEMES or not name[match.end() :].startswith("//"):
        raise UserError(
            f"data.shards: {shown(name)!r} is a URL or a pipe that is not read; allowed: paths, and {'://, '.join(SCHEMES)}://"
        )
    return True


def shown(name: str) -> str:
    """Return a URL without what may be secret in it; a path as it is."""
    if "://" not in name:
        return name
    scheme, _, rest = name.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def stat(url: str, patience: Patience) -> tuple[int, str]:
    """Return a file's size in bytes, and a stamp that is another when it changes (ETag, generation or time)."""

    def ask(fs: Any, path: str, more: dict[str, Any]) -> dict[str, Any]:
        fs.invalidate_cache()  # hf:// remembers what a file was like, whatever use_listings_cache says
        found: dict[str, Any] = fs.info(path, **more)
        return found

    info = _again(url, patience, ask)
    if not isinstance(size := info.get("size"), int):
        raise RemoteError(f"{shown(url)}: the server does not state its size")
    names = ("ETag", "etag", "generation", "blob_id", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime")
    lfs = info.get("lfs") or {}
    stamps = [lfs.get("sha256") if isinstance(lfs, dict) else None, *(info.get(name) for name in names)]
    return size, next((str(stamp) for stamp in stamps if stamp), "")


def pieces(url: str, size: int, patience: Patience) -> Iterator[bytes]:
    """Yield the `size` bytes of a file in pieces, each asked for again when it fails. RemoteError: it stays unreadable."""
    for start in range(0, size, PIECE_BYTES):
        yield read(url, start, min(size, start + PIECE_BYTES), size, patience)


def read(url: str, start: int, end: int, size: int, patience: Patience) -> bytes:
    """Return bytes start .. end - 1 of a file of `size` bytes. RemoteError: it cannot be read."""

    def part(fs: Any, path: str, more: dict[str, Any]) -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=end, **more))
        if len(data) == size:  # a server that knows no ranges gives everything
            data = data[start:end]
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came, {end - start} were asked for")
        return data

    return _again(url, patience, part)


def matches(pattern: str, patience: Patience) -> list[str]:
    """Return the files that a URL with wildcards names."""
    found = _again(pattern, patience, lambda fs, path, more: [fs.unstrip_protocol(p) for p in fs.glob(path, **more)])
    return sorted(found)


def _again(url: str, patience: Patience, request: Callable[[Any, str, dict[str, Any]], T]) -> T:
    """Return what `request` (file system, path, options) returns, asked again while there is hope."""
    pause = patience.pause_s
    for attempt in range(patience.retries + 1):
        try:
            fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
            return request(fs, path, {"timeout": patience.timeout_s} if fs.async_impl else {})
        except ImportError as error:
            raise UserError(f'data.shards: {shown(url)}: {error} (pip install "raphael_dist[remote]")') from None
        except Exception as error:  # each library has errors of its own
            why, final = _reason(error), _is_final(error)
            if final or attempt == patience.retries:
                raise RemoteError(
                    f"{shown(url)}: {why}" + (f" ({attempt + 1} attempts)" if attempt else ""), final
                ) from error
            _log.info("%s: %s; again in %.1f s", shown(url), why, pause)
        # Spread out, or a thousand ranks that a server turned away come back at once.
        time.sleep(pause * random.Random(os.urandom(8)).uniform(0.5, 1.0))
        pause = min(2 * pause, _MAX_PAUSE_S)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    return isinstance(error, (FileNotFoundError, PermissionError)) or getattr(error, "status", None) in _FINAL


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is denied"
    # Not the text of the library's error, which may hold the whole URL.
    return f"status {status}" if status else type(error).__name__
