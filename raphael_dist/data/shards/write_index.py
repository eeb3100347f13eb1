"""Writes the table of an index (dataset_index.py) from the records of its shards (shard_record.py)."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from raphael_dist.data.fetch.shard_cache import ShardStore, plain_name
from raphael_dist.data.shards.dataset_index import BYTES, DIGESTS, SAMPLES, VERSION, DatasetIndex
from raphael_dist.data.shards.shard_record import ShardRecord, pack_keys
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.storage.checksummed import sealed_folder
from raphael_dist.text import JsonObject, hide_secrets_in_tree

_MAX_SIDE = 65_535
_HEADER_BYTES = 128  # of a .npy file; leaves room for a longer shape


class _Writer:
    """Collects the records of shards into the arrays of an index, which are written to files or stay in memory."""

    def __init__(self, columns: Sequence[str], folder: Path | None) -> None:
        self.columns, self.folder = columns, folder
        self.rows: list[tuple[int, ...]] = [(0, 0, 0, 0, 0)]
        self.about: JsonObject = {"version": VERSION, "names": [], "stamps": [], "parquets": [], "damage": {}}
        self.about |= {digest: [] for digest in DIGESTS}
        self.known: set[str] = set()
        self._skipped = SkipCounts()
        self._files: dict[str, BinaryIO] = {}
        self.parts: dict[str, list[bytes]] = {}

    def _append(self, name: str, data: bytes) -> None:
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
        self._append("keys.bin", keys)
        self._append("bad.bin", bad)
        self._append("place", record.places.tobytes())
        self._append("size", _as_uint16(record.sizes).tobytes())
        for column in self.columns:
            values = record.columns.get(column)
            values = np.full(record.num_samples, np.nan, np.float32) if values is None else values
            self._append(f"column.{column}", values.tobytes())
        self.known.update(record.columns)
        self._skipped.merge(SkipCounts(record.skipped), f"{plain_name(record.name)}:")
        if record.damage:
            self.about["damage"][len(self.about["names"])] = record.damage
        self.about["names"].append(record.name)
        self.about["stamps"].append([record.stamp.num_bytes, record.stamp.mark])
        self.about["parquets"].append(record.parquet and [record.parquet.num_bytes, record.parquet.mark])
        for digest in DIGESTS:
            self.about[digest].append(getattr(record, digest))
        last = self.rows[-1]
        self.rows[-1] = (*last[:BYTES], record.num_bytes)
        added = (record.num_samples, len(keys), len(bad), len(record.bad))
        self.rows.append((*(a + b for a, b in zip(last[:BYTES], added, strict=True)), 0))

    def finish(self) -> None:
        num_samples, kinds = self.rows[-1][SAMPLES], _array_types(self.columns)
        for name, file in self._files.items():
            if name in kinds:
                kind, shape = kinds[name]
                file.seek(0)
                file.write(_npy_header(kind, (num_samples, *shape[1:])))
            file.close()
        self.about["known"] = sorted(self.known)
        self.about["skipped"] = self._skipped.counts
        self.about["whole"] = {d: hashlib.sha256("".join(self.about[d]).encode()).hexdigest() for d in DIGESTS}


def _array_types(columns: Sequence[str]) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Return (dtype, shape) of each array of an index. -1 in a shape stands for the number of samples."""
    named = {f"column.{column}": (np.float32, (-1,)) for column in columns}
    return {"place": (np.uint32, (-1, 2)), "size": (np.uint16, (-1, 2)), **named}


def _npy_header(kind: type[np.generic], shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    about = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def table_in_memory(store: ShardStore, records: Iterable[ShardRecord]) -> DatasetIndex:
    """Join the records of shards into an index (table of all samples) in memory, with all columns. No file is written.

    `store`: provides the shards (tar files) as local files. `records`: for each shard, the byte range, image size and
    key (name) of its samples.
    """
    records = list(records)
    columns = sorted({name for record in records for name in record.columns})
    writer = _Writer(columns, None)
    for record in records:
        writer.add(record)
    writer.finish()
    arrays = {
        name: np.frombuffer(b"".join(writer.parts.get(name, [])), kind).reshape(shape)
        for name, (kind, shape) in _array_types(columns).items()
    }
    arrays["shards"] = np.array(writer.rows, np.int64)
    keys, bad = (b"".join(writer.parts.get(name, [])) for name in ("keys.bin", "bad.bin"))
    return DatasetIndex(store, arrays, keys, bad, json.loads(json.dumps(writer.about)))


def write_table(folder: Path, records: Iterable[ShardRecord], columns: Sequence[str]) -> None:
    """Join the records of shards into an index (table of all samples), and write it as `folder`.

    Several processes may write the same folder at once. `records`: for each shard, the byte range, image size, key (name)
    and column values of its samples. `columns`: names of the additional columns, which hold the values that data.filters
    tests. Raises OSError if writing fails.
    """
    with sealed_folder(folder) as temporary:
        writer = _Writer(columns, temporary)
        for record in records:
            writer.add(record)
        writer.finish()
        np.save(temporary / "shards.npy", np.array(writer.rows, np.int64))
        (temporary / "shards.json").write_text(json.dumps(hide_secrets_in_tree(writer.about)))


def _as_uint16(sizes: np.ndarray) -> np.ndarray:
    """Convert image sizes to uint16. If a side exceeds 65,535, both sides are scaled down by the same factor."""
    longest = sizes.max(axis=1, initial=1, keepdims=True)
    scaled = np.maximum(1, sizes * (_MAX_SIDE / np.maximum(longest, _MAX_SIDE)))
    return np.where(longest > _MAX_SIDE, scaled, sizes).astype(np.uint16)
