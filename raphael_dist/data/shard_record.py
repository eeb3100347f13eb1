"""What is known of one shard: where its samples lie, their image sizes, keys and columns; one file of each, written once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from raphael_dist.data import remote
from raphael_dist.data.columns import ColumnCollector, parquet_columns
from raphael_dist.data.remote import RemoteError
from raphael_dist.data.shard_store import ShardError, ShardStore, Stamp, base_name, plain_name
from raphael_dist.data.tar_scan import EXTS, DamagedError, FoundSample, check_sample, samples_of
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path

_VERSION = 2
BLOCK = 512
# Members that were there when digests were first written; a later kind counts only where a shard has it.
_FIRST_EXTS = ("webp", "png", "jpg", "jpeg", "json", "txt", "edge.png")
_MAX_PARQUET_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class ShardRecord:
    """The usable samples of one tar, a row of each array for each, and its bad ones.

    name: path or URL. stamp: of the file that was given. num_bytes: of the plain tar. places uint32 [num_samples, 2]: first
    block and number of blocks (512 bytes) of each sample. sizes int32 [num_samples, 2]: width and height in pixels.
    columns: float32 [num_samples] by name. bad: (key, reason). damage: why the shard has no more samples, or "".
    fingerprint: sha256 over base name, size in bytes and keys: the same in any folder. content: over all that features
    depend on: fingerprint, texts, image sizes, and where each member lies. text_digest: over all txt and json members.
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

    @property
    def num_samples(self) -> int:
        return len(self.keys)


def record_path(folder: Path, name: str) -> Path:
    """Return where the record of the shard `name` lies in an index folder."""
    whole = name if remote.is_remote(name) else str(Path(name).resolve())
    digest = hashlib.sha256(f"{_VERSION} {whole}".encode()).hexdigest()
    return folder / "shards" / digest[:2] / f"{digest[:32]}.safetensors"


def load_record(folder: Path, name: str) -> ShardRecord | None:
    """Return the record of a shard, or None where there is none that reads."""
    try:
        with safe_open(record_path(folder, name), framework="np") as file:
            about = json.loads(file.metadata()["about"])
            arrays = {array: file.get_tensor(array) for array in file.keys()}  # noqa: SIM118
        columns = {array.removeprefix("column."): values for array, values in arrays.items() if array.startswith("column.")}
        stamp = Stamp(**about.pop("stamp"))
        keys, bad = unpack_keys(arrays["keys"].tobytes()), [(key, why) for key, why in about.pop("bad")]
        found = ShardRecord(
            name=name,
            stamp=stamp,
            places=arrays["places"],
            sizes=arrays["sizes"],
            keys=keys,
            bad=bad,
            columns=columns,
            **about,
        )
        return found if len(found.keys) == len(found.places) == len(found.sizes) else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def save_record(folder: Path, record: ShardRecord) -> None:
    """Write a record; several processes may write the same. Raises OSError."""
    about = {
        "stamp": vars(record.stamp),
        **{key: getattr(record, key) for key in ("num_bytes", "bad", "damage", "fingerprint", "content", "text_digest")},
    }
    arrays = {
        "places": record.places,
        "sizes": record.sizes,
        "keys": np.frombuffer(pack_keys(record.keys), np.uint8),
        **{f"column.{name}": values for name, values in record.columns.items()},
    }
    with atomic_path(record_path(folder, record.name)) as temporary:
        save_file(arrays, temporary, {"about": json.dumps(about)})


def scan_shard(store: ShardStore, name: str) -> ShardRecord:
    """Read a shard and return its record; its `damage` tells why it could not be read to its end.

    ShardError: it cannot be reached. UserError: there is no folder or no library for its kind.
    """
    stamp, num_bytes, rows = store.stamp(name), 0, _Rows()
    try:
        path = store.bring(name, stamp)
        num_bytes = path.stat().st_size
        with open(path, "rb") as file:
            for sample in samples_of(file):
                rows.add(file.fileno(), sample)
    except DamagedError as error:
        rows.damage = str(error)
    except OSError as error:
        raise ShardError(base_name(name), f"{error.filename or name}: {error.strerror or error}") from error
    record = rows.record(name, stamp, num_bytes)
    record.columns.update(_beside(store, name, record.keys))
    return record


def unreached_record(name: str, reason: str) -> ShardRecord:
    """Return the record of a shard that could not be read at all."""
    rows = _Rows()
    rows.damage = reason
    return rows.record(name, Stamp(0, ""), 0)


class _Rows:
    """The rows of a record while a shard is read."""

    def __init__(self) -> None:
        self.damage = ""
        self._keys: dict[str, None] = {}
        self._bad: list[tuple[str, str]] = []
        self._places: list[tuple[int, int]] = []
        self._sizes: list[tuple[int, int]] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        self._texts = hashlib.sha256()
        self._seen: set[str] = set()
        self._columns = ColumnCollector()

    def add(self, descriptor: int, sample: FoundSample) -> None:
        """Add a sample to the usable ones, or to the bad ones."""
        try:
            if sample.key in self._seen:
                raise ValueError("duplicate key")
            self._seen.add(sample.key)
            if "\0" in sample.key:
                raise ValueError("its key holds a NUL")
            size, meta = check_sample(descriptor, sample, self._texts.update)
        except ValueError as error:
            self._bad.append((sample.key, str(error)))
            return
        first = sample.start // BLOCK
        self._keys[sample.key] = None
        self._places.append((first, -(-sample.end // BLOCK) - first))
        self._sizes.append(size)
        self._members.append(sample.members)
        self._columns.add(meta)

    def record(self, name: str, stamp: Stamp, num_bytes: int) -> ShardRecord:
        """Return the record of what was added."""
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
        )


def _content(fingerprint: str, texts: str, sizes: np.ndarray, members: list[dict[str, tuple[int, int]]]) -> str:
    exts = [*_FIRST_EXTS, *(ext for ext in EXTS if ext not in _FIRST_EXTS and any(ext in row for row in members))]
    table = np.array([[row.get(ext, (0, -1)) for ext in exts] for row in members], np.int64)
    digest = hashlib.sha256(f"{fingerprint} {texts}".encode())
    digest.update(sizes.tobytes() + table.tobytes())
    return digest.hexdigest()


def _beside(store: ShardStore, name: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns of the parquet file that img2dataset writes beside a shard, {} where there is none."""
    beside = name[: len(name) - len(base_name(name))] + plain_name(name).removesuffix(".tar") + ".parquet"
    if not keys or name.count("?"):
        return {}
    try:
        if remote.is_remote(name):
            size, _ = remote.stat(beside, store.patience)
            data = b"".join(remote.pieces(beside, min(size, _MAX_PARQUET_BYTES), store.patience))
        elif Path(beside).is_file():
            data = Path(beside).read_bytes()
        else:
            return {}
        return parquet_columns(data, keys)
    except RemoteError as error:
        if error.final:  # it is not there, as far as we may know
            return {}
        raise ShardError(base_name(name), str(error)) from error
    except (OSError, ValueError) as error:
        raise UserError(f"data.shards: {remote.shown(beside)}: {error}; repair or remove it") from error


def pack_keys(keys: Sequence[str]) -> bytes:
    """Return the keys as one string of bytes."""
    return "".join(f"{key}\0" for key in keys).encode("utf-8", "surrogateescape")


def unpack_keys(data: bytes) -> list[str]:
    """Return the keys that `pack_keys` was given."""
    return data.decode("utf-8", "surrogateescape").split("\0")[:-1]
