"""Index shards before a run: `index_shards.py '/data/laion-{00000..41407}.tar' --cache-dir /data/cache --processes 16`.

Each shard is read once. Its record (keys, image sizes and offsets of its samples) is written to CACHE/index. When all shards
have a record, the records are joined to the table that runs map into memory. A second start reads only missing and changed
shards. Several processes, also on machines that share the cache, can each index one part of the shards. The part is given by
`--part 3 --parts 16`, or by the environment of a Slurm array, a Slurm step or mpirun. The process that finishes last joins
the records.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.data_sections import Data
from raphael_dist.data.fetch.shard_cache import ShardStore, store_of
from raphael_dist.data.shards import build_index
from raphael_dist.data.shards.shard_names import expand_shards, name_option
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import counted, hide_secrets, print_line


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        example="python tools/index_shards.py 'data/emoji/train-*.tar.gz' --cache-dir .cache/raphael_dist",
        description=__doc__,
        raw=True,
    )
    parser.add_argument("shards", nargs="+", help="shards as in data.shards: paths, URLs, globs, {000..999} ranges")
    parser.add_argument("--cache-dir", type=Path, default=Data().cache_dir, help="data.cache_dir of the run")
    parser.add_argument("--shard-cache", type=Path, help="folder for downloaded shards")
    parser.add_argument("--columns", nargs="*", default=[], help="metadata columns that data.filters needs")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that read shards (default 1)")
    parser.add_argument("--part", type=int, help="number of this part, from 0 (default: from the environment)")
    parser.add_argument("--parts", type=int, help="number of parts")
    return run_command(lambda: index(parser.parse_args(argv)))


def index(args: argparse.Namespace) -> None:
    """Write the index records of one part of the shards. The last part to finish also joins all records to one table.

    Raises UserError if shards cannot be read.
    """
    part, parts = part_of(os.environ) if args.part is None else (args.part, args.parts or 1)
    if not 0 <= part < parts or args.processes < 1:
        raise UserError(
            f"--part={part} must be from 0 to {parts - 1} (--parts minus 1), and --processes={args.processes} must be at "
            "least 1. Use e.g. --part=0 --parts=4 --processes=1."
        )
    store = store_of(Data(cache_dir=args.cache_dir, shard_cache=args.shard_cache))
    with name_option("SHARDS"):
        names = expand_shards(args.shards, store.retry)
    missing = [name for name, _ in build_index.unindexed(names[part::parts], store)]
    print(f"part {part} of {parts}: {len(missing)} of {counted(len(names[part::parts]), 'shard')} to read", flush=True)
    # Not forked: forked processes would inherit the locks of fsspec, but not the threads that release them.
    with multiprocessing.get_context("spawn").Pool(args.processes) if args.processes > 1 else ThreadPool(1) as pool:
        unread = []
        for number, (line, is_read) in enumerate(pool.imap_unordered(_scan, [(store, name) for name in missing]), start=1):
            print_line(f"{number}/{len(missing)} {line}")
            unread += [] if is_read else [line]
    if unread:
        raise UserError(
            f"not all shards could be read: {len(unread)} of {len(missing)} failed, the first one is "
            f"{unread[0].rstrip('.')}. Start the command again when they can be read."
        )
    if missing := [name for name, _ in build_index.unindexed(names, store)]:
        print(f"{counted(len(missing), 'shard')} without an index record, in other parts or unreadable", flush=True)
        if parts > 1:
            return
    table = build_index.join_records(names, store, args.columns)
    samples, shards = counted(table.num_samples, "sample", ","), counted(len(names), "shard", ",")
    print(f"{samples} in {shards}, {table.num_bad:,} bad, in {table.folder}")
    for number, why in table.damaged.items():
        print_line(f"damaged: {table.about['names'][number]} {why}")


def _scan(task: tuple[ShardStore, str]) -> tuple[str, bool]:
    """Index one shard; return a line for the user about it, and whether it could be read. `task`: (store, name)."""
    store, name = task
    try:
        (record,) = build_index.scan_shards([name], store)
    except UserError as error:
        return str(error), False
    damage = f"; {record.damage}" if record.damage else ""
    return f"{hide_secrets(name)}: {counted(record.num_samples, 'sample')}, {len(record.bad)} bad{damage}", True


def part_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (part, number of parts) from the environment of mpirun, a Slurm array or a Slurm step; otherwise (0, 1)."""
    first, step = int(environ.get("SLURM_ARRAY_TASK_MIN", 0)), int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
    if "SLURM_ARRAY_TASK_ID" in environ:
        return (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step, int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if rank in environ:
            return int(environ[rank]), int(environ[size])
    if "SLURM_STEP_ID" in environ:
        return int(environ.get("SLURM_PROCID", 0)), int(environ.get("SLURM_NTASKS", 1))
    return 0, 1


if __name__ == "__main__":
    sys.exit(main())
