"""What a checkpoint costs: the trainer's own save beside torch.save of the same bytes and DeepSpeed's `save_checkpoint`;
its conversions beside a copy."""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist import parallel
from raphael_dist.batch_plan import BatchPlan
from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.reader import CheckpointReader, newest
from raphael_dist.checkpoint.snapshot import Snapshot
from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.convert.convert import convert
from raphael_dist.convert.plan import Options
from raphael_dist.ema import Ema
from raphael_dist.engine import Engine


def bench_checkpoint(
    config: Config, tree: dict[str, Any], ranks: parallel.Ranks, device: torch.device, repeats: int
) -> dict[str, float]:
    """Return medians over `repeats` of the seconds of each way to save, and the MiB of all ranks. Collective."""
    engine = Engine(config, tree, BatchPlan.of(config, ranks.world_size), device)
    engine.fragments.create_moments(1)
    ema = Ema(engine.fragments, config.ema)
    folder = config.run.dir
    snapshot = Snapshot(engine.fragments, ema, ranks.rank, ranks.world_size)
    rows: dict[str, list[float]] = {}
    with CheckpointStore(config, ranks, engine.fragments, ema, "benchmark") as store:
        store.resume()
        for i in range(repeats + 1):  # the first makes buffers and is not counted
            found = _ours(store, i + 1, ranks, device)
            found["DeepSpeed save_checkpoint"] = _timed(lambda i=i: engine.save_deepspeed(folder / f"deepspeed-{i}"))  # type: ignore[misc]
            path = folder / f"torch-{ranks.rank}.pt"
            snapshot.plan()
            values = snapshot.take()
            found["torch.save of the same bytes"] = _timed(lambda p=path, v=values: torch.save(v, p))  # type: ignore[misc]
            for name, seconds in found.items():
                rows.setdefault(name, []).append(seconds)
            dist.barrier()
            if ranks.is_main:
                shutil.rmtree(folder / f"deepspeed-{i}")
            path.unlink()
    return {name: statistics.median(values[1:]) for name, values in rows.items()}


def _ours(store: CheckpointStore, step: int, ranks: parallel.Ranks, device: torch.device) -> dict[str, float]:
    dist.barrier()
    began = time.monotonic()
    store.begin(Progress(step, step, step, {}))
    while float(parallel.total([float(store.written)], device)[0]) < ranks.world_size:
        time.sleep(0.02)  # where a training step would be
    store.settle()
    stall, write = store.last.stall_s, store.last.write_s
    failure = store.finish()
    assert failure is None, failure
    published = time.monotonic() - began
    reader = CheckpointReader(store.root / f"step-{step:08d}")
    names = sorted(reader.manifest["files"])[ranks.rank :: ranks.world_size]
    verify = _timed(lambda: reader.damage(names))
    found = {"stall": stall, "write, sync, read back": write, "until published": published, "verify": verify}
    return {**found, "MiB": sum(e["bytes"] for e in reader.manifest["files"].values()) / 2**20}


def bench_convert(config: Config, stage: int, world_size: int, folder: Path, repeats: int) -> dict[str, float]:
    """Return medians of the seconds that one process takes to copy or convert the newest checkpoint below `folder`."""
    ep = config.parallel.space_ep, config.parallel.time_ep
    source, target = newest(folder / "checkpoints")[0], folder / "copy"
    rows: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for name, work in {
            "copy and sync": lambda: _copy(source, target),
            "convert to canonical": lambda: convert("raphael", source, "canonical", target, Options()),
            "convert to deepspeed": lambda: convert(
                "raphael", source, "deepspeed", target, Options(*ep, world=world_size, stage=stage)
            ),
        }.items():
            began = time.monotonic()
            work()
            rows.setdefault(name, []).append(time.monotonic() - began)
            shutil.rmtree(target)
    return {name: statistics.median(values[1:]) for name, values in rows.items()}


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds until every rank has done the work."""
    dist.barrier()
    began = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - began


def table(seconds: dict[str, float], size: float, unit: str, of: str) -> str:
    """Return the seconds of each way as text, with the rate of `size` MiB, relative to the way `unit`, called `of`."""
    return "\n".join(
        f"  {name:30} {s:8.3f} s {size / s:8.0f} MiB/s {s / seconds[unit]:7.2f} x {of}" for name, s in seconds.items()
    )


def run(config: Config, stage: int, folder: Path, repeats: int) -> None:
    """Join the ranks that the launcher started, measure, print."""
    ranks = parallel.discover()
    device = parallel.initialise(ranks)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    try:
        medians = bench_checkpoint(config, {"zero_optimization": {"stage": stage}}, ranks, device, repeats)
        if ranks.is_main:
            size = medians.pop("MiB")
            print(
                f"{size:.0f} MiB in all on {ranks.world_size} ranks, median of {repeats}; only this store syncs, reads back"
            )
            print(table(medians, size, "DeepSpeed save_checkpoint", "DeepSpeed's"), flush=True)
            conversions = bench_convert(config, stage, ranks.world_size, folder, repeats)
            print("by one process, checksums of source and target included")
            print(table(conversions, size, "copy and sync", "copy"), flush=True)
            shutil.rmtree(folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
