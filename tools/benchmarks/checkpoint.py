"""`tools/bench.py checkpoint`: time to save and to convert a checkpoint, compared with other ways to do it.

A save of the trainer is compared with torch.save of the same bytes and with DeepSpeed's `save_checkpoint`. A conversion is
compared with copying the files.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.convert import bench_convert, table
from raphael_dist.checkpoint.folders import newest
from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.checkpoint.snapshot import Snapshot
from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.write_plan import Options
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, all_reduce_sum, discover, initialise
from raphael_dist.text import counted


def bench_checkpoint(
    config: Config, tree: dict[str, Any], ranks: Ranks, device: torch.device, repeats: int
) -> dict[str, float]:
    """Measure each way to save a checkpoint; return the median seconds by name, and the checkpoint's size as "MiB".

    Collective. `tree`: DeepSpeed's configuration. `repeats`: number of measured saves; one more save comes first, because it
    allocates buffers. Checkpoints are written to run.dir of `config`.
    """
    engine = Engine(config, tree, BatchPlan.of(config, ranks.world_size), device)
    engine.fragments.create_moments(1)
    ema = Ema(engine.fragments, config.ema)
    folder = config.run.dir
    snapshot = Snapshot(engine.fragments, ema, ranks.rank, ranks.world_size)
    rows: dict[str, list[float]] = {}
    with CheckpointStore(config, ranks, engine.fragments, ema, {"data.shards": "benchmark"}) as store:
        store.resume()
        for i in range(repeats + 1):  # the first save allocates buffers and is not counted
            timings = _ours(store, i + 1, ranks, device)
            timings["DeepSpeed save_checkpoint"] = _timed(lambda i=i: engine.save_deepspeed(folder / f"deepspeed-{i}"))  # type: ignore[misc]
            path = folder / f"torch-{ranks.rank}.pt"
            snapshot.prepare()
            values = snapshot.take()
            timings["torch.save of the same bytes"] = _timed(lambda p=path, v=values: torch.save(v, p))  # type: ignore[misc]
            for name, seconds in timings.items():
                rows.setdefault(name, []).append(seconds)
            dist.barrier()
            if ranks.is_main:
                shutil.rmtree(folder / f"deepspeed-{i}")
            path.unlink()
    return {name: statistics.median(values[1:]) for name, values in rows.items()}


def _ours(store: CheckpointStore, step: int, ranks: Ranks, device: torch.device) -> dict[str, float]:
    dist.barrier()
    began = time.monotonic()
    store.begin(Progress(step, step, step, {}))
    while float(all_reduce_sum([float(store.written)], device)[0]) < ranks.world_size:
        time.sleep(0.02)  # in place of a training step
    store.commit()
    stall, write = store.last.stall_s, store.last.write_s
    failure = store.finish()
    assert failure is None, failure
    published = time.monotonic() - began
    reader = CheckpointReader(store.root / f"step-{step:08d}")
    names = sorted(reader.manifest["files"])[ranks.rank :: ranks.world_size]
    verify = _timed(lambda: reader.integrity_error(names))
    timings = {"stall": stall, "write, sync, read back": write, "until published": published, "verify": verify}
    return {**timings, "MiB": sum(e["bytes"] for e in reader.manifest["files"].values()) / 2**20}


def _timed(work: Callable[[], object]) -> float:
    """Call `work` on every rank; return the seconds until all ranks have finished it. Collective."""
    dist.barrier()
    began = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - began


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="emoji-tiny", help="preset or YAML file of the model (default emoji-tiny)")
    command.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1, help="ZeRO stage (default 1)")
    command.add_argument(
        "--folder", type=Path, default=Path("runs/bench-checkpoint"), help="folder to write to, on the disk to measure"
    )
    command.add_argument("--repeats", type=int, default=5, help="number of saves that are measured (default 5)")


def run(args: argparse.Namespace) -> None:
    """Print the seconds and MiB/s of saving a checkpoint by the trainer, by torch.save and by DeepSpeed, on all ranks."""
    config, stage, folder, repeats = load_config(args.config), args.zero, args.folder, args.repeats
    torch.set_num_threads(1)
    ranks = discover()
    device = initialise(ranks)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    try:
        medians = bench_checkpoint(config, {"zero_optimization": {"stage": stage}}, ranks, device, repeats)
        if ranks.is_main:
            size = medians.pop("MiB")
            print(
                f"{size:.0f} MiB on {counted(ranks.world_size, 'rank')}, median of {repeats}; only the trainer's save syncs "
                "its files and reads them back"
            )
            print(table(medians, size, "DeepSpeed save_checkpoint", "DeepSpeed's"), flush=True)
            ep = config.parallel.space_ep, config.parallel.time_ep
            options = Options(*ep, world=ranks.world_size, stage=stage)
            conversions = bench_convert(newest(folder / "checkpoints")[0], options, ("canonical", "deepspeed"), repeats)
            print("conversions by one process, including the checksums of source and target")
            print(table(conversions, size, "copy and sync", "copy"), flush=True)
            shutil.rmtree(folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
