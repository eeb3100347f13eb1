"""Reads remote files (https://, s3://, gs://, hf:// and others that fsspec supports) in blocks, with retries.

Each service's library finds its own credentials and endpoints (AWS_*, HF_TOKEN, ...). Messages do not show the credentials
that a URL may hold (user:password@, ?signature); see `text.hide_secrets`.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import fsspec

from raphael_dist.data.fetch.byte_range import IgnoredRangeError, read_range
from raphael_dist.data.fetch.http import HttpError, HttpFile
from raphael_dist.data.fetch.listing import find_files, split_pattern
from raphael_dist.errors import UserError
from raphael_dist.text import HIDDEN, hide_secrets

_log = logging.getLogger(__name__)
T = TypeVar("T")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs")
NO_LISTING = ("http", "https")
PIECE_BYTES = 16 << 20
_FINAL = {400, 401, 403, 404, 410}  # HTTP statuses that a repeated request does not change
_MAX_PAUSE_S = 30.0
_MAX_WAIT_S = 120.0  # limit for Retry-After


class RemoteError(Exception):
    """A remote file could not be read. The message is the reason, without secrets.

    Attributes:
        final: Whether a repeated request cannot succeed.
        absent: Whether the server reports that the file does not exist.
        denied: Whether the server denies access to it.
    """

    def __init__(self, text: str, final: bool = False, absent: bool = False, denied: bool = False) -> None:
        super().__init__(text)
        self.final, self.absent, self.denied = final, absent, denied


@dataclass(frozen=True)
class RetryPolicy:
    """How failed requests are repeated.

    Attributes:
        retries: Number of repetitions.
        timeout_s: Time limit of a request in seconds.
        pause_s: Pause before the first repetition in seconds. It doubles after each repetition.
    """

    retries: int = 5
    timeout_s: float = 60.0
    pause_s: float = 0.5


DEFAULT_RETRY = RetryPolicy()


def is_remote(name: str) -> bool:
    """Return whether the name of a shard (tar file of samples) is a URL. False: it is a path.

    Raises UserError if the URL has an unsupported scheme, or contains "(hidden)" in place of a user, password or query.
    """
    match = _SCHEME.match(name)
    if match is None:
        return False
    if match[1].lower() not in SCHEMES or not name[match.end() :].startswith("//"):
        raise UserError(
            f"data.shards={hide_secrets(name)!r} must be a path or a URL that begins with {'://, '.join(SCHEMES)}://. "
            "Write, for example, s3://bucket/train-{000..099}.tar."
        )
    if HIDDEN in name:
        raise UserError(
            f"data.shards={name!r} must be a complete address, but '{HIDDEN}' in it stands for a user, password or query, "
            "which runs do not store. Write the whole address."
        )
    return True


def stat(url: str, retry: RetryPolicy) -> tuple[int, str]:
    """Return (size of a remote file in bytes, a string that changes whenever the file changes).

    The string is the file's ETag, hash, generation or modification time; "" if the server states none of them. `retry`: how
    failed requests are repeated. Raises RemoteError if the file does not exist, the server cannot be reached, or it does not
    state the size.
    """
    file = _open(url, retry)
    size, info = _with_retries(url, retry, file.stat)
    if size is None:
        raise RemoteError(f"{hide_secrets(url)}: the server does not state the size of the file")
    names = ("ETag", "etag", "generation", "blob_id", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime")
    lfs = info.get("lfs") or {}
    stamps = [lfs.get("sha256") if isinstance(lfs, dict) else None, *(info.get(name) for name in names)]
    return size, next((str(stamp) for stamp in stamps if stamp), "")


def pieces(url: str, size: int, retry: RetryPolicy, until: int | None = None) -> Iterator[bytes]:
    """Yield the content of a remote file in blocks of PIECE_BYTES (16 MiB), in order.

    Args:
        url: URL of the file.
        size: size of the file in bytes, as `stat` returned it.
        retry: how failed requests are repeated.
        until: number of bytes after which reading ends; None: the whole file is read.

    Raises:
        RemoteError: a block cannot be read even after the retries.
    """
    file = _open(url, retry)
    try:
        last = size if until is None else min(size, until)
        for start in range(0, last, PIECE_BYTES):
            end = min(last, start + PIECE_BYTES)
            yield _with_retries(url, retry, partial(file.read, start, end, size))
    finally:
        file.close()


def matches(pattern: str, retry: RetryPolicy) -> list[tuple[str, str]]:
    """Find the remote files that match `pattern`, a URL with wildcards (*, ?, [...]), sorted.

    Returns (URL, path relative to the folder before the first wildcard) of each file. `retry`: how failed requests are
    repeated. Raises RemoteError if one of the folders cannot be listed.
    """
    fs, path, options = _with_retries(pattern, retry, partial(_resolve, pattern, retry.timeout_s))
    fs.invalidate_cache()  # as in `_LibraryFile.stat`
    files = find_files(
        lambda folder: _with_retries(pattern, retry, partial(_entries, fs, folder, options)), *split_pattern(path)
    )
    return sorted({(str(fs.unstrip_protocol(path)), relative) for path, relative in files})


def _resolve(url: str, timeout_s: float) -> tuple[fsspec.AbstractFileSystem, str, dict[str, float]]:
    """Return (fsspec's file system for a URL, path of the file in this file system, keyword arguments for its methods).

    `timeout_s`: time limit of a request. The keyword arguments pass it to file systems that support it.
    """
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, path, {"timeout": timeout_s} if fs.async_impl else {}


def _entries(fs: fsspec.AbstractFileSystem, folder: str, options: dict[str, float]) -> list[dict[str, object]]:
    """Return the entries of a folder; [] if it does not exist. `options`: keyword arguments from `_resolve`."""
    try:
        return list(fs.ls(folder, detail=True, **options))
    except FileNotFoundError:
        return []


class _LibraryFile:
    """A file of a storage service such as S3. It is read by the file system of fsspec for this service."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s

    def stat(self) -> tuple[int | None, Mapping[str, object]]:
        fs, path, options = _resolve(self._url, self._timeout_s)
        fs.invalidate_cache()  # hf:// caches the state of a file in spite of use_listings_cache=False
        info: dict[str, object] = fs.info(path, **options)
        size = info.get("size")
        return size if isinstance(size, int) else None, info

    def read(self, start: int, end: int, size: int) -> bytes:
        fs, path, _ = _resolve(self._url, self._timeout_s)
        data = read_range(fs, path, start, end, self._timeout_s)
        if len(data) != end - start:
            raise HttpError(f"received {len(data)} of {end - start} requested bytes")
        return data

    def close(self) -> None:
        """Do nothing: no connection stays open."""


def _open(url: str, retry: RetryPolicy) -> HttpFile | _LibraryFile:
    kind = HttpFile if url.partition(":")[0].lower() in NO_LISTING else _LibraryFile
    return kind(url, retry.timeout_s)


def _with_retries(url: str, retry: RetryPolicy, request: Callable[[], T]) -> T:
    """Call `request` until it succeeds, and return its result. `url`: the file that is read, for messages.

    Raises RemoteError if all attempts fail, or at once if a further attempt cannot succeed, such as for a missing file.
    """
    pause = retry.pause_s
    for attempt in range(retry.retries + 1):
        try:
            return request()
        except ImportError as error:
            raise UserError(
                f"data.shards={hide_secrets(url)} requires a library that is not installed ({error}). "
                'Run: pip install "raphael_dist[remote]"'
            ) from None
        except Exception as error:  # each library has its own errors
            reason, final = _reason(error), _is_final(error)
            if final or attempt == retry.retries:
                attempts = f" ({attempt + 1} attempts)" if attempt else ""
                absent = isinstance(error, FileNotFoundError)
                raise RemoteError(f"{hide_secrets(url)}: {reason}{attempts}", final, absent, _is_denied(error)) from error
            wait = min(getattr(error, "retry_after_s", 0.0), _MAX_WAIT_S)
            _log.info("%s: %s; retry in %.1f s", hide_secrets(url), reason, max(wait, pause))
        # Random, so that a thousand rejected ranks do not return at the same time.
        time.sleep(wait + pause * random.Random(os.urandom(8)).uniform(0.5, 1.0))
        pause = min(2 * pause, _MAX_PAUSE_S)
    raise AssertionError("unreachable")


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)


def _is_final(error: Exception) -> bool:
    if (
        isinstance(error, (FileNotFoundError, PermissionError, IgnoredRangeError))
        or getattr(error, "status", None) in _FINAL
    ):
        return True
    return type(error).__name__ in ("TooManyRedirects", "InvalidUrlRedirectClientError", "NonHttpUrlRedirectClientError")


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if _is_denied(error):
        return "access is denied"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    # The text of a library's error may hold the whole URL with its secrets.
    return str(error) if isinstance(error, HttpError) else f"status {status}" if status else type(error).__name__
