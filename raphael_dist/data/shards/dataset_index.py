"""The index of a data set: a table with the byte range and the image size of each sample in the shards (tar files).

It is memory-mapped, so that all processes of a node share one copy in memory. The table is a folder with these files, for N
usable samples in S shards:

| file | type and shape | content |
|---|---|---|
| place.npy | uint32 [N, 2] | first block (512 bytes) of the sample in its shard, and number of blocks |
| size.npy | uint16 [N, 2] | width and height in pixels; if one exceeds 65,535, both are scaled down by the same factor |
| column.NAME.npy | float32 [N] | values of a column that data.filters use, NaN for a sample without a value |
| keys.bin | bytes | the keys (names) of the samples of each shard, compressed; 2 to 3 bytes per sample for LAION |
| bad.bin | bytes | for each shard, the list of (key, reason) of the samples that cannot be used, as compressed JSON |
| shards.npy | int64 [S + 1, 5] | see below |
| shards.json | | name, version, digests and damage of each shard; number of skipped files; digests of the data set |
| sums.json | | size and SHA-256 of the files above, which are checked when the table is opened (storage/checksummed.py) |

Row s of shards.npy has five numbers. The first four are sums over the shards before shard s: number of samples, bytes in
keys.bin, bytes in bad.bin, number of bad samples. The last one is the size of the uncompressed tar of shard s in bytes.

A sample takes 15 bytes and 4 bytes for each column.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from raphael_dist.data.fetch.shard_cache import ShardStore, Stamp, plain_name
from raphael_dist.data.shards.shard_record import BLOCK, unpack_keys
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject, hide_secrets

VERSION = 4
SAMPLES, KEYS, BAD, NUM_BAD, BYTES = range(5)  # columns of shards.npy
DIGESTS = ("fingerprint", "content", "text_digest")
_SHARDS_IN_MEMORY = 20


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used for training.

    Attributes:
        shard: Base name of the shard (tar file) that contains it.
        key: Name of the sample in the shard.
        reason: Why it cannot be used.
    """

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key!r}: {self.reason}"


class BadSampleError(Exception):
    """Raised if a sample cannot be used, e.g. because its image is damaged. `sample`: its shard and name, and the reason."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(sample)
        self.sample = sample


@dataclass(frozen=True)
class Shard:
    """A shard (tar file of samples) of an index, which is a table of all samples.

    Attributes:
        source: Path or URL of the shard, as configured.
        stamp: Version of the file when it was indexed (see `Stamp`).
        content: SHA-256 of everything in the shard that encoded samples depend on, such as texts and image sizes.
        num_samples: Number of usable samples.
    """

    source: str
    stamp: Stamp
    content: str
    num_samples: int

    @property
    def name(self) -> str:
        """The base name of the shard's uncompressed tar: a.tar for a.tar.gz."""
        return plain_name(self.source)


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The index of a data set: where each usable sample lies in the shards, its image size, and the values for filters.

    A sample id is the number of a usable sample, counted from 0 over all shards in order. An index can be sent to other
    processes, which open the files again.

    Attributes:
        store: Provides the shards (tar files of samples) as local files.
        arrays: The arrays of the index by name ("place", "size", "column.NAME", "shards"); see the top of this file.
        packed_keys: The keys (names) of all usable samples, compressed (the file keys.bin).
        packed_bad: Key and reason of all samples that cannot be used, compressed (bad.bin).
        about: Facts about each shard and the data set, such as names and digests (shards.json).
        folder: The folder in which the index is stored.
    """

    store: ShardStore
    arrays: dict[str, np.ndarray]
    packed_keys: np.ndarray | bytes
    packed_bad: np.ndarray | bytes
    about: JsonObject
    folder: Path

    def __reduce__(self) -> tuple[object, ...]:
        names = self.about["names"]
        has_secrets = any(hide_secrets(name) != name for name in names)  # which the stored names lack
        return open_table, (self.folder, self.store, names if has_secrets else None)

    @property
    def num_shards(self) -> int:
        """The number of shards (tar files), also of those without usable samples."""
        return len(self.about["names"])

    def shard(self, number: int) -> Shard:
        """Return the description of a shard. `number`: number of the shard in the index, from 0."""
        first, end = self.starts[number : number + 2].tolist()
        about = self.about
        return Shard(about["names"][number], Stamp(*about["stamps"][number]), about["content"][number], end - first)

    @cached_property
    def keys(self) -> Callable[[int], list[str]]:
        """Function from the number of a shard to the keys (names) of its usable samples. It keeps those of 20 shards."""
        return lru_cache(maxsize=_SHARDS_IN_MEMORY)(self._read_keys)

    def _read_keys(self, shard: int) -> list[str]:
        first, end = self.arrays["shards"][shard : shard + 2, KEYS].tolist()
        return unpack_keys(zlib.decompress(bytes(self.packed_keys[first:end])))

    @cached_property
    def starts(self) -> np.ndarray:
        """The first sample id of each shard, followed by the number of all samples; int64 [num_shards + 1]."""
        return np.ascontiguousarray(self.arrays["shards"][:, SAMPLES])

    @property
    def num_samples(self) -> int:
        return int(self.arrays["shards"][-1, SAMPLES])

    @property
    def num_bad(self) -> int:
        """The number of unusable samples in the shards. These samples have no sample id."""
        return int(self.arrays["shards"][-1, NUM_BAD])

    @property
    def num_bytes(self) -> np.ndarray:
        """The size of each shard's uncompressed tar in bytes, int64 [num_shards]."""
        return self.arrays["shards"][:-1, BYTES]

    @property
    def bad(self) -> list[BadSample]:
        """All unusable samples in the shards. There may be millions; `iter_bad` yields them one by one."""
        return list(self.iter_bad())

    def iter_bad(self) -> Iterator[BadSample]:
        """Yield the unusable samples in the shards, one by one, with the reason, in the order of the shards."""
        for shard in np.flatnonzero(np.diff(self.arrays["shards"][:, NUM_BAD])).tolist():
            first, end = self.arrays["shards"][shard : shard + 2, BAD].tolist()
            for key, reason in json.loads(zlib.decompress(bytes(self.packed_bad[first:end]))):
                yield BadSample(plain_name(self.about["names"][shard]), key, reason)

    @cached_property
    def damaged(self) -> dict[int, str]:
        """The shards that could not be read to their end: from the number of the shard to the reason."""
        return {int(shard): reason for shard, reason in self.about["damage"].items()}

    @property
    def skipped(self) -> SkipCounts:
        """The number of files in the shards that belong to no sample, by reason."""
        return SkipCounts(self.about["skipped"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the base names, sizes in bytes and sample keys (names) of all shards, in order."""
        return str(self.about["whole"]["fingerprint"])

    @property
    def text_digest(self) -> str:
        """SHA-256 (hex) of the txt and json files of all samples, in order. It changes if a caption changes."""
        return str(self.about["whole"]["text_digest"])

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the index stores: values from the samples' metadata that data.filters use."""
        return [name.removeprefix("column.") for name in self.arrays if name.startswith("column.")]

    @property
    def known_columns(self) -> list[str]:
        """Names of all columns that the samples have: values from their metadata that data.filters could use.

        The index stores the values only for those in `columns`.
        """
        return list(self.about["known"])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return (shard number, sample number in the shard) of a sample id. IndexError: there is no such id."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} outside 0..{self.num_samples - 1}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def key(self, sample_id: int) -> str:
        shard, number = self.locate(sample_id)
        return self.keys(shard)[number]

    def span(self, sample_id: int) -> tuple[int, int]:
        """Return (offset, size) in bytes of the part of a shard's uncompressed tar that contains all files of a sample."""
        first, blocks = self.arrays["place"][sample_id].tolist()
        return first * BLOCK, blocks * BLOCK

    def bad_sample(self, sample_id: int, reason: str) -> BadSample:
        """Return the `BadSample` for the sample with this id, which cannot be used. `reason`: why it cannot be used."""
        shard, number = self.locate(sample_id)
        return BadSample(self.shard(shard).name, self.keys(shard)[number], reason)


def open_table(folder: Path, store: ShardStore, names: Sequence[str] | None = None) -> DatasetIndex:
    """Open the index (table of all samples of the shards) that is stored in `folder`. Its arrays are memory-mapped.

    Args:
        folder: The folder with the files of the index.
        store: Provides the shards as local files.
        names: Complete names of the shards, required if URLs contain secrets (passwords, signatures): the index stores
            names without secrets. None: use the names in the index.

    Raises:
        UserError: The index is damaged, or was written by another version of this package.
    """
    try:
        about = json.loads((folder / "shards.json").read_text())
        about["names"] = about["names"] if names is None else list(names)
        if about["version"] != VERSION:
            raise ValueError(f"the index has version {about['version']}, but this package reads version {VERSION}")
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        arrays["shards"] = np.array(arrays["shards"])
        keys, bad = _map_bytes(folder / "keys.bin"), _map_bytes(folder / "bad.bin")
        if len(arrays["place"]) != len(arrays["size"]) or len(arrays["place"]) != arrays["shards"][-1, SAMPLES]:
            raise ValueError("the files of the index have different numbers of samples")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.cache_dir: the index of the shards in {folder} cannot be read ({error}). Delete this folder; the next "
            "start creates it again."
        ) from error
    return DatasetIndex(store, arrays, keys, bad, about, folder)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the UserError for a file or folder `path` in data.cache_dir that cannot be written."""
    return UserError(
        f"data.cache_dir: {error.filename or path} cannot be written: {error.strerror or error}. Check free space and "
        "permissions."
    )


def _map_bytes(path: Path) -> np.ndarray | bytes:
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else b""
