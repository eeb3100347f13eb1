"""A view on an index: which samples pass the filters, and which bucket (image size) each of them is in.

It is worked out once and kept beside the table, a byte a sample, memory-mapped like it.
"""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael_dist.config import Filter
from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.columns import word_code
from raphael_dist.data.index import DatasetIndex
from raphael_dist.errors import UserError

DROPPED = -1
_VERSION = 1
_ROWS = 1 << 17  # samples at a time
Buckets = tuple[tuple[int, int], ...]
# Columns that every sample has, from its width and height in pixels.
SIZE_COLUMNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "width": lambda w, h: w,
    "height": lambda w, h: h,
    "short_side": lambda w, h: np.minimum(w, h),
    "pixels": lambda w, h: w * h,
    "ratio": lambda w, h: np.maximum(w, h) / np.minimum(w, h),
}


@dataclass(frozen=True, eq=False)
class View:
    """What a data set's samples are used as.

    bucket_of int8 or int16 [num_samples]: the bucket of each sample id, DROPPED where a filter drops it. counts int64
    [num_shards, num_buckets]: samples of each bucket in each shard. dropped: of each filter, in words, the number it drops
    and the number of samples without a value. digest: of all that, for a run's identity.
    """

    buckets: Buckets
    bucket_of: np.ndarray
    counts: np.ndarray
    dropped: dict[str, tuple[int, int]]
    digest: str

    def describe(self) -> list[str]:
        """Return lines on what is dropped and how the rest divides among the buckets."""
        lines = [
            f"filter {words}: {dropped:,} samples dropped" + (f" ({missing:,} samples have no value)" if missing else "")
            for words, (dropped, missing) in self.dropped.items()
        ]
        totals = self.counts.sum(axis=0).tolist()
        sizes = [f"{height}x{width}: {count:,}" for (height, width), count in zip(self.buckets, totals, strict=True)]
        return [*lines, f"{sum(totals):,} samples in buckets (height x width) {', '.join(sizes)}"]


def columns_of(filters: Sequence[Filter]) -> list[str]:
    """Return the columns that the table must have for these filters."""
    return sorted({one.column for one in filters} - set(SIZE_COLUMNS))


def open_view(index: DatasetIndex, buckets: Sequence[tuple[int, int]], filters: Sequence[Filter] = ()) -> View:
    """Return the view of an index in memory, or, of a table in a folder, memory-mapped, written first if need be.

    UserError: no bucket; a filter's column is unknown, or lacks a value and the filter says error; nothing is left.
    """
    if not buckets:
        raise UserError("data: number of buckets is 0; it must be at least 1")
    sizes = tuple((int(height), int(width)) for height, width in buckets)
    if index.folder is None:
        return _checked(_make(index, sizes, filters, np.zeros(index.num_samples, _kind(sizes))), index)
    parts = [_VERSION, index.about["whole"], index.folder.name, sizes, [one.model_dump(mode="json") for one in filters]]
    folder = index.folder.parent.parent / "views" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    if not (folder / "view.json").is_file():
        _write(folder, index, sizes, filters)
    try:
        about = json.loads((folder / "view.json").read_text())
        bucket_of, counts = np.load(folder / "bucket_of.npy", mmap_mode="r"), np.load(folder / "counts.npy")
        dropped = {words: (int(count), int(missing)) for words, (count, missing) in about["dropped"].items()}
        if len(bucket_of) != index.num_samples or len(counts) != len(index.shards):
            raise ValueError("it is of other shards")
        return _checked(View(sizes, bucket_of, counts, dropped, about["digest"]), index)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"data.cache_dir: the view {folder} cannot be read ({error}); delete it, it is made again"
        ) from error


def _checked(view: View, index: DatasetIndex) -> View:
    if not view.counts.any():
        raise UserError(
            f"data.filters: they drop all {index.num_samples} samples: {'; '.join(view.describe()[:-1])}; loosen them"
        )
    return view


def _kind(buckets: Buckets) -> Any:
    return np.int8 if len(buckets) < 128 else np.int16


def _write(folder: Path, index: DatasetIndex, buckets: Buckets, filters: Sequence[Filter]) -> None:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        path, shape = temporary / "bucket_of.npy", (index.num_samples,)
        bucket_of = np.lib.format.open_memmap(path, "w+", dtype=_kind(buckets), shape=shape)
        view = _make(index, buckets, filters, bucket_of)
        bucket_of.flush()
        np.save(temporary / "counts.npy", view.counts)
        (temporary / "view.json").write_text(json.dumps({"dropped": view.dropped, "digest": view.digest}))
        if not (folder / "view.json").is_file():
            os.rename(temporary, folder)  # noqa: PTH104  # of two processes one wins, and both wrote the same
    except OSError as error:
        if not (folder / "view.json").is_file():
            raise UserError(f"data.cache_dir: {folder}: {error.strerror or error}; check room and rights") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make(index: DatasetIndex, buckets: Buckets, filters: Sequence[Filter], bucket_of: np.ndarray) -> View:
    """Fill `bucket_of`, and return the view."""
    tallies = [_Tally(one, index) for one in filters]
    size, digest = index.arrays["size"], hashlib.sha256(json.dumps(buckets).encode())
    for first in range(0, index.num_samples, _ROWS):
        rows = slice(first, min(first + _ROWS, index.num_samples))
        sizes = np.asarray(size[rows])
        found = _buckets_of(sizes, buckets)
        kept = np.ones(len(found), bool)
        for tally in tallies:
            kept &= tally.passes(rows, sizes, kept)
        part = np.where(kept, found, DROPPED).astype(bucket_of.dtype)
        bucket_of[rows] = part
        digest.update(part.astype(np.int16).tobytes())
    return View(
        buckets,
        bucket_of,
        _counts(index, bucket_of, len(buckets)),
        {t.words: t.counted for t in tallies},
        digest.hexdigest(),
    )


def _buckets_of(sizes: np.ndarray, buckets: Buckets) -> np.ndarray:
    """Return the nearest bucket of each row (width, height), worked out once for each size that occurs."""
    packed = sizes[:, 0].astype(np.uint32) << 16 | sizes[:, 1]
    distinct, place = np.unique(packed, return_inverse=True)
    return nearest_buckets(distinct >> 16, distinct & 0xFFFF, buckets)[place]


def _counts(index: DatasetIndex, bucket_of: np.ndarray, num_buckets: int) -> np.ndarray:
    starts = index.starts.tolist()
    counts = np.zeros((len(starts) - 1, num_buckets), np.int64)
    for shard, (first, end) in enumerate(itertools.pairwise(starts)):
        part = bucket_of[first:end]
        counts[shard] = np.bincount(part[part >= 0], minlength=num_buckets)
    return counts


class _Tally:
    """One filter at work: what passes, and how many samples it has dropped so far."""

    def __init__(self, rule: Filter, index: DatasetIndex) -> None:
        self._rule, self._index = rule, index
        self._dropped = self._missing = 0
        self._column = index.arrays.get(f"column.{rule.column}")
        self._codes = [word_code(word) for word in rule.words]
        self.words = rule.describe()
        if self._column is None and rule.column not in SIZE_COLUMNS and rule.on_missing == "error":
            raise self._unknown()

    @property
    def counted(self) -> tuple[int, int]:
        return self._dropped, self._missing

    def passes(self, rows: slice, sizes: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Return bool [rows], and count what is dropped of those that are `kept` so far."""
        values = self._values(rows, sizes)
        missing = np.isnan(values)
        if self._rule.on_missing == "error" and missing.any():
            key = self._index.key(rows.start + int(missing.argmax()))
            raise UserError(
                f"data.filters: {self._rule.column!r} has no value for {key!r} and maybe others; "
                "set on_missing to keep or drop in this filter"
            )
        with np.errstate(invalid="ignore"):
            good = np.ones(len(values), bool)
            if self._rule.min is not None:
                good &= values >= np.float32(self._rule.min)
            if self._rule.max is not None:
                good &= values <= np.float32(self._rule.max)
            if self._codes:
                good &= np.isin(values, np.array(self._codes, np.float32))
        good = np.where(missing, self._rule.on_missing == "keep", good)
        self._missing += int(np.count_nonzero(missing & kept))
        self._dropped += int(np.count_nonzero(kept & ~good))
        return good

    def _values(self, rows: slice, sizes: np.ndarray) -> np.ndarray:
        if self._rule.column in SIZE_COLUMNS:
            width, height = sizes.astype(np.float32).T
            return SIZE_COLUMNS[self._rule.column](width, height)
        return np.full(len(sizes), np.nan, np.float32) if self._column is None else np.asarray(self._column[rows])

    def _unknown(self) -> UserError:
        known = ", ".join([*self._index.known_columns[:20], *SIZE_COLUMNS])
        return UserError(f"data.filters: no sample has the column {self._rule.column!r}; known: {known}")
