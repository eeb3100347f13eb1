"""Raw tensor files: the one reader and the one writer of safetensors, and files that are hashed as they are written.

Reading goes through pread into buffers of our own, never through a memory map, so that memory in use is what is asked for.
A header is checked before anything is allocated: it may come from a stranger.
"""

import hashlib
import json
import os
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raphael_dist.errors import UserError
from raphael_dist.storage.files import open_regular, write_all

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
    """A contiguous tensor in a file, beginning at byte `offset`.

    start: where it begins in the parameter, flattened, of which it is a span. transposed: it is a matrix, and the span is
    its transpose.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    transposed: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def part(self, first: int, numel: int, start: int) -> "Stored":
        """Return elements [first, first + numel) of this tensor as the span of a parameter that begins at `start`."""
        return replace(self, offset=self.offset + first * self.dtype.itemsize, shape=(numel,), start=start)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. UserError when it is none, truncated or inconsistent."""
    try:
        size = path.stat().st_size
        with open(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"it is cut short, or no safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        _check_extent(tensors, 8 + length, size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return tensors, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return tree


def _stored(path: Path, base: int, entry: dict[str, Any]) -> Stored:
    begin, end = (int(n) for n in entry["data_offsets"])
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    if min((*shape, begin), default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} does not fit into bytes {begin} to {end}")
    return Stored(path, base + begin, dtype, shape)


def _check_extent(tensors: dict[str, Stored], base: int, size: int) -> None:
    at = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.numel)):
        if tensor.offset != at:
            raise ValueError("its tensors overlap or leave a gap")
        at += tensor.numel * tensor.dtype.itemsize
    if at != size:
        raise ValueError(f"it has {size} bytes, its header says {at}")


class FileReader:
    """Reads stored tensors, keeping the last few files open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._transposed: tuple[Stored, Tensor] | None = None  # the last one, flat, since it is asked for in pieces
        weakref.finalize(self, _close_all, self._open)

    def read(self, spans: Iterable[Stored], start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened parameter, float32, out of its spans in order.

        UserError when a file ends before its tensor; LookupError when the spans lack an element. Memory for the result is
        taken only when they have all.
        """
        parts, at = [], start
        for span in spans:
            low, high = max(at, span.start), min(start + numel, span.start + span.numel)
            if low == at and high > low:
                parts.append((span, low - span.start, high - low))
                at = high
        if at < start + numel:
            raise LookupError(f"no element {at} of {start + numel}")
        if len(parts) == 1:
            return self._piece(*parts[0]).float()
        out = torch.empty(numel)
        for piece, (span, first, count) in zip(out.split([count for *_, count in parts]), parts, strict=True):
            piece.copy_(self._piece(span, first, count))
        return out

    def _piece(self, span: Stored, first: int, numel: int) -> Tensor:
        if not span.transposed:
            return self._raw(span.path, span.offset + first * span.dtype.itemsize, span.dtype, numel)
        if self._transposed is None or self._transposed[0] is not span:
            matrix = self._raw(span.path, span.offset, span.dtype, span.numel).view(span.shape)
            self._transposed = (span, matrix.t().contiguous().view(-1))
        return self._transposed[1][first : first + numel]

    def _raw(self, path: Path, offset: int, dtype: torch.dtype, numel: int) -> Tensor:
        out = torch.empty(numel, dtype=dtype)
        view, done = as_bytes(out), 0
        while done < len(view):
            got = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if not got:
                raise UserError(f"{path} is cut short")
            done += got
        return out

    def close(self) -> None:
        """Close all files."""
        _close_all(self._open)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[path] = open_regular(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._open.move_to_end(path)
        return self._open[path]


def _close_all(descriptors: "OrderedDict[Path, int]") -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class HashedFile:
    """A new file, written from front to end. A second thread computes its SHA-256 meanwhile, and syncs it after leaving.

    What is given to `write` must not change until `entry` returns. Raises FileExistsError when the file is there already.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest = hashlib.sha256()
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
        """Wait until the file is on the device; return its manifest entry (bytes, sha256). Raises OSError when it is not."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def write(self, data: Any) -> int:
        """Append bytes, or anything with a buffer of bytes."""
        self._queue.put(data)
        write_all(self._descriptor, memoryview(data))
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
            os.fsync(self._descriptor)
        except OSError as error:
            self._failure = error
        finally:
            os.close(self._descriptor)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor."""
    raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def write_safetensors(
    file: HashedFile,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
    values: Iterator[Tensor],
) -> None:
    """Write a safetensors file of tensors (key, dtype, shape), with their values in order, in any pieces."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        head[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = file.write(len(text).to_bytes(8, "little") + text)
    for value in values:
        file.write(as_bytes(value))
    assert file.bytes - start == end, "the values do not fill the file"
