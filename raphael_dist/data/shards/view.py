"""The view of an index (table of all samples): which samples pass data.filters, and the bucket (image size) of each of them.

The view is computed once for an index, filters and image sizes, stored next to the index, and memory-mapped. It takes one
byte per sample.
"""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raphael_dist.config.data_sections import Filter
from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.shards.columns import word_code
from raphael_dist.data.shards.dataset_index import DatasetIndex, cannot_write
from raphael_dist.errors import UserError
from raphael_dist.storage.checksummed import folder_damage, sealed_folder
from raphael_dist.text import counted

_log = logging.getLogger(__name__)
DROPPED = -1
_VERSION = 1
_COLUMNS_SHOWN = 20
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
    """Which samples of an index (table of all samples) pass data.filters, and the bucket (image size) of each of them.

    Attributes:
        buckets: (height, width) of each bucket in pixels.
        bucket_of: int8 or int16 [num_samples], the bucket number of each sample id; DROPPED (-1) if a filter drops it.
        counts: int64 [num_shards, num_buckets], number of samples of each bucket in each shard.
        dropped: From the text of a filter, such as "score >= 0.5", to (number of samples that it drops, number of samples
            that have no value in its column).
        digest: SHA-256 (hex) of `buckets` and `bucket_of`, which becomes a part of the run's fingerprint.
    """

    buckets: Buckets
    bucket_of: np.ndarray
    counts: np.ndarray
    dropped: dict[str, tuple[int, int]]
    digest: str

    def describe(self) -> list[str]:
        """Return lines for the log: for each filter, how many samples it drops; then the number of samples of each size."""
        lines = [
            f"filter {words}: {counted(dropped, 'sample', ',')} dropped"
            + (f" ({missing:,} without a value)" if missing else "")
            for words, (dropped, missing) in self.dropped.items()
        ]
        totals = self.counts.sum(axis=0).tolist()
        sizes = [f"{height}x{width}: {count:,}" for (height, width), count in zip(self.buckets, totals, strict=True)]
        return [*lines, f"{counted(sum(totals), 'sample', ',')} in buckets (height x width) {', '.join(sizes)}"]


def columns_of(filters: Sequence[Filter]) -> list[str]:
    """Return the names of the columns (fields of the samples' metadata) that these filters read, sorted.

    Columns that are computed from the image size, such as width and ratio, are left out.
    """
    return sorted({rule.column for rule in filters} - set(SIZE_COLUMNS))


def filter_columns(index: DatasetIndex) -> list[str]:
    """Return, for a message, the names of columns that data.filters may use with the samples of `index`.

    They are at most 20 columns from the samples' metadata, followed by "..." if there are more; then those computed from the
    image size ("width", "ratio", ...).
    """
    known = [name for name in index.known_columns if name not in SIZE_COLUMNS]
    return [*known[:_COLUMNS_SHOWN], *(["..."] if len(known) > _COLUMNS_SHOWN else []), *SIZE_COLUMNS]


def open_view(
    index: DatasetIndex, buckets: Sequence[tuple[int, int]], filters: Sequence[Filter] = (), check: bool = True
) -> View:
    """Return which samples of an index pass the filters, and the bucket (image size) of each of them.

    The result is stored next to the index, and is only computed if it is missing.

    Args:
        index: The index: a table of all samples of the shards (tar files).
        buckets: (height, width) of each bucket in pixels.
        filters: The rules that a sample must fulfil.
        check: Verify the checksums of the stored files, and compute the files again if they do not match. False: skip this,
            since another process has just done it.

    Raises:
        UserError: There is no bucket; no sample has the column of a filter; a sample has no value in it and the filter has
            on_missing=error; or no sample passes.
    """
    if not buckets:
        raise UserError("image.buckets=[] must have at least one size. Add one, for example [512, 512].")
    sizes = tuple((int(height), int(width)) for height, width in buckets)
    parts = [_VERSION, index.about["whole"], index.folder.name, sizes, [rule.model_dump(mode="json") for rule in filters]]
    folder = index.folder.parent.parent / "views" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    if check and (damage := folder_damage(folder)):
        if folder.is_dir():
            _log.warning(
                "data.cache_dir: the list of the samples by image size is damaged (%s), so it is written again", damage
            )
            shutil.rmtree(folder, ignore_errors=True)
        _write(folder, index, sizes, filters)
    try:
        about = json.loads((folder / "view.json").read_text())
        bucket_of, counts = np.load(folder / "bucket_of.npy", mmap_mode="r"), np.load(folder / "counts.npy")
        dropped = {words: (int(count), int(missing)) for words, (count, missing) in about["dropped"].items()}
        if len(bucket_of) != index.num_samples or len(counts) != index.num_shards:
            raise ValueError("this list was written for other shards")
        view = View(sizes, bucket_of, counts, dropped, about["digest"])
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"data.cache_dir: the list of the samples by image size in {folder} cannot be read ({error}). Delete this "
            "folder; the next start creates it again."
        ) from error
    return _check_not_empty(view, index)


def _check_not_empty(view: View, index: DatasetIndex) -> View:
    if not view.counts.any():
        raise UserError(
            f"data.filters must keep at least one sample, but they drop all {index.num_samples} samples: "
            f"{'; '.join(view.describe()[:-1])}. Make the filters less strict."
        )
    return view


def _dtype(buckets: Buckets) -> type[np.int8] | type[np.int16]:
    return np.int8 if len(buckets) < 128 else np.int16


def _write(folder: Path, index: DatasetIndex, buckets: Buckets, filters: Sequence[Filter]) -> None:
    try:
        with sealed_folder(folder) as temporary:
            path, shape = temporary / "bucket_of.npy", (index.num_samples,)
            bucket_of = np.lib.format.open_memmap(path, "w+", dtype=_dtype(buckets), shape=shape)
            view = _compute(index, buckets, filters, bucket_of)
            bucket_of.flush()
            np.save(temporary / "counts.npy", view.counts)
            (temporary / "view.json").write_text(json.dumps({"dropped": view.dropped, "digest": view.digest}))
    except OSError as error:
        raise cannot_write(folder, error) from error


def _compute(index: DatasetIndex, buckets: Buckets, filters: Sequence[Filter], bucket_of: np.ndarray) -> View:
    """Apply the filters to all samples of `index`; return the view: which samples pass, and the bucket (image size) of each.

    `bucket_of`: array [num_samples], to which the bucket numbers are written. It becomes a part of the view.
    """
    rules = [_FilterRule(rule, index) for rule in filters]
    size, digest = index.arrays["size"], hashlib.sha256(json.dumps(buckets).encode())
    for first in range(0, index.num_samples, _ROWS):
        rows = slice(first, min(first + _ROWS, index.num_samples))
        sizes = np.asarray(size[rows])
        nearest = _nearest_buckets(sizes, buckets)
        is_kept = np.ones(len(nearest), bool)
        for rule in rules:
            is_kept &= rule.passes(rows, sizes, is_kept)
        part = np.where(is_kept, nearest, DROPPED).astype(bucket_of.dtype)
        bucket_of[rows] = part
        digest.update(part.astype(np.int16).tobytes())
    counts = _count_buckets(index, bucket_of, len(buckets))
    dropped = {rule.words: (rule.num_dropped, rule.num_missing) for rule in rules}
    return View(buckets, bucket_of, counts, dropped, digest.hexdigest())


def _nearest_buckets(sizes: np.ndarray, buckets: Buckets) -> np.ndarray:
    """Return the number of the bucket nearest to each image size, int64 [N]. `sizes`: uint16 [N, 2], width and height.

    The bucket of equal sizes is computed only once.
    """
    packed = sizes[:, 0].astype(np.uint32) << 16 | sizes[:, 1]
    distinct, place = np.unique(packed, return_inverse=True)
    return nearest_buckets(distinct >> 16, distinct & 0xFFFF, buckets)[place]


def _count_buckets(index: DatasetIndex, bucket_of: np.ndarray, num_buckets: int) -> np.ndarray:
    starts = index.starts.tolist()
    counts = np.zeros((len(starts) - 1, num_buckets), np.int64)
    for shard, (first, end) in enumerate(itertools.pairwise(starts)):
        part = bucket_of[first:end]
        counts[shard] = np.bincount(part[part >= 0], minlength=num_buckets)
    return counts


class _FilterRule:
    """Applies one filter and counts the samples that it drops."""

    def __init__(self, rule: Filter, index: DatasetIndex) -> None:
        self._rule, self._index = rule, index
        self.num_dropped = self.num_missing = 0
        self._column = index.arrays.get(f"column.{rule.column}")
        self._codes = [word_code(word) for word in rule.words]
        self.words = rule.describe()
        if self._column is None and rule.column not in SIZE_COLUMNS and rule.on_missing == "error":
            raise UserError(
                f"data.filters: the column {rule.column!r} must exist in the samples, but no sample has it. Use one of "
                f"{', '.join(filter_columns(index))}."
            )

    def passes(self, rows: slice, sizes: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
        """Return which samples pass this filter, bool [rows]. Count the samples that this filter is the first to drop.

        Args:
            rows: Sample ids, to which the filter is applied.
            sizes: [rows, 2], width and height of each of these samples.
            is_kept: bool [rows], whether all earlier filters keep the sample.
        """
        values = self._values(rows, sizes)
        missing = np.isnan(values)
        if self._rule.on_missing == "error" and missing.any():
            key = self._index.key(rows.start + int(missing.argmax()))
            raise UserError(
                f"data.filters: the column {self._rule.column!r} must have a value in every sample, but sample {key!r} has "
                "none. Set on_missing to keep or drop in this filter."
            )
        with np.errstate(invalid="ignore"):
            passes = np.ones(len(values), bool)
            if self._rule.min is not None:
                passes &= values >= np.float32(self._rule.min)
            if self._rule.max is not None:
                passes &= values <= np.float32(self._rule.max)
            if self._codes:
                passes &= np.isin(values, np.array(self._codes, np.float32))
        passes = np.where(missing, self._rule.on_missing == "keep", passes)
        self.num_missing += int(np.count_nonzero(missing & is_kept))
        self.num_dropped += int(np.count_nonzero(is_kept & ~passes))
        return passes

    def _values(self, rows: slice, sizes: np.ndarray) -> np.ndarray:
        if self._rule.column in SIZE_COLUMNS:
            width, height = sizes.astype(np.float32).T
            return SIZE_COLUMNS[self._rule.column](width, height)
        return np.full(len(sizes), np.nan, np.float32) if self._column is None else np.asarray(self._column[rows])
