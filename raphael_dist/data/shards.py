"""Which samples there are: an index of webdataset tars that decodes nothing but captions and image headers.

Shards are untrusted. They are read as plain tars by offset; a .tar.gz becomes one first, within bounds. No member is
extracted, unpickled or run, and a member's name is never used as a path.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from raphael_dist.data.tar_scan import EXTS, IMAGE_EXTS, check_sample, gunzip, samples_of
from raphael_dist.errors import UserError
from raphael_dist.parallel.long_work import Tell, quiet
from raphael_dist.storage.files import atomic_path

_CACHE_VERSION = 2
_MAX_SHARDS = 1_000_000
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)[.}]")
_GZIPPED = re.compile(r"(\.tar\.gz|\.tgz)$", re.IGNORECASE)


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on: the shard's base name, its key there, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key!r}: {self.reason}"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The usable samples of one tar, a row of each array for each, and its bad ones.

    path: the plain tar; of a .tar.gz, the file it was expanded to. num_bytes: its size. keys: the samples' names. sizes
    int32 [num_samples, 2]: width and height in pixels. table int64 [num_samples, len(EXTS), 2]: offset and size in bytes of
    each member, size -1 where a sample has none. text_digest: sha256 over all txt and json members.
    """

    path: Path
    num_bytes: int
    keys: list[str]
    sizes: np.ndarray
    table: np.ndarray
    bad: list[BadSample]
    text_digest: str = ""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over base name, size in bytes and keys: the same in any folder, and for a shard that came gzipped."""
        return _digest([self.name, self.num_bytes, self.keys])

    @cached_property
    def content(self) -> str:
        """sha256 over all that cached features depend on: fingerprint, texts, image sizes, and where each member lies."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.text_digest}".encode())
        digest.update(np.ascontiguousarray(self.sizes).tobytes() + np.ascontiguousarray(self.table).tobytes())
        return digest.hexdigest()

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return {ext: (offset, size)} of the sample with that number in this shard."""
        rows = self.table[number].tolist()
        return {ext: (offset, size) for ext, (offset, size) in zip(EXTS, rows, strict=True) if size >= 0}


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """All shards in order. A sample id is the number of a usable sample, counted from 0 over all shards."""

    shards: tuple[ShardIndex, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [num_shards + 1]: the first sample id of each shard, and the end."""
        return np.cumsum([0, *(shard.num_samples for shard in self.shards)], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def bad(self) -> list[BadSample]:
        return [bad for shard in self.shards for bad in shard.bad]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards' base names, sizes and sample keys, in order."""
        return hashlib.sha256("".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()

    @cached_property
    def text_digest(self) -> str:
        """sha256 over the captions of all samples, in order."""
        return hashlib.sha256("".join(shard.text_digest for shard in self.shards).encode()).hexdigest()

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return (shard number, sample number in the shard); IndexError outside 0 .. num_samples - 1."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} outside 0..{self.num_samples - 1}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def key(self, sample_id: int) -> str:
        shard, number = self.locate(sample_id)
        return self.shards[shard].keys[number]


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """Return the files that `patterns` name, sorted, each once: braces ("a-{0000..0011}.tar", "{a,b}.tar") and globs.

    Relative patterns are taken from the working directory. UserError: a URL or pipe, a missing file, a glob without
    a match, no pattern at all.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        if _SCHEME.match(pattern):
            raise UserError(f"data.shards: {pattern!r} is a URL or a pipe; only local tar files are read: copy them first")
        for name in _expand_braces(pattern):
            for path in _matches(name, pattern):
                files.setdefault(path.absolute(), path)
    if not files:
        raise UserError('data.shards: no pattern was given; name at least one, as "data/train-{0000..0011}.tar"')
    return sorted(files.values())


def scan_shards(paths: Sequence[Path], cache_dir: Path | None = None, tell: Tell = quiet) -> list[ShardIndex]:
    """Index each tar by itself, as `build_index` does; `tell` is told of every shard (`parallel.long_work`)."""
    shards = []
    for number, path in enumerate(paths, start=1):
        tell(f"shard {number} of {len(paths)}")
        shards.append(_shard_index(Path(path), cache_dir))
    return shards


def build_index(paths: Sequence[Path], cache_dir: Path | None = None, tell: Tell = quiet) -> DatasetIndex:
    """Index the tars. What `cache_dir` holds of the same file (path, size, mtime) is read, the rest is added to it.

    A .tar.gz or .tgz is expanded once, to `cache_dir`/expanded/<digest of its path, size and mtime>/<its name>.tar.
    UserError: a file that is not a whole tar, is compressed otherwise, expands beyond bounds, or is gzipped while
    `cache_dir` is None; a data set without one usable sample.
    """
    index = DatasetIndex(tuple(scan_shards(paths, cache_dir, tell)))
    if index.num_samples == 0:
        why = f"; the first bad one is {index.bad[0]}" if index.bad else ""
        raise UserError(
            f"data.shards: no usable sample in {len(paths)} files, the first {paths[0]} ({len(index.bad)} bad{why}); "
            f"a sample is an image ({'/'.join(IMAGE_EXTS)}) and a caption (txt, or json with captions)"
        )
    return index


def _expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for; braces mean what they mean to bash and webdataset."""
    ranges = [(int(first), int(last)) for first, last in _RANGE.findall(pattern)]
    for first, last in ranges:
        if first > last:
            raise UserError(f"data.shards: the range {{{first}..{last}}} in {pattern!r} runs backwards; turn it round")
    if math.prod(last - first + 1 for first, last in ranges) > _MAX_SHARDS:
        raise UserError(f"data.shards: {pattern!r} expands to more than {_MAX_SHARDS} files; use a smaller range")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"data.shards: cannot read the braces in {pattern!r}; use {{0000..0011}} or {{a,b}}") from None


def _matches(name: str, pattern: str) -> list[Path]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"data.shards: {pattern!r}: {error}; give the whole path") from None
    if any(char in name for char in "*?["):
        root = Path(path.anchor)
        try:
            paths = [match for match in root.glob(str(path.relative_to(path.anchor))) if match.is_file()]
        except ValueError as error:
            raise UserError(f"data.shards: {pattern!r} is no pattern: {error}; ** must stand alone") from None
        if not paths:
            raise UserError(f"data.shards: {pattern!r} matches no file in {Path.cwd()}; check the path")
        return paths
    if not path.is_file():
        raise UserError(f"data.shards: {str(path)!r} (from {pattern!r}) is not a file; check the path or the range")
    return [path]


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [_CACHE_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _plain_tar(path: Path, cache_dir: Path | None) -> Path:
    """Return `path`; of a gzipped shard the expanded tar, which is written first if need be (ranks may do so at once)."""
    name = _GZIPPED.sub(".tar", path.name)
    if name == path.name:
        return path
    if cache_dir is None:
        raise UserError(f"data.shards: {path} is gzipped and there is no cache folder to expand it in; gunzip it")
    # The folder follows the file, so that a changed .tar.gz is expanded anew; the base name is the plain tar's.
    tar = cache_dir / "expanded" / _digest(_identity(path))[:32] / name
    if not tar.is_file():
        with atomic_path(tar) as temporary:
            gunzip(path, temporary)
    return tar


def _shard_index(path: Path, cache_dir: Path | None) -> ShardIndex:
    """Return the index of a shard, from the cache or by reading it."""
    try:
        tar = _plain_tar(path, cache_dir)
        if cache_dir is None:
            return _from_entry(tar, tar.stat().st_size, _scan(tar, path))
        identity = _identity(tar)
        cached = cache_dir / f"{_digest(identity)}.json"
        known = _cached_index(tar, cached, identity)
        if known is not None:
            return known
        entry = _scan(tar, path)
        with atomic_path(cached) as temporary:
            temporary.write_text(json.dumps({"identity": identity, **entry}), encoding="utf-8")
        return _from_entry(tar, identity[2], entry)
    except OSError as error:
        field = "data.cache_dir" if cache_dir and str(error.filename or "").startswith(str(cache_dir)) else "data.shards"
        raise UserError(f"{field}: {error.filename or path}: {error.strerror or error}; check it") from error


def _cached_index(path: Path, cached: Path, identity: list[Any]) -> ShardIndex | None:
    """Return the index in the file `cached`, or None where it is of another file or does not read as an index."""
    try:
        entry = json.loads(cached.read_text(encoding="utf-8"))
        return _from_entry(path, identity[2], entry) if entry["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_entry(path: Path, num_bytes: int, entry: dict[str, Any]) -> ShardIndex:
    """Return the index of the plain tar at `path` from what `_scan` returned, or JSON made of that."""
    keys = entry["keys"]
    return ShardIndex(
        path=path,
        num_bytes=num_bytes,
        keys=keys,
        sizes=np.array(entry["sizes"], np.int32).reshape(len(keys), 2),
        table=np.array(entry["table"], np.int64).reshape(len(keys), len(EXTS), 2),
        bad=[BadSample(path.name, key, reason) for key, reason in entry["bad"]],
        text_digest=entry["text_digest"],
    )


def _scan(path: Path, given: Path) -> dict[str, Any]:
    """Read the plain tar at `path` and return what there is to know of its samples; errors name the file `given`."""
    entry: dict[str, Any] = {"keys": [], "sizes": [], "table": [], "bad": []}
    seen: set[str] = set()
    texts = hashlib.sha256()
    with open(path, "rb") as file:
        for key, members in samples_of(given, file):
            try:
                if key in seen:
                    raise ValueError("duplicate key")
                seen.add(key)
                entry["sizes"].append(check_sample(file.fileno(), members, texts.update))
            except ValueError as error:
                entry["bad"].append((key, str(error)))
                continue
            entry["keys"].append(key)
            entry["table"].append([members.get(ext, (0, -1)) for ext in EXTS])
    return {**entry, "text_digest": texts.hexdigest()}
