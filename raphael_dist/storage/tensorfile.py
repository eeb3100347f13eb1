"""Raw tensor files: what a safetensors file holds, and files that are hashed as they are written.

Reading goes through pread into buffers of our own, never through a memory map, so that memory in use is what is asked for.
A header is checked before anything is allocated: it may come from a stranger.
"""

import hashlib
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raphael_dist.checkpoint.folders import safetensors_header
from raphael_dist.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes; the format's own limit
# Elements moved at a time: 4 MiB, which the allocator hands out again and again; larger blocks are mapped anew each time.
CHUNK = 1 << 20
_OPEN_FILES = 64


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in a file, beginning at byte `offset`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. UserError when it is none, truncated or inconsistent."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"it is cut short, or no safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        found = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        _check_extent(found, 8 + length, size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _stored(path: Path, base: int, entry: dict[str, Any]) -> Stored:
    begin, end = (int(n) for n in entry["data_offsets"])
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    if min((*shape, begin), default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} does not fit into bytes {begin} to {end}")
    return Stored(path, base + begin, dtype, shape)


def _check_extent(found: dict[str, Stored], base: int, size: int) -> None:
    at = base
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.numel)):
        if tensor.offset != at:
            raise ValueError("its tensors overlap or leave a gap")
        at += tensor.numel * tensor.dtype.itemsize
    if at != size:
        raise ValueError(f"it has {size} bytes, its header says {at}")


class FileReader:
    """Reads stretches of files, keeping the last few open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Return `numel` elements that begin at byte `offset`. UserError when the file ends before."""
        out = torch.empty(numel, dtype=dtype)
        view, done = as_bytes(out), 0
        while done < len(view):
            got = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if not got:
                raise UserError(f"{path} is cut short")
            done += got
        return out

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


class HashedFile:
    """A file written from front to end; a second thread computes its SHA-256 meanwhile, and makes it durable after leaving.

    What is given to `write` must not change afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._file, self._digest = open(path, "wb", buffering=0), hashlib.sha256()
        self._failure: BaseException | None = None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> "HashedFile":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        if kind is not None:
            self._thread.join()

    def entry(self) -> dict[str, Any]:
        """Wait until the file is durable; return its manifest entry. Raises OSError when that failed."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def write(self, data: Any) -> int:
        """Append bytes, or anything with a buffer of bytes."""
        self._queue.put(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: leaving flushes."""

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.bytes

    def _hash(self) -> None:
        while (data := self._queue.get()) is not None:
            self._digest.update(data)
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = error


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor."""
    raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def write_safetensors(
    file: HashedFile,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    values: Iterator[Tensor],
) -> None:
    """Write a safetensors file of tensors (key, dtype, shape), with their values in order, in any pieces."""
    heads = [(key, DTYPE_NAMES[dtype], shape, prod(shape) * dtype.itemsize) for key, dtype, shape in tensors]
    begin = file.write(safetensors_header(heads, metadata))
    for value in values:
        file.write(as_bytes(value))
    assert file.bytes - begin == sum(size for *_, size in heads), "the values do not fill the file"
