"""Builds the index of shards: reads each shard that has no record yet, and joins all records to one table.

A record describes the samples of one shard (shard_record.py), the table those of all shards (dataset_index.py).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.shard_cache import ShardError, ShardStore, Stamp
from raphael_dist.data.shards.dataset_index import VERSION, BadSample, DatasetIndex, cannot_write, open_table
from raphael_dist.data.shards.shard_record import (
    DENIED,
    UNREACHED,
    ShardRecord,
    load_record,
    parquet_stamp,
    save_record,
    scan_shard,
    unreached_record,
)
from raphael_dist.data.shards.tar_scan import IMAGE_EXTS
from raphael_dist.data.shards.write_index import write_table
from raphael_dist.errors import UserError
from raphael_dist.runtime.progress_bar import Reporter, no_report
from raphael_dist.storage.checksummed import folder_damage, read_sealed, write_sealed
from raphael_dist.text import counted, hide_secrets

_log = logging.getLogger(__name__)
# A run indexes at most so many bytes of shards; tools/index_shards.py has no limit.
MAX_BYTES_IN_RUN = 64 << 30
_STAT_THREADS = 32


def open_index(names: Sequence[str], store: ShardStore, columns: Sequence[str] = ()) -> DatasetIndex | None:
    """Return the stored index (table of all samples) of some shards (tar files), if it is still valid.

    `names`: paths and URLs of the shards. `store`: provides the shards; its folder contains the index. `columns`: names of
    the columns that filters use.

    Returns:
        The index, or None if it must be built again:

        - there is no index of these shards with these columns, or the index is damaged;
        - a local shard has changed since the index was written;
        - when the index was written, a shard was missing, or (this matters only if `columns` is not empty) a server denied
          access to the parquet file with the metadata of a shard's samples.
    """
    pointer = _pointer_path(store.folder, names)
    try:
        folder = store.folder / "tables" / json.loads(read_sealed(pointer))["table"]
    except (OSError, ValueError):
        return None
    if damage := folder_damage(folder):
        _log.warning("data.cache_dir: the index of the shards is damaged (%s), so it is written again", damage)
        return None
    index = open_table(folder, store, names)
    if not set(columns) <= set(index.columns):
        return None
    stamps = [Stamp(*stamp) for stamp in index.about["stamps"]]
    parquets = [stamp and Stamp(*stamp) for stamp in index.about["parquets"]]
    if UNREACHED in stamps or (columns and DENIED in parquets):  # ask again
        return None
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        current = pool.map(lambda name: _local_stamps(store, name), index.about["names"])
        unchanged = [new in (None, old) for new, old in zip(current, zip(stamps, parquets, strict=True), strict=True)]
    return index if all(unchanged) else None


def unindexed(names: Sequence[str], store: ShardStore, report: Reporter = no_report) -> list[tuple[str, int]]:
    """Return (name, size in bytes) of each shard that is not indexed, has changed since it was indexed, or is unreachable.

    A shard also counts as changed if its parquet file was changed, added or removed. This file has the metadata of the
    shard's samples, and is NAME.parquet for NAME.tar.
    `names`: paths and URLs of the shards (tar files). `store`: provides the shards; its folder contains the index.
    `report`: called with lines of progress. The size of a shard that cannot be reached is 0.
    """

    def check(name: str) -> tuple[str, int] | None:
        record = load_record(store.folder, name)
        try:
            stamp = store.stamp(name)
            is_current = record is not None and (record.stamp, record.parquet) == (stamp, parquet_stamp(store, name))
        except ShardError:
            return (name, 0)
        report(f"checking {hide_secrets(name)}")
        return None if is_current else (name, stamp.num_bytes)

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return [entry for entry in pool.map(check, names) if entry is not None]


def scan_shards(names: Sequence[str], store: ShardStore, report: Reporter = no_report) -> list[ShardRecord]:
    """Read the shards with these names (paths or URLs) from start to end, and return a record of each.

    A record has the byte range, image size and key (name) of each sample, and is also written into the folder of `store`. A
    missing shard gets a record without samples, which is not written, so that the next start looks for the shard again.
    `report`: called with a line of progress for each shard.

    Raises:
        UserError: A shard may exist but cannot be reached (e.g. its server fails), or a record cannot be written.
    """
    records = []
    for number, name in enumerate(names, start=1):
        report(f"shard {number} of {len(names)}", number, len(names))
        try:
            record = scan_shard(store, name)
        except ShardError as error:
            if not error.absent:
                raise UserError(
                    f"data.shards: {error.shard} cannot be used: {error.reason}. Start again when this shard can be read, "
                    "or remove it from the list of shards."
                ) from error
            _log.warning("%s", error)
            records.append(unreached_record(name, "is missing"))
            continue
        try:
            save_record(store.folder, record)
        except OSError as error:
            raise cannot_write(store.folder, error) from error
        records.append(record)
    return records


def join_records(
    names: Sequence[str], store: ShardStore, columns: Sequence[str] = (), report: Reporter = no_report
) -> DatasetIndex:
    """Join the stored records of shards into an index (table of all samples), write it, and return it.

    A record lists the samples of one shard; `scan_shards` has written it. A shard without a record counts as damaged.

    Args:
        names: Paths and URLs of the shards.
        store: Provides the shards; its folder contains the records.
        columns: Names of the columns (values from the samples' metadata) that the index gets: those that filters use.
        report: Called with lines of progress.

    Raises:
        UserError: No sample can be used, or the table cannot be written.
    """
    digest = _digest_of(_records(store.folder, names, report), names, columns)
    folder = store.folder / "tables" / digest
    try:
        if folder_damage(folder):
            shutil.rmtree(folder, ignore_errors=True)
            write_table(folder, _records(store.folder, names, report), sorted(columns))
        write_sealed(_pointer_path(store.folder, names), json.dumps({"table": digest}).encode())
    except OSError as error:
        raise cannot_write(folder, error) from error
    return open_table(folder, store, names)


def _records(folder: Path, names: Sequence[str], report: Reporter) -> Iterator[ShardRecord]:
    for number, name in enumerate(names, start=1):
        report(f"reading the record of shard {number} of {len(names)}", number, len(names))
        yield load_record(folder, name) or unreached_record(name, "is missing")


def _digest_of(records: Iterable[ShardRecord], names: Sequence[str], columns: Sequence[str]) -> str:
    """Return a hash that identifies the index that is made from these records, with these columns.

    `names`: paths and URLs of the shards, for messages. Raises UserError if the records have no sample that can be used.
    """
    digest = hashlib.sha256(json.dumps([VERSION, sorted(columns)]).encode())
    num_samples = denied = 0
    first_damage = first_bad = ""
    for record in records:
        digest.update(f"{record.name} {record.stamp} {record.parquet} {record.content}".encode())
        num_samples += record.num_samples
        denied += record.parquet == DENIED
        if record.bad and not first_bad:
            first_bad = str(BadSample(record.name, *record.bad[0]))
        if record.damage and not first_damage:
            first_damage = f"{record.name} {record.damage}"
    if num_samples == 0:
        details = f". The first damaged shard {first_damage}" if first_damage else ""
        details += f". The first unusable sample is {first_bad}" if first_bad else ""
        raise UserError(
            "data.shards must contain samples that can be used, but its files have none (number of files: "
            f"{len(names)}, first file: {hide_secrets(names[0])}){details}. Each sample requires an image "
            f"({'/'.join(IMAGE_EXTS)}) and a caption (txt, or json with captions). Add what is missing, or make shards with "
            "`python tools/prepare_data.py SOURCE --out SHARDS`."
        )
    if columns and denied:
        _log.warning(
            "data.filters: the server denies access to the parquet files of %s, so the columns in these files are "
            "not known. (The server may also answer this if a shard has no parquet file.)",
            counted(denied, "shard"),
        )
    return digest.hexdigest()[:32]


def build_index(
    paths: Sequence[str | Path],
    store: ShardStore | Path,
    report: Reporter = no_report,
    *,
    columns: Sequence[str] = (),
) -> DatasetIndex:
    """Return the index of shards (tar files): a table with the byte range and image size of each sample.

    Shards that are not indexed yet are read first, by this process alone. The ranks of a run call `open_order` instead.

    Args:
        paths: Paths and URLs of the shards.
        store: Provides the shards; its folder contains the index. A path: the folder for the index and for the shards that
            must be downloaded or unpacked.
        report: Called with lines of progress.
        columns: Names of the columns (values from the samples' metadata) that the index gets: those that filters use.

    Raises:
        UserError: No sample can be used, or a file cannot be written.
    """
    names = [str(name) for name in paths]
    if isinstance(store, Path):
        store = ShardStore(store, store / "fetched")
    existing = open_index(names, store, columns)
    if existing is not None:
        return existing
    scan_shards([name for name, _ in unindexed(names, store)], store, report)
    return join_records(names, store, columns, report)


def check_index_in_run(missing: Sequence[tuple[str, int]], command: str) -> None:
    """Raise UserError if the shards that are not indexed yet have more than 64 GiB (MAX_BYTES_IN_RUN) together.

    Reading them would take too long at the start of a run.

    Args:
        missing: (path or URL, size in bytes) of each shard that is not indexed yet.
        command: The command line that indexes them, for the error message.
    """
    total = sum(size for _, size in missing)
    if total > MAX_BYTES_IN_RUN:
        raise UserError(
            f"data.shards must be indexed before training, since a run indexes at most {MAX_BYTES_IN_RUN / 1e9:.0f} GB "
            f"itself. Shards without an index: {len(missing)} ({total / 1e9:.0f} GB), the first one is "
            f"{hide_secrets(missing[0][0])}. Run: {command}"
        )


def _pointer_path(folder: Path, names: Sequence[str]) -> Path:
    full_names = [name if remote.is_remote(name) else str(Path(name).resolve()) for name in names]
    return folder / "tables" / f"{hashlib.sha256(json.dumps([VERSION, full_names]).encode()).hexdigest()[:32]}.json"


def _local_stamps(store: ShardStore, name: str) -> tuple[Stamp, Stamp | None] | None:
    """Return the current stamps (versions) of a local shard and of the parquet file with its samples' metadata.

    - The second stamp is None if there is no parquet file.
    - The result is (UNREACHED, None) if the shard cannot be read.
    - The result is None if the shard is remote. The version of a remote shard is checked when it is fetched.
    """
    if remote.is_remote(name):
        return None
    try:
        return store.stamp(name), parquet_stamp(store, name)
    except ShardError:
        return UNREACHED, None
