"""Which samples there are: an index of webdataset tars that decodes nothing but captions and image headers.

Shards are untrusted. They are read as plain tars by offset; a .tar.gz becomes one first, within bounds. No member is
extracted, unpickled or run, and a member's name is never used as a path.
"""

import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raphael_dist.data.tar_scan import EXTS, IMAGE_EXTS, check_sample, gunzip, samples_of
from raphael_dist.errors import UserError

_CACHE_VERSION = 1
_MAX_SHARDS = 1_000_000
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BRACES = re.compile(r"\{([^{}]*)\}")
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
    """The usable samples of one tar, as columns, and its bad ones. `path` is the plain tar; of a .tar.gz, its expansion.

    `table` is int64 [num_samples, len(EXTS), 2]: offset and size in bytes of each member, size -1 where absent.
    `sizes` is int32 [num_samples, 2]: width and height in pixels. `text_digest` is a sha256 over captions and json.
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
        """sha256 over base name, size in bytes and keys; not over where the file lies, nor whether it came gzipped."""
        return _digest([self.name, self.num_bytes, self.keys])

    @cached_property
    def content(self) -> str:
        """sha256 over the fingerprint, the layout and the texts: what must be equal for caches of it to hold."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.text_digest}".encode())
        digest.update(np.ascontiguousarray(self.sizes).tobytes() + np.ascontiguousarray(self.table).tobytes())
        return digest.hexdigest()

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return {ext: (offset, size)} of the sample with that number in this shard."""
        rows = self.table[number].tolist()
        return {ext: (offset, size) for ext, (offset, size) in zip(EXTS, rows, strict=True) if size >= 0}


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """All shards in order. A sample id counts usable samples over all shards, from 0."""

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
    found: dict[Path, Path] = {}
    for pattern in patterns:
        if _SCHEME.match(pattern):
            raise UserError(f"data.shards: {pattern!r} is a URL or a pipe; only local tar files are read: copy them first")
        names = list(itertools.islice(_expand_braces(pattern), _MAX_SHARDS + 1))
        if len(names) > _MAX_SHARDS:
            raise UserError(f"data.shards: {pattern!r} expands to more than {_MAX_SHARDS} files; use a smaller range")
        for path in itertools.chain.from_iterable(_matches(name, pattern) for name in names):
            found.setdefault(path.absolute(), path)
    if not found:
        raise UserError('data.shards: no pattern was given; name at least one, as "data/train-{0000..0011}.tar"')
    return sorted(found.values())


def build_index(paths: Sequence[Path], cache_dir: Path | None = None) -> DatasetIndex:
    """Index the tars, reading `cache_dir` where it knows the same file (path, size, mtime) and adding to it.

    A .tar.gz or .tgz is expanded once, to `cache_dir`/expanded/<digest of its path, size and mtime>/<its name>.tar.
    UserError: a file that is not a whole tar, is compressed otherwise, expands beyond bounds, or is gzipped while
    `cache_dir` is None; a data set without one usable sample.
    """
    index = DatasetIndex(tuple(_shard_index(Path(path), cache_dir) for path in paths))
    if index.num_samples == 0:
        why = f"; the first bad one is {index.bad[0]}" if index.bad else ""
        raise UserError(
            f"data.shards: no usable sample in {len(paths)} files, the first {paths[0]} ({len(index.bad)} bad{why}); "
            f"a sample is an image ({'/'.join(IMAGE_EXTS)}) and a caption (txt, or json with captions)"
        )
    return index


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    body = match[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if first > last:
            raise UserError(f"data.shards: the range {{{body}}} in {pattern!r} runs backwards; write {{{last}..{first}}}")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices: Iterator[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
    elif "," in body:
        choices = iter(body.split(","))
    else:
        raise UserError(f"data.shards: cannot read braces {{{body}}} in {pattern!r}; use {{0000..0011}} or {{a,b}}")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


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
    """Return `path`, or where the tar inside it lies, expanded if it does not yet. Ranks may race: the last one wins."""
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
    try:
        tar = _plain_tar(path, cache_dir)
        if cache_dir is None:
            return _scan(tar, path)
        identity = _identity(tar)
        cached = cache_dir / f"{_digest(identity)}.json"
        known = _load(tar, cached, identity)
        if known is None:
            known = _scan(tar, path)
            with atomic_path(cached) as temporary:
                temporary.write_text(json.dumps(_to_json(known, identity)), encoding="utf-8")
        return known
    except OSError as error:
        field = "data.cache_dir" if cache_dir and str(error.filename or "").startswith(str(cache_dir)) else "data.shards"
        raise UserError(f"{field}: {error.filename or path}: {error.strerror or error}; check it") from error


def _to_json(shard: ShardIndex, identity: list[Any]) -> dict[str, Any]:
    return {
        "identity": identity,
        "keys": shard.keys,
        "sizes": shard.sizes.tolist(),
        "table": shard.table.tolist(),
        "bad": [[bad.key, bad.reason] for bad in shard.bad],
        "text_digest": shard.text_digest,
    }


def _load(path: Path, cached: Path, identity: list[Any]) -> ShardIndex | None:
    """Return the cached index, or None where there is none or it does not read as one."""
    try:
        data = json.loads(cached.read_text(encoding="utf-8"))
        if data["identity"] != identity:
            return None
        bad = [BadSample(path.name, key, reason) for key, reason in data["bad"]]
        return _columns(path, identity[2], data["keys"], data["sizes"], data["table"], bad, data["text_digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _columns(
    path: Path, num_bytes: int, keys: list, sizes: list, table: list, bad: list[BadSample], text_digest: str
) -> ShardIndex:
    return ShardIndex(
        path=path,
        num_bytes=num_bytes,
        keys=keys,
        sizes=np.array(sizes, np.int32).reshape(len(keys), 2),
        table=np.array(table, np.int64).reshape(len(keys), len(EXTS), 2),
        bad=bad,
        text_digest=text_digest,
    )


def _scan(path: Path, given: Path) -> ShardIndex:
    """Read the plain tar at `path`; errors name the file that was given."""
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    table: list[list[tuple[int, int]]] = []
    bad: list[BadSample] = []
    seen: set[str] = set()
    texts = hashlib.sha256()
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        for key, members in samples_of(given, file):
            try:
                if key in seen:
                    raise ValueError("duplicate key")
                seen.add(key)
                sizes.append(check_sample(file.fileno(), members, texts.update))
            except ValueError as error:
                bad.append(BadSample(path.name, key, str(error)))
                continue
            keys.append(key)
            table.append([members.get(ext, (0, -1)) for ext in EXTS])
    return _columns(path, num_bytes, keys, sizes, table, bad, texts.hexdigest())
