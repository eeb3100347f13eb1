"""Files of `torch.save`, read without running anything and written a tensor at a time.

Reading unpickles with `weights_only=True`, never otherwise: a pickle from a stranger can run anything. Tensors come without
their data, as a place in the file.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile, Stored, as_bytes

MAX_PICKLE = 256 << 20  # bytes of the object tree, without tensor data
_STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage}


def load_tree(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Return the object that `torch.save` wrote, with a `Stored` for every tensor.

    allowed: classes and functions that the pickle may name, as `torch.serialization.safe_globals` takes them. UserError when
    the file is missing, damaged, or holds anything but these, tensors and plain values: nothing else of it is run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            pickles = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            if size > path.stat().st_size or pickles > MAX_PICKLE:
                raise ValueError("its parts are larger than the file")
            order = next((archive.read(e) for e in archive.infolist() if e.filename.endswith("/byteorder")), b"")
        if order not in (b"", sys.byteorder.encode()):
            raise ValueError("it was written on a machine of the other byte order")
        with FakeTensorMode(), torch.serialization.safe_globals(list(allowed)):
            return _with_places(torch.load(path, weights_only=True, map_location="cpu"), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        unsafe = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "not a weights file"
        )
        raise UserError(
            f"{path} is refused: it is a pickle of more than weights, and was not run ({unsafe.strip()})"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged, or no file of torch.save: {reason}") from None


def _with_places(node: Any, path: Path) -> Any:
    if isinstance(node, Tensor):
        if node.layout is not torch.strided or not node.is_contiguous():
            raise ValueError(f"a tensor of shape {list(node.shape)} is not contiguous; save it with .contiguous()")
        storage: Any = node.untyped_storage()
        offset = storage._checkpoint_offset + node.storage_offset() * node.dtype.itemsize
        return Stored(path, offset, node.dtype, tuple(node.shape))
    if isinstance(node, dict):
        return {key: _with_places(value, path) for key, value in node.items()}
    if isinstance(node, torch.Size):
        return tuple(node)
    if isinstance(node, list | tuple):
        return [_with_places(value, path) for value in node]
    return node


@dataclass(frozen=True)
class _Storage:
    key: str
    tensor: Any


class _Pickler(pickle.Pickler):
    """Pickles a tree as `torch.save` does, with a place for the data of every placeholder."""

    def __init__(self, file: io.BytesIO, placeholder: type[Any]) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []
        self._placeholder = placeholder

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Enum):
            return type(obj), (obj.value,)  # the same in every release of Python
        if not isinstance(obj, self._placeholder):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        strides = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.tensor.dtype], obj.key, "cpu", prod(obj.tensor.shape)


class _Forward(io.RawIOBase):
    """A stream that cannot go back, so that zipfile never changes what has been hashed."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        return self._file.write(data)


def write_tree(file: HashedFile, tree: Any, placeholder: type, values: Callable[[Any], Iterator[Tensor]]) -> None:
    """Write `tree` so that `torch.load` reads it.

    Tensors in it are objects of the class `placeholder`, with dtype and shape; `values` yields the elements of one in order,
    in any pieces. Only one piece is in memory at a time.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, placeholder)
    pickler.dump(tree)
    with zipfile.ZipFile(_Forward(file), "w", zipfile.ZIP_STORED) as archive:
        _record(archive, file, "data.pkl", iter([memoryview(buffer.getvalue())]))
        _record(archive, file, "byteorder", iter([memoryview(sys.byteorder.encode())]))
        for storage in pickler.storages:
            _record(archive, file, f"data/{storage.key}", map(as_bytes, values(storage.tensor)))
        _record(archive, file, "version", iter([memoryview(b"3\n")]))


def _record(archive: zipfile.ZipFile, file: HashedFile, name: str, pieces: Iterator[memoryview]) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")  # with a fixed date: the same tree gives the same bytes
    # Data begin at multiples of 64 bytes, as torch writes them, for readers that map the file. 30 bytes of header, the name,
    # 20 of zip64 that zipfile puts in front, then our own extra field.
    padding = -(file.bytes + 30 + len(entry.filename) + 20 + 4) % 64
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(entry, "w", force_zip64=True) as out:
        for piece in pieces:
            out.write(piece)
