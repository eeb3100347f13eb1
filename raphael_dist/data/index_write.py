"""Writing the table of an index (index.py has its layout) from the records of the shards, one after the other."""

import hashlib
import io
import json
import shutil
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raphael_dist.data.index import BYTES, DIGESTS, SAMPLES, VERSION, DatasetIndex
from raphael_dist.data.shard_record import ShardRecord, pack_keys
from raphael_dist.data.shard_store import ShardStore

_MAX_SIDE = 65_535
_HEADER_BYTES = 128  # numpy leaves room in it for a longer shape


class _Writer:
    """Gathers records into the arrays of a table, each of which goes to a file, or stays in memory."""

    def __init__(self, columns: Sequence[str], folder: Path | None) -> None:
        self.columns, self.folder = columns, folder
        self.rows: list[tuple[int, ...]] = [(0, 0, 0, 0, 0)]
        self.about: dict[str, Any] = {
            "version": VERSION,
            "names": [],
            "stamps": [],
            "damage": {},
            **{d: [] for d in DIGESTS},
        }
        self.known: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self.parts: dict[str, list[bytes]] = {}

    def _put(self, name: str, data: bytes) -> None:
        if self.folder is None:
            self.parts.setdefault(name, []).append(data)
            return
        if name not in self._files:
            is_array = not name.endswith(".bin")
            self._files[name] = open(self.folder / (f"{name}.npy" if is_array else name), "wb")
            self._files[name].write(bytes(_HEADER_BYTES if is_array else 0))
        self._files[name].write(data)

    def add(self, record: ShardRecord) -> None:
        keys, bad = zlib.compress(pack_keys(record.keys), 1), zlib.compress(json.dumps(record.bad).encode(), 1)
        self._put("keys.bin", keys)
        self._put("bad.bin", bad)
        self._put("place", record.places.tobytes())
        self._put("size", _small(record.sizes).tobytes())
        for column in self.columns:
            values = record.columns.get(column)
            values = np.full(record.num_samples, np.nan, np.float32) if values is None else values
            self._put(f"column.{column}", values.tobytes())
        self.known.update(record.columns)
        if record.damage:
            self.about["damage"][len(self.about["names"])] = record.damage
        self.about["names"].append(record.name)
        self.about["stamps"].append([record.stamp.num_bytes, record.stamp.mark])
        for digest in DIGESTS:
            self.about[digest].append(getattr(record, digest))
        last = self.rows[-1]
        self.rows[-1] = (*last[:BYTES], record.num_bytes)
        added = (record.num_samples, len(keys), len(bad), len(record.bad))
        self.rows.append((*(a + b for a, b in zip(last[:BYTES], added, strict=True)), 0))

    def finish(self) -> None:
        num_samples, kinds = self.rows[-1][SAMPLES], _kinds(self.columns)
        for name, file in self._files.items():
            if name in kinds:
                kind, shape = kinds[name]
                file.seek(0)
                file.write(_npy_header(kind, (num_samples, *shape[1:])))
            file.close()
        self.about["known"] = sorted(self.known)
        self.about["whole"] = {d: hashlib.sha256("".join(self.about[d]).encode()).hexdigest() for d in DIGESTS}


def _kinds(columns: Sequence[str]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return type and shape (-1: number of samples) of each array of a table."""
    named = {f"column.{column}": (np.float32, (-1,)) for column in columns}
    return {"place": (np.uint32, (-1, 2)), "size": (np.uint16, (-1, 2)), **named}


def _npy_header(kind: Any, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    about = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def table_in_memory(store: ShardStore, records: Iterable[ShardRecord]) -> DatasetIndex:
    """Return the index of records without writing anything, with all their columns."""
    records = list(records)
    columns = sorted({name for record in records for name in record.columns})
    writer = _Writer(columns, None)
    for record in records:
        writer.add(record)
    writer.finish()
    arrays = {
        name: np.frombuffer(b"".join(writer.parts.get(name, [])), kind).reshape(shape)
        for name, (kind, shape) in _kinds(columns).items()
    }
    arrays["shards"] = np.array(writer.rows, np.int64)
    keys, bad = (b"".join(writer.parts.get(name, [])) for name in ("keys.bin", "bad.bin"))
    return DatasetIndex(store, arrays, keys, bad, json.loads(json.dumps(writer.about)))


def write_table(folder: Path, records: Iterable[ShardRecord], columns: Sequence[str]) -> None:
    """Write the table of the records as the folder `folder`, whole or not at all. Raises OSError.

    Several processes may write the same; one of them wins.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        writer = _Writer(columns, temporary)
        for record in records:
            writer.add(record)
        writer.finish()
        np.save(temporary / "shards.npy", np.array(writer.rows, np.int64))
        (temporary / "shards.json").write_text(json.dumps(writer.about))
        if not (folder / "shards.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except FileExistsError:
        pass
    except OSError as error:
        if not (folder / "shards.json").is_file():
            raise error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _small(sizes: np.ndarray) -> np.ndarray:
    """Return sizes as uint16; where a side is longer than that holds, both scaled down alike."""
    longest = sizes.max(axis=1, initial=1, keepdims=True)
    scaled = np.maximum(1, sizes * (_MAX_SIDE / np.maximum(longest, _MAX_SIDE)))
    return np.where(longest > _MAX_SIDE, scaled, sizes).astype(np.uint16)
