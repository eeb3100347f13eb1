"""The record of one shard (tar file): a file with the byte range, image size, key and columns of each of its samples.

The columns are numbers from the samples' metadata, for data.filters.
The shard is read once to make the record. The index of a data set joins the records of its shards (write_index.py).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.remote import RemoteError
from raphael_dist.data.fetch.shard_cache import ShardError, ShardStore, Stamp, base_name, plain_name
from raphael_dist.data.shards.columns import ColumnCollector, parquet_columns
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.data.shards.tar_scan import EXTS, IMAGE_EXTS, DamagedShardError, TarSample, check_sample, iter_samples
from raphael_dist.errors import UserError
from raphael_dist.storage.checksummed import read_sealed, write_sealed
from raphael_dist.text import hide_secrets, parse_json

_VERSION = 6
BLOCK = 512
UNREACHED = Stamp(0, "")
DENIED = Stamp(-1, "denied")  # of a parquet file for which a server answers 401 or 403: S3 does so also if there is none
MAX_PARQUET_BYTES = 256 << 20
_ABOUT = ("num_bytes", "bad", "damage", "fingerprint", "content", "text_digest", "skipped")


@dataclass(frozen=True, eq=False)
class ShardRecord:
    """What is known about one shard (tar file): its usable samples, and the samples and files in it that are not usable.

    Each array has one row per usable sample.

    Attributes:
        name: Path or URL of the shard.
        stamp: Version of the file when it was read (see `Stamp`).
        num_bytes: Size of the uncompressed tar in bytes.
        places: uint32 [num_samples, 2], first block (512 bytes) of each sample in the tar, and number of blocks.
        sizes: int32 [num_samples, 2], width and height of each image in pixels.
        keys: Key (name in the shard) of each usable sample.
        bad: (key, reason) of each sample that cannot be used.
        damage: Why the shard could not be read to its end; "" if it could.
        fingerprint: SHA-256 of base name, size in bytes and keys. It does not depend on the folder.
        content: SHA-256 of everything that encoded samples depend on: fingerprint, texts, image sizes, offsets of the files.
        text_digest: SHA-256 of all txt and json files in the shard.
        columns: From the name of a column to its values for data.filters, float32 [num_samples] each (see columns.py).
        skipped: Files in the tar that belong to no sample: from the reason to (how many, name of the first one).
        parquet: Version of the parquet file next to the shard when it was read; None if there was none.
    """

    name: str
    stamp: Stamp
    num_bytes: int
    places: np.ndarray
    sizes: np.ndarray
    keys: list[str]
    bad: list[tuple[str, str]]
    damage: str
    fingerprint: str
    content: str
    text_digest: str
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    parquet: Stamp | None = None

    @property
    def num_samples(self) -> int:
        return len(self.keys)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the file in which `save_record` stores the record of a shard.

    `folder`: folder of the index. `name`: path or URL of the shard.
    """
    full_name = name if remote.is_remote(name) else str(Path(name).resolve())
    digest = hashlib.sha256(f"{_VERSION} {full_name}".encode()).hexdigest()
    return folder / "shards" / digest[:2] / f"{digest[:32]}.safetensors"


def load_record(folder: Path, name: str) -> ShardRecord | None:
    """Read the `ShardRecord` that `save_record` stored for a shard; return None if the record is missing or damaged.

    `folder`: folder that holds the records. `name`: path or URL of the shard.
    """
    try:
        arrays = load(read_sealed(record_path(folder, name)))
        about = parse_json(arrays.pop("about").tobytes().decode())
        columns = {array.removeprefix("column."): values for array, values in arrays.items() if array.startswith("column.")}
        stamp, parquet = Stamp(**about.pop("stamp")), about.pop("parquet")
        about["parquet"] = parquet and Stamp(**parquet)
        keys, bad = unpack_keys(arrays["keys"].tobytes()), [(key, why) for key, why in about.pop("bad")]
        places, sizes = arrays["places"], arrays["sizes"]
        if not len(keys) == len(places) == len(sizes):
            return None
        return ShardRecord(name=name, stamp=stamp, places=places, sizes=sizes, keys=keys, bad=bad, columns=columns, **about)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def save_record(folder: Path, record: ShardRecord) -> None:
    """Write a `ShardRecord` into `folder`, the folder of the index. Raises OSError if this fails.

    Several processes may write the record of the same shard at once.
    """
    about = {"stamp": asdict(record.stamp), "parquet": record.parquet and asdict(record.parquet)}
    about |= {key: getattr(record, key) for key in _ABOUT}
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "places": record.places,
        "sizes": record.sizes,
        "keys": np.frombuffer(pack_keys(record.keys), np.uint8),
        **{f"column.{name}": values for name, values in record.columns.items()},
    }
    write_sealed(record_path(folder, record.name), save(arrays))


def scan_shard(store: ShardStore, name: str) -> ShardRecord:
    """Read a shard (tar file) and return its record: the byte range, image size, key and columns of each sample.

    The columns are numbers from the samples' metadata, for data.filters.
    `store`: provides the shard as a local file. `name`: path or URL of the shard. If the shard cannot be read to its
    end, `damage` of the record states the reason.

    Raises:
        ShardError: The shard does not exist or cannot be reached, or the parquet file next to it cannot be reached.
        UserError: The parquet file cannot be used; or the shard is remote or gzipped, and there is no folder to store it or
            no library to download it.
    """
    stamp, num_bytes, rows = store.stamp(name), 0, _Rows()
    try:
        stamp, path = store.fetch_new(name, stamp)
        num_bytes = path.stat().st_size
        with open(path, "rb") as file:
            for sample in iter_samples(file, rows.skipped):
                rows.add(file.fileno(), sample)
    except DamagedShardError as error:
        rows.damage = str(error)
    except OSError as error:
        raise ShardError(name, f"{error.filename or name}: {error.strerror or error}") from error
    record = rows.record(name, stamp, num_bytes)
    parquet = parquet_stamp(store, name)
    if parquet not in (None, DENIED) and record.keys:
        record.columns.update(_read_parquet(store, name, parquet, record.keys))
    return replace(record, parquet=parquet)


def unreached_record(name: str, reason: str) -> ShardRecord:
    """Return a record without samples, for a shard that does not exist or whose stored record is missing or damaged.

    `name`: path or URL of the shard. `reason`: stored as the record's `damage`.
    """
    rows = _Rows()
    rows.damage = reason
    return rows.record(name, UNREACHED, 0)


class _Rows:
    """Collects the samples of a shard while the shard is read, and creates the shard's `ShardRecord`."""

    def __init__(self) -> None:
        self.damage = ""
        self.skipped = SkipCounts()
        self._keys: dict[str, None] = {}
        self._bad: list[tuple[str, str]] = []
        self._places: list[tuple[int, int]] = []
        self._sizes: list[tuple[int, int]] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        self._texts = hashlib.sha256()
        self._seen: set[str] = set()
        self._columns = ColumnCollector()

    def add(self, descriptor: int, sample: TarSample) -> None:
        """Check a sample, and add it to the usable or to the bad samples. `descriptor`: file descriptor of the tar."""
        try:
            if sample.key in self._seen:
                raise ValueError("duplicate key")
            self._seen.add(sample.key)
            if "\0" in sample.key:
                raise ValueError("the sample's key contains a NUL character")
            size, meta = check_sample(descriptor, sample, self._texts.update)
        except ValueError as error:
            self._bad.append((sample.key, str(error)))
            return
        if sum(ext in sample.members for ext in IMAGE_EXTS) > 1:
            self.skipped.add("further image of the same key", sample.key)
        json_size = meta.get("width"), meta.get("height")
        if all(isinstance(side, int | float) for side in json_size) and json_size != size:
            self.skipped.add("json width and height that differ from the upright image; the image size is used", sample.key)
        first = sample.start // BLOCK
        self._keys[sample.key] = None
        self._places.append((first, -(-sample.end // BLOCK) - first))
        self._sizes.append(size)
        self._members.append(sample.members)
        self._columns.add(meta)

    def record(self, name: str, stamp: Stamp, num_bytes: int) -> ShardRecord:
        """Return the record of the samples that were added.

        `name`: path or URL of their shard. `stamp`: version of its file. `num_bytes`: size of its uncompressed tar.
        """
        keys, texts = list(self._keys), self._texts.hexdigest()
        sizes = np.array(self._sizes, np.int32).reshape(len(keys), 2)
        fingerprint = hashlib.sha256(json.dumps([plain_name(name), num_bytes, keys]).encode()).hexdigest()
        return ShardRecord(
            name=name,
            stamp=stamp,
            num_bytes=num_bytes,
            places=np.array(self._places, np.uint32).reshape(len(keys), 2),
            sizes=sizes,
            keys=keys,
            bad=self._bad,
            damage=self.damage,
            fingerprint=fingerprint,
            content=_content(fingerprint, texts, sizes, self._members),
            text_digest=texts,
            columns=self._columns.columns(),
            skipped=self.skipped.counts,
        )


def _content(fingerprint: str, texts: str, sizes: np.ndarray, members: list[dict[str, tuple[int, int]]]) -> str:
    table = np.array([[row.get(ext, (0, -1)) for ext in EXTS] for row in members], np.int64)
    digest = hashlib.sha256(f"{fingerprint} {texts}".encode())
    digest.update(sizes.tobytes() + table.tobytes())
    return digest.hexdigest()


def parquet_stamp(store: ShardStore, name: str) -> Stamp | None:
    """Return the present version of the parquet file that img2dataset writes next to a shard.

    `store`: provides the shard. `name`: path or URL of the shard.

    Returns:
        The version. None: there is no parquet file, or the shard's URL has a query (such as a signature), which would not be
        valid for another file. DENIED: the server denies access, so it is unknown whether there is a parquet file.

    Raises:
        ShardError: The server fails.
    """
    if not name.endswith(base_name(name)):
        return None
    parquet = _parquet_name(name)
    try:
        stamp = store.stamp(parquet)
    except ShardError as error:
        if error.absent:
            return None
        if isinstance(error.__cause__, RemoteError) and error.__cause__.denied:
            return DENIED
        reason = f"its parquet file {error.reason} (only the status 404 or 410 means that there is none)"
        raise ShardError(name, reason) from error
    return None if not remote.is_remote(parquet) and Path(parquet).is_dir() else stamp


def _parquet_name(name: str) -> str:
    return name[: len(name) - len(base_name(name))] + plain_name(name).removesuffix(".tar") + ".parquet"


def _read_parquet(store: ShardStore, name: str, stamp: Stamp, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns in the parquet file next to a shard, by name: float32 [len(keys)] each.

    `store`: states how failed downloads are repeated. `name`: path or URL of the shard. `stamp`: version of the parquet
    file. `keys`: keys (names) of the shard's samples, in order. ShardError: the server fails. UserError: the file cannot be
    used.
    """
    parquet = _parquet_name(name)
    try:
        if stamp.num_bytes > MAX_PARQUET_BYTES:
            raise ValueError(f"the file has {stamp.num_bytes} bytes, but at most {MAX_PARQUET_BYTES} are allowed")
        if remote.is_remote(name):
            data = b"".join(remote.pieces(parquet, stamp.num_bytes, store.retry))
        else:
            data = Path(parquet).read_bytes()
        return parquet_columns(data, keys)
    except RemoteError as error:
        raise ShardError(name, f"its parquet file {error}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.shards: {hide_secrets(parquet)}, the parquet file of a shard, cannot be read: {error}. Write or "
            "copy it again, or remove it."
        ) from error


def pack_keys(keys: Sequence[str]) -> bytes:
    """Join the keys (names) of a shard's samples into one byte string: UTF-8, with a zero byte after each key."""
    return "".join(f"{key}\0" for key in keys).encode("utf-8", "surrogateescape")


def unpack_keys(data: bytes) -> list[str]:
    """Return the list of keys (names of samples) from which `pack_keys` has made the byte string `data`."""
    return data.decode("utf-8", "surrogateescape").split("\0")[:-1]
