"""`tools/bench.py index`: cost of a large index of shards: bytes per sample, time and memory to open and to read it."""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from raphael_dist.data.fetch.shard_cache import ShardStore, Stamp
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.dataset_index import open_table
from raphael_dist.data.shards.shard_record import BLOCK, ShardRecord
from raphael_dist.data.shards.view import open_view
from raphael_dist.data.shards.write_index import write_table

PAPER = [(448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `parser`."""
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples in the index (default 100 million)")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, help="samples per shard (default 10,000, as img2dataset writes)"
    )
    parser.add_argument("--folder", type=Path, help="folder where the index is kept and used again")
    parser.add_argument(
        "--ranks", type=int, default=2, help="number of processes that open the index, one after another (default 2)"
    )


def records(num_samples: int, per_shard: int = 10_000) -> Iterator[ShardRecord]:
    """Yield made-up index records, one per shard, similar to LAION: nine-digit keys, sizes of photographs, and a score."""
    alike = [_record(number, per_shard) for number in range(min(16, num_samples // per_shard))]
    for number in range(num_samples // per_shard):
        digest = f"{number:064d}"
        name = f"/data/laion-high-resolution/{number:05d}.tar"
        like = alike[number % len(alike)]
        yield replace(like, name=name, fingerprint=digest, content=digest, text_digest=digest)


def _record(seed: int, count: int) -> ShardRecord:
    rng = np.random.default_rng(seed)
    sizes = np.stack([rng.integers(256, 1024, count), rng.integers(256, 1024, count)], axis=1).astype(np.int32)
    blocks = rng.integers(100, 300, count)
    places = np.stack([np.cumsum(blocks) - blocks, blocks], axis=1).astype(np.uint32)
    keys = [f"{seed:05d}{row:04d}" for row in range(count)]
    num_bytes = int(blocks.sum()) * BLOCK
    columns = {"aesthetic": rng.normal(5, 1, count).astype(np.float32)}
    return ShardRecord(
        "", Stamp(num_bytes, "1700000000000000000"), num_bytes, places, sizes, keys, [], "", "", "", "", columns
    )


def _private_mb() -> float:
    """Return the MB of memory that only this process uses. Pages of files mapped into memory are shared and do not count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3


def _open(folder: Path, queue: "multiprocessing.SimpleQueue[tuple[float, float, float]]") -> None:
    before, began = _private_mb(), time.perf_counter()
    index = open_table(folder, ShardStore(folder, folder))
    order = SampleOrder(index, PAPER, seed=0, window_shards=16, run_length=24, view=open_view(index, PAPER))
    order.lookup(0)
    opened = time.perf_counter() - began
    for position in range(0, 2_000_000, 100):
        order.index.key(order.lookup(position).sample_id)
    queue.put((opened, _private_mb() - before, time.perf_counter() - began - opened))


def run(args: argparse.Namespace) -> None:
    """Print the time and the memory that several processes need, one after another, to open a large index of samples.

    The index is a table that lists the shard, offset, image size and key of each sample. Its entries are invented; the
    shards do not exist. It is written to the subfolder tables/made-up-N (N samples) of --folder, unless it is there already.
    Without --folder, it is written to a temporary folder, which is deleted at the end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / "tables" / f"made-up-{args.samples}"
        began = time.perf_counter()
        if not folder.is_dir():
            write_table(folder, records(args.samples, args.per_shard), ["aesthetic"])
            print(f"index written in {time.perf_counter() - began:.0f} s")
        began = time.perf_counter()
        open_view(open_table(folder, ShardStore(folder, folder)), PAPER)
        print(f"list of samples by image size in {time.perf_counter() - began:.1f} s (0 if it existed)")
        size = sum(path.stat().st_size for path in folder.parent.parent.rglob("*") if path.is_file())
        print(f"{size / args.samples:.1f} bytes per sample on disk, including this list")
        context = multiprocessing.get_context("spawn")
        for number in range(args.ranks):
            queue: multiprocessing.SimpleQueue[tuple[float, float, float]] = context.SimpleQueue()
            process = context.Process(target=_open, args=(folder, queue))
            process.start()
            opened, memory, walked = queue.get()
            process.join()
            print(
                f"rank {number}: {opened:.2f} s to open index and list and look up the first sample; {walked:.2f} s to "
                f"look up 20,000 of the first 2 million samples, with their keys; {memory:.0f} MB of private memory"
            )
