"""Reads files of `torch.save` without running code from them, and writes such files with one tensor in memory at a time.

Files are always unpickled with `weights_only=True`, since a pickle can run any code. Reading returns where each tensor lies
in the file (`StoredTensor`), not its data.
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
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile, StoredTensor, as_bytes, read_header

Allowed = Callable[..., object] | tuple[Callable[..., object], str]  # a class or function, and its name if it is another
MAX_PICKLE = 256 << 20  # bytes of the object tree, without tensor data
MAX_VALUES = 500_000  # in the object tree; a pickle of a kilobyte can describe an endless one
_STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage}


class Placeholder(Protocol):
    """Interface of objects that stand for tensors in the nested dicts and lists that `write_tree` writes."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


P = TypeVar("P", bound=Placeholder)


def load_tree(path: Path, allowed: Sequence[Allowed] = ()) -> Any:
    """Return the object in a file of `torch.save`, with a `StoredTensor` (place in the file) instead of each tensor.

    Args:
        path: the file.
        allowed: classes and functions that the pickle may use, in the form of `torch.serialization.safe_globals`.

    Raises:
        UserError: the file is missing or damaged, or contains something other than tensors, plain values and objects of the
            `allowed` classes. No other code is run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            pickles = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            if size > path.stat().st_size or pickles > MAX_PICKLE:
                raise ValueError(
                    f"the zip entries must take at most {path.stat().st_size} bytes (the size of the file), and pickles "
                    f"among them at most {MAX_PICKLE}, but all entries take {size} and pickles {pickles} bytes"
                )
            order = next((archive.read(e) for e in archive.infolist() if e.filename.endswith("/byteorder")), b"")
        if order not in (b"", sys.byteorder.encode()):
            raise ValueError("the file was written on a machine with another byte order")
        with FakeTensorMode(), torch.serialization.safe_globals(list(allowed)):
            return _with_places(torch.load(path, weights_only=True, map_location="cpu"), path, [MAX_VALUES])
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Copy it again from its source, or check the path.") from None
    except pickle.UnpicklingError as error:
        unsafe = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "it is not a file of weights"
        )
        raise UserError(
            f"{path} must contain only tensors and plain values, but loading it would run other code ({unsafe.strip()}); "
            "that code was not run. Save the weights as safetensors."
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as a file of torch.save: {reason}. Copy it again from its source, or save the "
            "weights again."
        ) from None


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor lies in a file of weights, by tensor name.

    Only headers are read, not the data of tensors.

    Args:
        path: the file: .safetensors, or written by torch.save.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix == ".safetensors":
        return read_header(path)[0]
    tree = load_tree(path)
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    return {str(key): value for key, value in tree.items() if isinstance(value, StoredTensor)}


def _with_places(node: object, path: Path, left: list[int]) -> Any:
    """Replace each tensor in nested dicts and lists by a `StoredTensor`, its location in the file `path`.

    `left`: a list with one number, shared by all calls: how many values the tree may still have. A malicious file could
    describe an endless tree.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"the file contains more than {MAX_VALUES:,} values")
    if isinstance(node, dict):
        return {key: _with_places(value, path, left) for key, value in node.items()}
    if isinstance(node, torch.Size):
        return tuple(node)
    if isinstance(node, list | tuple):
        return [_with_places(value, path, left) for value in node]
    if isinstance(node, Tensor):
        if node.layout is not torch.strided or not node.is_contiguous():
            raise ValueError(f"a tensor of shape {list(node.shape)} is not contiguous; save it with .contiguous()")
        storage: Any = node.untyped_storage()
        offset = storage._checkpoint_offset + node.storage_offset() * node.dtype.itemsize
        return StoredTensor(path, offset, node.dtype, tuple(node.shape))
    return node


@dataclass(frozen=True)
class _Storage(Generic[P]):
    key: str
    tensor: P


class _Pickler(pickle.Pickler, Generic[P]):
    """Pickles a tree as `torch.save` does, with a tensor in place of each placeholder. `write_tree` adds the data later."""

    def __init__(self, file: io.BytesIO, placeholder: type[P]) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage[P]] = []
        self._placeholder = placeholder

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, Enum):
            return type(obj), (obj.value,)  # the same in every release of Python
        if not isinstance(obj, self._placeholder):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        strides = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())

    def persistent_id(self, obj: object) -> tuple[str, type, str, str, int] | None:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.tensor.dtype], obj.key, "cpu", prod(obj.tensor.shape)


def write_tree(file: HashedFile, tree: object, placeholder: type[P], values: Callable[[P], Iterator[Tensor]]) -> None:
    """Write a tree of dicts and lists as a file that `torch.load` reads, without holding a whole tensor in memory.

    Args:
        file: the file, open for writing.
        tree: dicts, lists and plain values, with a placeholder object in place of each tensor.
        placeholder: class of the placeholders, which must have the attributes `dtype` and `shape`.
        values: called with a placeholder; yields the elements of its tensor in order, as one or more CPU tensors.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, placeholder)
    pickler.dump(tree)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, file, "data.pkl", iter([memoryview(buffer.getvalue())]))
        _record(archive, file, "byteorder", iter([memoryview(sys.byteorder.encode())]))
        for storage in pickler.storages:
            _record(archive, file, f"data/{storage.key}", map(as_bytes, values(storage.tensor)))
        _record(archive, file, "version", iter([memoryview(b"3\n")]))


def _record(archive: zipfile.ZipFile, file: HashedFile, name: str, pieces: Iterator[memoryview]) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")  # with a fixed date: the same tree gives the same bytes
    # Data starts at multiples of 64 bytes, as in torch, for readers that map the file: after 30 bytes of header, the name,
    # 20 bytes of zip64 that zipfile inserts, and this extra field.
    padding = -(file.bytes + 30 + len(entry.filename) + 20 + 4) % 64
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(entry, "w", force_zip64=True) as out:
        for piece in pieces:
            out.write(piece)
