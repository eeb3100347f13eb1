"""From the names of shards to their index: records that are missing are made, and joined to one table."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand

from raphael_dist.data import remote
from raphael_dist.data.index import VERSION, BadSample, DatasetIndex, open_table
from raphael_dist.data.index_write import table_in_memory, write_table
from raphael_dist.data.remote import PATIENCE, Patience, RemoteError, shown
from raphael_dist.data.shard_record import ShardRecord, load_record, save_record, scan_shard, unreached_record
from raphael_dist.data.shard_store import ShardError, ShardStore, Stamp
from raphael_dist.data.tar_scan import IMAGE_EXTS
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path

_log = logging.getLogger(__name__)
# Beyond so many bytes of shards without a record a run does not index them itself; tools/index_shards.py does.
MAX_BYTES_IN_RUN = 64 << 30
_MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)[.}]")
_STAT_THREADS = 32
Tell = Callable[[str], None]  # as parallel.long_work has it, which would bring torch into worker processes


def _quiet(_: str) -> None:
    """Tell nobody."""


def expand_shards(patterns: Sequence[str], patience: Patience = PATIENCE) -> list[str]:
    """Return the paths and URLs that `patterns` name, each once: braces ("a-{0000..0011}.tar", "{a,b}.tar") and globs.

    Files come first, sorted, then URLs, sorted. Relative patterns are taken from the working directory. UserError: a pipe, a
    scheme that is not read, a missing file, a glob without a match, no pattern at all.
    """
    files: dict[Path, Path] = {}
    urls: set[str] = set()
    for pattern in patterns:
        is_url = remote.is_remote(pattern)
        for name in _expand_braces(pattern):
            if is_url:
                urls.update(_remote_matches(name, patience))
                continue
            for path in _matches(name, pattern):
                files.setdefault(path.absolute(), path)
    if not files and not urls:
        raise UserError('data.shards: no pattern was given; name at least one, as "data/train-{0000..0011}.tar"')
    return [*(str(path) for path in sorted(files.values())), *sorted(urls)]


def open_index(names: Sequence[str], store: ShardStore, columns: Sequence[str] = ()) -> DatasetIndex | None:
    """Return the index of these shards if its table was written with these columns, and no local file has changed since."""
    if store.folder is None:
        return None
    pointer = _pointer(store.folder, names)
    try:
        folder = store.folder / "tables" / json.loads(pointer.read_text())["table"]
    except (OSError, ValueError, KeyError):
        return None
    if not folder.is_dir():
        return None
    index = open_table(folder, store)
    if not set(columns) <= set(index.columns):
        return None
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        now = list(pool.map(lambda name: _local_stamp(store, name), index.about["names"]))
    was = [Stamp(*stamp) for stamp in index.about["stamps"]]
    return index if all(new in (None, old) for new, old in zip(now, was, strict=True)) else None


def unindexed(names: Sequence[str], store: ShardStore, tell: Tell = _quiet) -> list[tuple[str, int]]:
    """Return (name, bytes) of the shards without a record, or with that of another file."""

    def look(name: str) -> tuple[str, int] | None:
        record = None if store.folder is None else load_record(store.folder, name)
        try:
            stamp = store.stamp(name)
        except ShardError:
            return (name, 0)
        tell(f"looking at {shown(name)}")
        return None if record is not None and record.stamp == stamp else (name, stamp.num_bytes)

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return [found for found in pool.map(look, names) if found is not None]


def scan_shards(names: Sequence[str], store: ShardStore, tell: Tell = _quiet) -> list[ShardRecord]:
    """Read each tar and write its record; return the records. `tell` is told of every shard.

    A shard that cannot be reached gets a record of its damage, which is not written. UserError: nothing can be written.
    """
    records = []
    for number, name in enumerate(names, start=1):
        tell(f"shard {number} of {len(names)}")
        try:
            record = scan_shard(store, name)
        except ShardError as error:
            _log.warning("%s", error)
            records.append(unreached_record(name, error.reason))
            continue
        if store.folder is not None:
            try:
                save_record(store.folder, record)
            except OSError as error:
                where = error.filename or store.folder
                raise UserError(f"data.cache_dir: {where}: {error.strerror or error}; check room and rights") from error
        records.append(record)
    return records


def join_records(names: Sequence[str], store: ShardStore, columns: Sequence[str] = (), tell: Tell = _quiet) -> DatasetIndex:
    """Write the table of these shards' records and return it. A shard without a record counts as one that is damaged.

    `columns`: which the table gets. UserError: no usable sample, nothing can be written.
    """
    assert store.folder is not None
    digest, damaged = hashlib.sha256(json.dumps([VERSION, sorted(columns)]).encode()), list[str]()

    def records() -> Iterator[ShardRecord]:
        for number, name in enumerate(names, start=1):
            tell(f"record {number} of {len(names)}")
            yield load_record(store.folder, name) or unreached_record(name, "could not be read")  # type: ignore[arg-type]

    num_samples, bad = 0, list[str]()
    for record in records():
        digest.update(f"{record.name} {record.stamp} {record.content}".encode())
        num_samples += record.num_samples
        if len(bad) < 1:
            bad += [f"{BadSample(record.name, key, reason)}" for key, reason in record.bad[:1]]
        damaged += [f"{record.name} {record.damage}"] if record.damage else []
    if num_samples == 0:
        raise _nothing_usable(names, damaged, bad)
    folder = store.folder / "tables" / digest.hexdigest()[:32]
    try:
        if not (folder / "shards.json").is_file():
            write_table(folder, records(), sorted(columns))
        with atomic_path(_pointer(store.folder, names)) as temporary:
            temporary.write_text(json.dumps({"table": folder.name}))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {error.filename or folder}: {error.strerror or error}; check room and rights"
        ) from error
    return open_table(folder, store)


def build_index(
    paths: Sequence[str | Path],
    folder: Path | None = None,
    tell: Tell = _quiet,
    *,
    store: ShardStore | None = None,
    columns: Sequence[str] = (),
) -> DatasetIndex:
    """Return the index of the shards, making what `folder` does not hold of it; without one, everything in memory.

    For a process alone. A .tar.gz or .tgz is expanded once, to `folder`/expanded/<digest of its path, size and mtime>/<its
    name>.tar. UserError: no usable sample, nothing can be written, a gzipped or remote shard without a folder for it.
    """
    names = [str(name) for name in paths]
    if store is None:
        store = ShardStore(folder, None if folder is None else folder / "fetched")
    if store.folder is None:
        records = scan_shards(names, store, tell)
        index = table_in_memory(store, records)
        if index.num_samples == 0:
            damaged = [f"{record.name} {record.damage}" for record in records if record.damage]
            raise _nothing_usable(names, damaged, [str(bad) for bad in index.bad[:1]])
        return index
    index_or_none = open_index(names, store, columns)
    if index_or_none is not None:
        return index_or_none
    scan_shards([name for name, _ in unindexed(names, store)], store, tell)
    return join_records(names, store, columns, tell)


def check_index_in_run(missing: Sequence[tuple[str, int]], command: str) -> None:
    """Raise UserError with the command to give when a run would have to index too much by itself."""
    total = sum(size for _, size in missing)
    if total > MAX_BYTES_IN_RUN:
        raise UserError(
            f"data.shards: {len(missing)} shards ({total / 1e9:.0f} GB) have no index, the first {shown(missing[0][0])}; "
            f"a run indexes at most {MAX_BYTES_IN_RUN / 1e9:.0f} GB by itself. Run: {command}"
        )


def _nothing_usable(names: Sequence[str], damaged: Sequence[str], bad: Sequence[str]) -> UserError:
    why = f"; the first damaged shard: {damaged[0]}" if damaged else ""
    why += f"; the first bad sample: {bad[0]}" if bad else ""
    return UserError(
        f"data.shards: no usable sample in {len(names)} files, the first {shown(names[0])}{why}; "
        f"a sample is an image ({'/'.join(IMAGE_EXTS)}) and a caption (txt, or json with captions)"
    )


def _pointer(folder: Path, names: Sequence[str]) -> Path:
    whole = [name if remote.is_remote(name) else str(Path(name).resolve()) for name in names]
    return folder / "tables" / f"{hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]}.json"


def _local_stamp(store: ShardStore, name: str) -> Stamp | None:
    """Return what a local file looks like now; None for a remote one, which is compared when it is fetched."""
    if remote.is_remote(name):
        return None
    try:
        return store.stamp(name)
    except ShardError:
        return Stamp(0, "")


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


def _remote_matches(url: str, patience: Patience) -> list[str]:
    address = shown(url)  # a ? begins the query of an https URL
    if not any(char in address for char in "*["):
        return [url]
    if url.partition(":")[0].lower() in remote.NO_LISTING:
        raise UserError(f"data.shards: {address!r}: web servers list no files; use a range, as part-{{00000..00511}}.tar")
    try:
        found = remote.matches(url, patience)
    except RemoteError as error:
        raise UserError(f"data.shards: {error}; check the name and your access") from error
    if not found:
        raise UserError(f"data.shards: {address!r} matches no file; check the name")
    return found


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
