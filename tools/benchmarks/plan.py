"""`tools/bench.py plan`: predictions of the planner compared with measurements and with published runs.

- memory: live activations of a real pass, and a process's resident memory, for several configurations
- time: a micro-step, with a calibrated description of this machine
- gpu: steps measured on one H200. Two constants of the planner were fitted to the first two of these steps: the
  minimum time of an operation, and the speed of operations on small or strided tensors.
- published: runs of Stable Diffusion 2 on GPUs, to which nothing was fitted
"""

import argparse
import gc
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.calibrate import measured_peak, measured_step, predicted_step
from raphael_dist.planning.cluster_spec import load_cluster
from raphael_dist.planning.memory import memory_footprint, rank_memory, topology
from raphael_dist.planning.search import Choice, Search
from raphael_dist.planning.trace import Profile, profile
from raphael_dist.runtime.host_memory import keep_freed_memory
from raphael_dist.text import counted

CONFIGURATIONS = {
    "emoji-tiny, 16 images": ["train.micro_batch_size=16"],
    "emoji-tiny, 4 images": ["train.micro_batch_size=4"],
    "recompute blocks": ["train.micro_batch_size=16", "model.checkpoint_activations=blocks"],
    "recompute all": ["train.micro_batch_size=16", "model.checkpoint_activations=all"],
    "experts four times as wide": ["train.micro_batch_size=8", "model.expert_width=[128,256,384,384]"],
    "dense": [
        "train.micro_batch_size=16",
        "model.space_experts=0",
        "model.time_experts=0",
        "edge.weight=0",
        "data.edge_maps=none",
    ],
}


PARTS = ("memory", "time", "gpu", "published")


@dataclass(frozen=True)
class Published:
    """A published training of Stable Diffusion 2 on `ranks` GPUs with `micro` images each, at 512 px from stored latents."""

    cluster: str
    ranks: int
    micro: int
    images_per_s: float  # measured speed of one GPU
    source: str


@dataclass(frozen=True)
class Measured:
    """A measured step on one H200 (`tools/bench.py gpu`, bfloat16, ZeRO-2).

    Attributes:
        preset, micro: the model and its micro-batch.
        ms: milliseconds of a step.
        graphs: whether train.cuda_graphs was on.
        gib: largest memory in GiB that torch had allocated; None: unknown, because another model's memory was included.
    """

    preset: str
    micro: int
    ms: float
    graphs: bool
    gib: float | None = None


MEASURED = (
    Measured("emoji", 256, 52.1, True, 2.3),
    Measured("sd2-dense", 8, 96.5, True),
    Measured("emoji", 512, 72.1, True),
    Measured("emoji", 1024, 117.9, True),
    Measured("emoji-small", 256, 94.4, True),
    Measured("raphael-sd2", 4, 139.0, True),
    Measured("raphael-3b", 2, 188.3, True, 66.6),
    Measured("sd2-dense", 8, 145.2, False),
    Measured("raphael-3b", 2, 365.5, False),
    Measured("emoji", 256, 185.8, False, 2.2),
    Measured("emoji", 512, 284.0, False),
    Measured("emoji", 1024, 254.0, False),
)

MLPERF = "MLPerf Training v4.1, NVIDIA"
MOSAIC = "github.com/mosaicml/diffusion, README"
PUBLISHED = (
    Published("h100x8", 8, 64, 137, MLPERF),
    Published("h100x8", 64, 16, 124, MLPERF),
    Published("h100x8", 512, 4, 77, f"{MLPERF}; 4 images a GPU are assumed"),
    Published("h100x8", 1024, 2, 49, MLPERF),
    *(Published("a100x8", ranks, 16, rate / ranks, f"{MOSAIC}; 16 images a GPU are assumed")
      for ranks, rate in ((8, 290), (16, 585), (32, 1195), (64, 2340), (128, 4590))),
)  # fmt: skip


def configuration(name: str) -> Config:
    """Return the configuration in CONFIGURATIONS of this name, with one micro-step per optimizer step."""
    config = load_config("emoji-tiny", CONFIGURATIONS[name])
    train = config.train.model_copy(update={"global_batch_size": config.train.micro_batch_size})
    return config.model_copy(update={"train": train})


def activations(name: str) -> tuple[int, int]:
    """Return the largest memory of activations of a configuration in CONFIGURATIONS: (measured, predicted) bytes."""
    config = configuration(name)
    planned = profile(config).at(config.train.micro_batch_size, config.model.checkpoint_activations).peak
    return measured_peak(config), planned


def resident(name: str) -> tuple[int, int]:
    """Return by how many bytes this process's resident memory grows in two training steps: (measured, predicted).

    `name`: a configuration in CONFIGURATIONS. Call it in a new process.
    """
    import torch

    from benchmarks.states import random_batch
    from raphael_dist.engine.ema import Ema
    from raphael_dist.engine.engine import Engine
    from raphael_dist.model.diffusion import NoiseSchedule
    from raphael_dist.model.losses import compute_losses
    from raphael_dist.runtime.ranks import discover, initialise

    config, ranks = configuration(name), discover()
    device, plan = initialise(ranks), BatchPlan.of(configuration(name), 1)
    import deepspeed  # noqa: F401

    measured_peak(
        load_config("emoji-tiny", ["train.micro_batch_size=1", "train.global_batch_size=1"])
    )  # memory that libraries keep
    gc.collect()
    before = psutil.Process().memory_info().rss
    engine = Engine(config, {"zero_optimization": {"stage": 1}}, plan, device)
    ema, schedule = Ema(engine.fragments, config.ema), NoiseSchedule.create(config.diffusion)
    batch = random_batch(config, plan.micro_batch_size, (16, 16))
    for step in (1, 2):
        losses = compute_losses(engine, batch, schedule, config, engine.dtype)
        engine.backward(losses.total.sum() * plan.loss_scale)
        engine.step(1e-4)
        ema.update(step)
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    peak = profile(config).at(plan.micro_batch_size, config.model.checkpoint_activations).peak
    footprint = memory_footprint(config, parameter_shapes(config), topology(config, 1, 1), 1)
    planned = rank_memory(config, footprint, peak, allocator=False).total
    torch.distributed.destroy_process_group()
    return grown, planned


def on_a_gpu(case: Measured) -> tuple[float, float]:
    """Return the milliseconds of a step and the GB of memory that the planner predicts for a measured step."""
    sizes = [
        f"train.global_batch_size={case.micro}",
        f"train.micro_batch_size={case.micro}",
        f"data.bucket_run={case.micro}",
    ]
    config = load_config(case.preset, [*sizes, "train.dtype=bfloat16", f"train.cuda_graphs={str(case.graphs).lower()}"])
    choice = Choice(1, 1, 2, False, case.micro, config.model.checkpoint_activations, "auto")
    outcome = Search(config, load_cluster("h200x8"), 1).evaluate(choice)
    assert outcome is not None
    return outcome.step.seconds * 1e3, replace(
        outcome.memory, slack=0
    ).total / 1e9  # without the memory that the allocator cannot reuse


def published(run: Published) -> float:
    """Return the images per second of one GPU that the planner predicts for a published run.

    It assumes ZeRO-2 with overlapped communication and no recomputation.
    """
    batch = run.ranks * run.micro
    config = load_config("sd2-dense", [f"train.global_batch_size={batch}", f"train.micro_batch_size={run.micro}"])
    cluster = load_cluster(run.cluster)
    if run.source.startswith(MLPERF):  # whole steps as one CUDA graph
        cluster = cluster.with_value("launch_us", 0.0)
    search = Search(config, cluster, run.ranks, profile=_sd2_profile())
    outcome = search.evaluate(Choice(1, 1, 2, True, run.micro, "none", "auto"))
    assert outcome is not None
    return outcome.step.images_per_s / run.ranks


@cache
def _sd2_profile() -> Profile:
    return profile(load_config("sd2-dense"))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--cluster", default="cpu", help="this machine: cpu, or a YAML file from plan_run.py --calibrate")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    command.add_argument(
        "--resident", metavar="NAME", help="internal: one configuration's resident memory, in a new process"
    )


def run(args: argparse.Namespace) -> None:
    """Print the planner's predictions next to measurements and the speeds of published runs."""
    if args.resident:
        print(*resident(args.resident))
        return
    if "memory" in args.parts:
        print(f"{'MB':<28}{'activations':>12}{'planned':>9}{'':>8}{'resident':>12}{'planned':>9}")
        for name in CONFIGURATIONS:
            command = [sys.executable, str(Path(__file__).parent.parent / "bench.py"), "plan", "--resident", name]
            # Let the C library return freed memory; by default it keeps much of it.
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            lines = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
            grown, planned = map(int, lines[-1].split())
            alive, predicted = activations(name)
            print(f"{name:<28}{_beside(alive / 1e6, predicted / 1e6)}{_beside(grown / 1e6, planned / 1e6)}", flush=True)
    if "time" in args.parts:
        cluster = load_cluster(args.cluster)
        keep_freed_memory()  # as in training
        print(f"\n{'ms of a micro-step':<28}{'measured':>12}{'planned':>9}")
        for name in CONFIGURATIONS:
            config = configuration(name)
            taken, expected = measured_step(config), predicted_step(config, cluster)
            print(f"{name:<28}{_beside(taken * 1e3, expected * 1e3)}", flush=True)
    if "gpu" in args.parts:
        print(f"\n{'one H200':<32}{'ms':>12}{'planned':>9}{'':>8}{'GB':>12}{'planned':>9}")
        for step in MEASURED:
            ms, gb = on_a_gpu(step)
            name = f"{step.preset}, {counted(step.micro, 'image')}" + ", graphs" * step.graphs
            memory = "" if step.gib is None else _beside(step.gib * 2**30 / 1e9, gb)
            print(f"{name:<32}{_beside(step.ms, ms)}{memory}", flush=True)
    if "published" in args.parts:
        print(f"\n{'images/s of a GPU':<28}{'published':>12}{'planned':>9}")
        for case in PUBLISHED:
            where = f"{case.ranks} x {case.cluster.removesuffix('x8').upper()}, {case.micro} each"
            print(f"{where:<28}{_beside(case.images_per_s, published(case))}  {case.source}")


def _beside(measured: float, planned: float) -> str:
    return f"{measured:>12.1f}{planned:>9.1f}{planned / measured - 1:>+8.1%}"
