"""Indexes shards before a run: `index_shards.py '/data/laion-{00000..41407}.tar' --cache-dir /data/cache --processes 16`.

Each shard is read once and gets a record in CACHE/index; when all have one, they are joined to the table that runs map
into memory. Started again it goes on where it was, and reads what has changed. Parts may run at the same time on any
machines that share the cache: `--part 3 --parts 16`, the tasks of a Slurm array or step, the ranks of mpirun, which it knows
from the environment. Whoever finishes last joins.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.config import Data
from raphael_dist.data import shards
from raphael_dist.data.shard_store import ShardStore, store_of
from raphael_dist.errors import UserError, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="as for data.shards: paths, URLs, globs, {000..999} ranges")
    parser.add_argument("--cache-dir", type=Path, default=Data().cache_dir, help="data.cache_dir of the run")
    parser.add_argument("--shard-cache", type=Path, help="where remote shards are put while they are read")
    parser.add_argument("--columns", nargs="*", default=[], help="columns that data.filters will use")
    parser.add_argument("--processes", type=int, default=1, help="processes of this part")
    parser.add_argument("--part", type=int, help="which part, from 0 (default: from the environment)")
    parser.add_argument("--parts", type=int, help="number of parts")
    return exit_code_of(lambda: index(parser.parse_args(argv)))


def index(args: argparse.Namespace) -> None:
    """Write the records of one part, and the table when it was the last. Raises UserError."""
    part, parts = part_of(os.environ) if args.part is None else (args.part, args.parts or 1)
    if not 0 <= part < parts or args.processes < 1:
        raise UserError(f"--part {part} --parts {parts} --processes {args.processes}: parts are 0 to parts - 1")
    store = store_of(Data(cache_dir=args.cache_dir, shard_cache=args.shard_cache))
    names = shards.expand_shards(args.shards, store.patience)
    missing = [name for name, _ in shards.unindexed(names[part::parts], store)]
    print(f"part {part} of {parts}: {len(missing)} of {len(names[part::parts])} shards to read", flush=True)
    # Processes that are forked would share the threads of fsspec.
    with multiprocessing.get_context("spawn").Pool(args.processes) if args.processes > 1 else ThreadPool(1) as pool:
        for number, line in enumerate(pool.imap_unordered(_scan, [(store, name) for name in missing]), start=1):
            print(f"{number}/{len(missing)} {line}", flush=True)
    if left := shards.unindexed(names, store):
        print(f"{len(left)} shards of other parts, or that could not be reached, have no record yet", flush=True)
        if parts > 1:
            return
    table = shards.join_records(names, store, args.columns)
    print(f"{table.num_samples:,} samples in {len(names):,} shards, {table.num_bad:,} bad ones, in {table.folder}")
    for number, why in table.damaged.items():
        print(f"damaged: {table.about['names'][number]} {why}")


def _scan(given: tuple[ShardStore, str]) -> str:
    store, name = given
    (record,) = shards.scan_shards([name], store)
    return f"{name}: {record.num_samples} samples, {len(record.bad)} bad" + (f"; {record.damage}" if record.damage else "")


def part_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (part, parts) by the variables of mpirun, a Slurm array or a Slurm step; (0, 1) without."""
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
