"""Reads and writes safetensors files, and computes the SHA-256 of files while they are written.

Data is read with pread into buffers, not memory-mapped, so that a process uses only the memory it asks for. A header is
checked before anything is allocated, since the file may be damaged or malicious.
"""

import hashlib
import io
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
from typing import TYPE_CHECKING, BinaryIO, Self

import torch
from torch import Tensor

from raphael_dist.errors import UserError
from raphael_dist.storage.files import FileEntry, write_all
from raphael_dist.text import JsonObject, open_regular, reason_unreadable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes; the format's own limit
# Elements per block: 4 MiB of float32, which the allocator reuses; larger blocks are mapped again each time.
CHUNK = 1 << 20
_OPEN_FILES = 64


@dataclass(frozen=True)
class StoredTensor:
    """Where a contiguous tensor lies in a file. The tensor may be only a range of the elements of a flattened parameter.

    Attributes:
        path: the file.
        offset: position of the tensor's first byte in the file.
        dtype, shape: dtype and shape of the tensor in the file.
        start: index of the tensor's first element in the flattened parameter.
        transposed: whether the file has the transpose of the parameter's matrix.
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

    def part(self, first: int, numel: int, start: int) -> "StoredTensor":
        """Return where elements [first, first + numel) of this tensor, flattened, lie in the file. Nothing is read.

        `start`: index of the first of these elements in the flattened parameter to which they belong.
        """
        return replace(self, offset=self.offset + first * self.dtype.itemsize, shape=(numel,), start=start)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        Where each tensor lies in the file, by name; and the metadata strings, by name.

    Raises:
        UserError: the file is missing or truncated, or its header contradicts its size.
    """
    try:
        size = path.stat().st_size
        with open(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"the file is truncated, or is not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        _check_extent(tensors, 8 + length, size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Copy it again from its source, or check the path.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file: {reason_unreadable(error)}. Copy it again from its source, or "
            "save it again."
        ) from None
    return tensors, metadata


def _without_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)} occurs twice")
    return tree


def _stored(path: Path, base: int, entry: JsonObject) -> StoredTensor:
    begin, end = (int(n) for n in entry["data_offsets"])
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    if min((*shape, begin), default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} does not fit into bytes {begin} to {end}")
    return StoredTensor(path, base + begin, dtype, shape)


def _check_extent(tensors: dict[str, StoredTensor], base: int, size: int) -> None:
    at = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.numel)):
        if tensor.offset != at:
            raise ValueError(f"the tensors overlap or leave a gap at byte {min(at, tensor.offset)}")
        at += tensor.numel * tensor.dtype.itemsize
    if at != size:
        raise ValueError(f"the file has {size} bytes, but the tensors in its header end at byte {at}")


class FileReader:
    """Reads ranges of parameters' elements from files. The most recently used files (64 at most) stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._transposed: tuple[StoredTensor, Tensor] | None = None  # the last one, flat: it is read in pieces
        weakref.finalize(self, _close_all, self._open)

    def read(self, spans: Iterable[StoredTensor], start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened parameter, float32 [numel].

        Args:
            spans: where the parameter's elements are stored, in ascending order of `start`.
            start: first element to read.
            numel: number of elements. Memory is allocated only if `spans` contain all of them.

        Raises:
            UserError: a file cannot be read, or is too short.
            LookupError: an element of the range is in none of the spans.
        """
        parts, at = [], start
        for span in spans:
            low, high = max(at, span.start), min(start + numel, span.start + span.numel)
            if low == at and high > low:
                parts.append((span, low - span.start, high - low))
                at = high
        if at < start + numel:
            raise LookupError(f"no element {at} (required: {start} to {start + numel - 1})")
        if len(parts) == 1:
            return self._piece(*parts[0]).float()
        out = torch.empty(numel)
        for piece, (span, first, count) in zip(torch.split(out, [count for *_, count in parts]), parts, strict=True):
            piece.copy_(self._piece(span, first, count))
        return out

    def _piece(self, span: StoredTensor, first: int, numel: int) -> Tensor:
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
            count = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if not count:
                raise UserError(
                    f"{path} ends too early: another process is still writing it, or the file is truncated. Wait for that "
                    "process, or copy the file again from its source."
                )
            done += count
        return out

    def close(self) -> None:
        """Close all files that `read` has opened. A later call of `read` opens them again."""
        _close_all(self._open)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[path] = open_regular(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from None
        self._open.move_to_end(path)
        return self._open[path]


def _close_all(descriptors: "OrderedDict[Path, int]") -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class HashedFile(io.RawIOBase):
    """A new file, written sequentially. Meanwhile a second thread computes its SHA-256, and calls fsync at the end.

    The file object cannot seek, so that no writer, such as zipfile, changes bytes that were already written and hashed.

    The caller must not change a buffer after passing it to `write`, until `entry` has returned. The constructor raises
    FileExistsError if the file exists.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest = hashlib.sha256()
        self._failure: BaseException | None = None
        self._queue: queue.Queue[ReadableBuffer | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        if kind is not None:
            self._thread.join()

    def entry(self) -> FileEntry:
        """Wait until fsync has returned; return the file's size and SHA-256. Call it after the `with` block.

        Raises OSError if fsync failed.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def write(self, data: "ReadableBuffer") -> int:
        """Append a bytes-like object to the file, and return how many bytes were written (all of them)."""
        view = memoryview(data)
        self._queue.put(data)
        write_all(self._descriptor, view)
        self.bytes += view.nbytes
        return view.nbytes

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
    """Return the bytes of a CPU tensor's elements in row-major order. A tensor that is not contiguous is copied."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def save_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors into an open file in the safetensors format. The tensors need not be contiguous.

    `tensors`: the tensors by name. `metadata`: strings by name, for the header.
    """
    # Large items first, as in the safetensors library, so that each tensor is aligned to its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    heads = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    write_safetensors(file, heads, metadata or {}, (tensors[name] for name in names))


def write_safetensors(
    file: HashedFile | BinaryIO,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
    values: Iterator[Tensor],
) -> None:
    """Write tensors into an open file in the safetensors format, without holding all of them in memory.

    Args:
        file: the file, open for writing.
        tensors: (name, dtype, shape) of each tensor, for the header.
        metadata: strings by name, for the header.
        values: CPU tensors with the elements of all `tensors`, in the same order. One of them may hold a part of a tensor,
            or more than one tensor: only the sequence of all elements matters.
    """
    head: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        head[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    assert sum(file.write(as_bytes(value)) for value in values) == end, "the values do not fill the file"
