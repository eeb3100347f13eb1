"""Writes the table of an index (dataset_index.py) from the records of its shards (shard_record.py)."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from raphael_dist.data.fetch.shard_cache import plain_name
from raphael_dist.data.shards.dataset_index import BYTES, DIGESTS, SAMPLES, VERSION
from raphael_dist.data.shards.shard_record import ShardRecord, pack_keys
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.storage.checksummed import sealed_folder
from raphael_dist.text import JsonObject, hide_secrets_in_tree

_MAX_SIDE = 65_535
_HEADER_BYTES = 128  # of a .npy file; leaves room for a longer shape


class _Writer:
    """Writes the records of shards, one after the other, into the files of an index.

    Attributes:
        rows: Rows of the array in shards.npy: counts and offsets of each shard (dataset_index.py describes them).
        about: Content of shards.json: names, versions, digests and damage of the shards.
    """

    def __init__(self, columns: Sequence[str], open_file: Callable[[str], BinaryIO]) -> None:
        """Open the files.

        `columns`: names of the columns (metadata values for data.filters) to write. `open_file`: opens a new file by name.
        """
        kinds: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {"place": (np.uint32, (2,)), "size": (np.uint16, (2,))}
        kinds |= {f"column.{column}": (np.float32, ()) for column in columns}
        self._arrays = {name: (open_file(f"{name}.npy"), *kind) for name, kind in kinds.items()}
        for file, *_ in self._arrays.values():
            file.write(bytes(_HEADER_BYTES))
        self._keys, self._bad = open_file("keys.bin"), open_file("bad.bin")
        self.rows: list[tuple[int, ...]] = [(0, 0, 0, 0, 0)]
        self.about: JsonObject = {"version": VERSION, "names": [], "stamps": [], "parquets": [], "damage": {}}
        self.about |= {digest: [] for digest in DIGESTS}
        self._known: set[str] = set()
        self._skipped = SkipCounts()

    def add(self, record: ShardRecord) -> None:
        keys, bad = zlib.compress(pack_keys(record.keys), 1), zlib.compress(json.dumps(record.bad).encode(), 1)
        self._keys.write(keys)
        self._bad.write(bad)
        arrays = {"place": record.places, "size": _as_uint16(record.sizes)}
        arrays |= {f"column.{column}": values for column, values in record.columns.items()}
        for name, (file, *_) in self._arrays.items():
            values = arrays.get(name)
            file.write((np.full(record.num_samples, np.nan, np.float32) if values is None else values).tobytes())
        self._known.update(record.columns)
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
        """Write the headers of the arrays, whose length is known now, and complete `about`."""
        for file, kind, shape in self._arrays.values():
            file.seek(0)
            header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (self.rows[-1][SAMPLES], *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == _HEADER_BYTES
        self.about["known"] = sorted(self._known)
        self.about["skipped"] = self._skipped.counts
        self.about["whole"] = {d: hashlib.sha256("".join(self.about[d]).encode()).hexdigest() for d in DIGESTS}


def write_table(folder: Path, records: Iterable[ShardRecord], columns: Sequence[str]) -> None:
    """Join the records of shards into an index (table of all samples), and write it as `folder`.

    Several processes may write the same folder at once. `records`: for each shard, the byte range, image size, key (name)
    and column values of its samples. `columns`: names of the additional columns, which hold the values that data.filters
    tests. Raises OSError if writing fails.
    """
    with sealed_folder(folder) as temporary:
        with ExitStack() as files:
            writer = _Writer(columns, lambda name: files.enter_context(open(temporary / name, "wb")))
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
