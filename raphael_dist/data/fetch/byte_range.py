"""Reads a range of bytes of a file in S3 or on the Hugging Face hub, and never more, even if the server sends more.

s3fs and huggingface_hub have methods for this, but these first read the server's whole response, however long it is.
"""

import asyncio
from typing import Any

from fsspec import asyn

from raphael_dist.data.fetch.http import BLOCK_BYTES, HttpError, check_status

_PIECE_BYTES = 64 << 10


class IgnoredRangeError(HttpError):
    """The server ignores the requested range and sends other bytes. Repeating the request would not help."""

    def __init__(self) -> None:
        super().__init__("the server ignores byte ranges, without which a large file cannot be read")


def read_range(fs: Any, path: str, start: int, end: int, timeout_s: float) -> bytes:
    """Return the bytes from `start` up to, but not including, `end` of a file, or fewer if the server sends fewer.

    Args:
        fs: File system of fsspec for the service.
        path: Path of the file in this file system.
        start: First byte of the range.
        end: End of the range, exclusive.
        timeout_s: Time limit in seconds for the server's answer, and the same again for each MiB of data. For the Hugging
            Face hub, it limits each wait for data instead.

    Raises:
        IgnoredRangeError: The server ignores the range. For services other than S3 and the hub, this is known only after
            the whole answer has been read.
        Exception: Other errors have types that depend on the service's library.
    """
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "s3" in protocols:
        data: bytes = asyn.sync(fs.loop, _read_s3, fs, path, start, end, timeout_s)
    elif "hf" in protocols:
        data = _read_hub(fs, path, start, end, timeout_s)
    else:
        limit = timeout_s * (1 + (end - start) / BLOCK_BYTES)
        data = bytes(fs.cat_file(path, start=start, end=end, **({"timeout": limit} if fs.async_impl else {})))
    if len(data) > end - start:
        raise IgnoredRangeError
    return data


async def _read_s3(fs: Any, path: str, start: int, end: int, timeout_s: float) -> bytes:
    bucket, key, version = fs.split_path(path)
    options = {"VersionId": version} if version else {}
    async with asyncio.timeout(timeout_s) as limit:
        began = asyncio.get_running_loop().time()
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **options)
        try:
            if start and "ContentRange" not in answer:
                raise IgnoredRangeError
            data = bytearray()
            while len(data) < end - start and (piece := await answer["Body"].read(end - start - len(data))):
                data += piece
                limit.reschedule(began + timeout_s * (1 + len(data) / BLOCK_BYTES))
            return bytes(data)
        finally:
            answer["Body"].close()


def _read_hub(fs: Any, path: str, start: int, end: int, timeout_s: float) -> bytes:
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**build_hf_headers(token=fs.token), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", fs.url(path), headers=headers, timeout=timeout_s) as response:
        check_status(response.status_code, response.headers.get("Retry-After", ""))
        if start and response.status_code != 206:
            raise IgnoredRangeError
        data = bytearray()
        for piece in response.iter_bytes(_PIECE_BYTES):
            data += piece
            if len(data) >= end - start:
                break
        return bytes(data[: end - start])
