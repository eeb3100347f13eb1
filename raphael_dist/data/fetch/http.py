"""Reads files from web servers. It reports what the server answered, and never reads more bytes than requested.

It uses only the session and the event loop of fsspec's HTTP file system, not its methods: these turn every error into
FileNotFoundError, and read and decompress response bodies of any length.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from aiohttp import ClientResponse

T = TypeVar("T")
BLOCK_BYTES = 1 << 20  # for which the time limit holds: a slow link may need minutes for a range of 16 MiB
_ABSENT = {404, 410}
_DENIED = {401, 403, 407}
_PACKED_NAMES = (".gz", ".tgz")


class HttpError(OSError):
    """The web server answered, but not with the requested bytes.

    Attributes:
        status: The HTTP status, or 0 if the status is not the reason.
        retry_after_s: Seconds that the server asks to wait before a retry (Retry-After header).
    """

    def __init__(self, reason: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class HttpFile:
    """One file on a web server, read in ranges of bytes.

    If the server does not support ranges, the whole file is requested once, and must be read from start to end.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Create the reader; it sends no request yet.

        `timeout_s`: seconds to wait for the server's answer to a request, and for each MiB of its body.
        """
        self._url, self._timeout_s = url, timeout_s
        self._fs: Any = None
        self._body: Any = None  # the response being read, at byte `_at`
        self._at = 0

    def stat(self) -> tuple[int | None, Mapping[str, str]]:
        """Ask the server about the file, and return (size in bytes, headers of the response).

        The size is None if the headers do not state it. Raises the same errors as `read`, such as FileNotFoundError.
        """
        return self._wait(self._stat)

    def read(self, start: int, end: int, size: int) -> bytes:
        """Return the bytes from `start` up to, but not including, `end` of the file.

        Args:
            start: First byte of the range.
            end: End of the range, exclusive.
            size: Size of the file in bytes, as `stat` has returned it.

        Raises:
            HttpError: The server sent something else than these bytes.
            FileNotFoundError: The HTTP status is 404 or 410.
            PermissionError: The HTTP status is 401, 403 or 407.
            TimeoutError: The server was too slow.
            aiohttp.ClientError: The connection failed.
        """
        try:
            return self._wait(self._read, start, end, size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, if it is open because the file was not read to its end. A later `read` opens it again."""
        if self._body is not None:
            self._fs.loop.call_soon_threadsafe(self._body.close)
            self._body = None

    def _wait(self, request: Callable[..., Coroutine[object, object, T]], *args: int) -> T:
        from fsspec import asyn, filesystem

        if self._fs is None:
            self._fs = filesystem("http")
        result: T = asyn.sync(self._fs.loop, request, *args)
        return result

    async def _stat(self) -> tuple[int | None, Mapping[str, str]]:
        head = await self._ask("HEAD", {})
        head.close()
        if head.ok and head.headers.get("Content-Length", "").isdigit():
            return int(head.headers["Content-Length"]), head.headers
        if head.status in _ABSENT or head.status == 429 or "Retry-After" in head.headers:
            _check(head)
        # Signed addresses allow only GET, and some servers do not support HEAD.
        response = await self._ask("GET", {"Range": "bytes=0-0"})
        response.close()
        _check(response)
        return _stated_size(response), response.headers

    async def _read(self, start: int, end: int, size: int) -> bytes:
        if self._body is None or self._at != start:
            self.close()
            self._body = await self._ask("GET", {"Range": f"bytes={start}-{end - 1}"})
            await self._check_start(start, size)
        data = await self._take(end - start)
        self._at = end
        if end == size or self._body.status == 206:
            if await asyncio.wait_for(self._body.content.read(1), self._timeout_s):
                raise HttpError("the server sends more bytes than its headers state")
            self._body.close()
            self._body = None
        return data

    async def _check_start(self, start: int, size: int) -> None:
        """Check the headers of the response. If the server ignores ranges, skip the bytes of the body before `start`.

        `size`: expected size of the file in bytes.
        """
        response = self._body
        _check(response)
        packed = response.headers.get("Content-Encoding", "identity")
        if packed != "identity" and not self._url.partition("?")[0].lower().endswith(_PACKED_NAMES):
            raise HttpError(
                f"the server sent compressed data (Content-Encoding: {packed[:20]}), although the request asked for none"
            )
        stated = _stated_size(response)
        if stated not in (None, size):
            raise HttpError(f"the size of the file has changed from {size} to {stated} bytes")
        first = response.headers.get("Content-Range", f"bytes {start}-").removeprefix("bytes ").partition("-")[0]
        if response.status == 206 and first != str(start):
            raise HttpError(f"the server sent bytes from {first[:20]}, but bytes from {start} were requested")
        skipped = 0 if response.status == 206 else start
        while skipped:
            skipped -= len(await self._take(min(skipped, BLOCK_BYTES)))

    async def _ask(self, method: str, headers: dict[str, str]) -> "ClientResponse":
        """Send a request and return the response. Its body is not read yet, and is not decompressed."""
        import aiohttp

        session = await self._fs.set_session()
        return await asyncio.wait_for(
            session.request(
                method,
                self._fs.encode_url(self._url),
                headers={"Accept-Encoding": "identity", **headers},
                allow_redirects=True,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),
            ),
            self._timeout_s,
        )

    async def _take(self, num_bytes: int) -> bytes:
        data = bytearray()
        try:
            while missing := num_bytes - len(data):
                block = self._body.content.readexactly(min(missing, BLOCK_BYTES))
                data += await asyncio.wait_for(block, self._timeout_s)
        except asyncio.IncompleteReadError as error:
            raise HttpError(f"received {len(data) + len(error.partial)} of {num_bytes} requested bytes") from error
        return bytes(data)


def check_status(status: int, retry_after: str) -> None:
    """Raise an exception unless the HTTP status states that the response contains the file (200) or a part of it (206).

    `retry_after`: the header Retry-After of the response, or "". Raises FileNotFoundError (404, 410), PermissionError (401,
    403, 407), or HttpError for any other status.
    """
    if status in (200, 206):
        return
    if status in _ABSENT:
        raise FileNotFoundError
    if status in _DENIED:
        raise PermissionError
    raise HttpError(f"status {status}", status, _retry_after_seconds(retry_after))


def _check(response: "ClientResponse") -> None:
    check_status(response.status, response.headers.get("Retry-After", ""))


def _stated_size(response: "ClientResponse") -> int | None:
    """Return the size of the whole file in bytes, as the headers of a response state it; None if they do not state it."""
    if response.status == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _retry_after_seconds(retry_after: str) -> float:
    """Return the seconds to wait that a Retry-After header states as a number or a date; 0 if it cannot be read."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
