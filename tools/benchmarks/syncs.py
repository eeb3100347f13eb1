"""`tools/bench.py syncs`: where the host waits for the GPU in an optimizer step, recorded on a machine without a GPU.

The real trainer, engine and DeepSpeed run one whole step (data, forward, backward, reduce, clip, update, metrics). Tensors
without data replace those of a GPU (`pretend_gpu` defines a wait, a launch and a byte), and torch's `fake` process group
replaces the other ranks. So the model keeps its true widths: 3 B parameters need no memory and no arithmetic.

This cannot show:
- time;
- the kernels inside an operation;
- waits of the CUDA library itself (its allocator waits in the first steps);
- fused attention: torch decomposes it for tensors without data, so there are more launches and bytes than on a GPU.

With `train.cuda_graphs=true` it counts what the host launches: a replayed graph once, and not the operations in it. Without,
it counts what a step computes.

The fourth step is counted: DeepSpeed's timer waits in the first two, and optimizers create their state in the first. Samples
have the first size of `image.buckets`.
"""

import argparse
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_dummies import GPU
from benchmarks.pretend_gpu import Notes, PretendGpu
from raphael_dist.config.schema import Config, load_config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import BatchEncoder
from raphael_dist.data.stream import StreamSample
from raphael_dist.engine.ds_config import read_deepspeed_json
from raphael_dist.engine.engine import Engine, import_deepspeed
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.stop_request import StopRequest
from raphael_dist.runtime.watchdog import Watchdog
from raphael_dist.text import counted
from raphael_dist.training import trainer
from raphael_dist.training.logged_metrics import Telemetry
from raphael_dist.training.run_state import Run, RunProgress, StopState
from raphael_dist.training.step_guard import Guard

STEADY = 3  # steps before the one that is counted


@dataclass(frozen=True)
class StepNotes:
    """What was recorded on the simulated GPU in one optimizer step (`step`) and in the log line after it (`log`)."""

    step: Notes
    log: Notes
    micro_steps: int

    @property
    def waits(self) -> int:
        return self.step.waits.total()


def note_step(config: Config, json_tree: dict[str, Any], world_size: int) -> StepNotes:
    """Record one optimizer step of rank 0 of `world_size` on a simulated GPU.

    It joins a fake process group, which this process then keeps. `json_tree`: DeepSpeed's configuration.
    """
    _join(world_size)
    with PretendGpu() as gpu:
        gpu.noting = False
        run = _build(config, json_tree, world_size)
        batches = _batches(run)
        for _ in range(STEADY):
            trainer.train_step(run, batches)
        trainer.log_step(run)  # measures the peak rate of the device at the first call
        gpu.noting = True
        trainer.train_step(run, batches)
        step = gpu.take()
        trainer.log_step(run)
        return StepNotes(step, gpu.take(), run.plan.accumulation)


def _join(world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DeepSpeed calls collectives under names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
    os.environ["LOCAL_RANK"] = "0"
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    import_deepspeed().init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)


def _build(config: Config, json_tree: dict[str, Any], world_size: int) -> Run:
    """Return the trainer's objects for a run, as `trainer.build` does, but without data, encoders and checkpoints."""
    ranks, plan = Ranks(0, world_size), BatchPlan.of(config, world_size)
    with GPU:
        model = RaphaelUNet(config)
    engine = Engine(config, json_tree, plan, GPU, model)
    stream: Any = _Stream(config)
    encoders: Any = SimpleNamespace(device=GPU, upscale=0)
    ahead = BatchEncoder(encoders, with_edges=config.edge.weight > 0)
    data: Any = SimpleNamespace(replaced=0)
    store: Any = SimpleNamespace(written=False, commit=lambda: None, failed=0)
    telemetry = Telemetry(config, Ranks(1, world_size), GPU, ["host"] * world_size)  # rank 0 would write files
    telemetry.begin(0, 0.0)
    return Run(
        config=config,
        ranks=ranks,
        plan=plan,
        data=data,
        builder=BatchBuilder(config, stream, ahead, engine.module.num_blocks, pin=True),
        validator=None,
        requests=[],
        engine=engine,
        ema=engine.create_ema(),
        schedule=NoiseSchedule.create(config.diffusion, GPU),
        store=store,
        guard=Guard(config.train),
        telemetry=telemetry,
        watchdog=Watchdog(ranks, config.run.dir, config.run.hang_timeout_s),
        lock=None,
        progress=RunProgress(config.train.max_steps),
        stop=StopState(StopRequest()),
    )


class _Stream:
    """Replaces the trainer's stream of samples: black images with empty captions, in the right shapes."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def samples(self, positions: Sequence[int]) -> list[StreamSample]:
        return [self._sample(position) for position in positions]

    def _sample(self, position: int) -> StreamSample:
        c, (height, width) = self._config, self._config.image.buckets[0]
        factor = latent_factor(c.image.vae)
        size = (height // factor, width // factor)
        return StreamSample(
            position=position,
            sample_id=position,
            key=str(position),
            bucket=0,
            mean=torch.zeros(c.model.latent_channels, *size),
            std=torch.zeros(c.model.latent_channels, *size),
            noise=torch.zeros(c.model.latent_channels, *size),
            text=(torch.zeros(c.text.max_tokens, c.model.text_width), torch.ones(c.text.max_tokens, dtype=torch.bool), 0),
            edge=torch.zeros(size) if c.edge.weight > 0 else None,
            flipped=False,
            dropped=False,
        )


def _batches(run: Run) -> Iterator[Batch]:
    """Yield the batches of a run. They are built in this thread and not in the usual background thread, to be recorded."""
    return map(run.builder.build, trainer._slots(run))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="raphael-3b")
    command.add_argument("--deepspeed_config", help="DeepSpeed configuration (default: as in training)")
    command.add_argument("--world", type=int, default=8, help="number of simulated ranks (default 8)")
    command.add_argument("--micro-steps", type=int, default=2)
    command.add_argument(
        "--places",
        type=int,
        default=25,
        help="number of places in the code to list, those with the most launches first (default 25)",
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run, as for train.py")


def run(args: argparse.Namespace) -> None:
    """Print for an optimizer step the host's waits for the GPU, the GPU operations and their bytes, by line of code."""
    began = time.monotonic()
    config = load_config(args.config, args.overrides)
    batch = config.train.micro_batch_size * args.world * args.micro_steps
    config = load_config(args.config, [*args.overrides, f"train.global_batch_size={batch}"])
    notes = note_step(config, read_deepspeed_json(args.deepspeed_config, config.train.dtype), args.world)
    print(
        f"{args.config}, {config.train.dtype}, {counted(args.world, 'rank')}, "
        f"{args.deepspeed_config or 'the default DeepSpeed JSON'}, "
        f"{counted(notes.micro_steps, 'micro-step')} of {config.train.micro_batch_size}; rank 0, "
        f"in {time.monotonic() - began:.0f} s"
    )
    print(report(notes, args.places))


def report(notes: StepNotes, places: int) -> str:
    """Return the recorded waits, launches and bytes as text tables. The last line is the number of waits.

    `places`: how many lines of code to list, those with the most launches first.
    """
    lines = ["", "the host waits for the GPU:", *_waits(notes.step), "", "a log line adds:", *_waits(notes.log), ""]
    launches, num_bytes = notes.step.launches, notes.step.bytes
    lines += [f"{'launches':>8} {'MB':>10}  place, of {len(launches)}"]
    lines += [f"{n:>8} {num_bytes[place] / 1e6:>10.1f}  {place}" for place, n in launches.most_common(places)]
    lines += [f"{launches.total():>8} {num_bytes.total() / 1e6:>10.1f}  in all", ""]
    lines += [f"{notes.log.launches.total():>8} {notes.log.bytes.total() / 1e6:>10.1f}  added by a log line", ""]
    return "\n".join([*lines, f"host synchronisations per step: {notes.waits}"])


def _waits(notes: Notes) -> list[str]:
    counts: Counter[tuple[str, str]] = notes.waits
    return [f"{n:>8}  {place}: {kind}" for (place, kind), n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
