"""`tools/bench.py states`: bytes per parameter that a ZeRO configuration keeps on a rank, counted in live tensors.

The model is on the CPU and has small activations. Bytes are counted right after the last micro-step's reduction and
after the update, over all tensors of the process, once per storage.
"""

import argparse
import gc
from typing import Any

import torch
from torch import Tensor

from raphael_dist.config.schema import Config, load_config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from raphael_dist.text import counted

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, **OFFLOAD},
    "zero2_buckets": {"stage": 2},
}
# Small: otherwise reduction buffers would be as large as this small model's gradients. ZeRO-2 without them uses one
# contiguous buffer of gradients.
BUCKETS = {"reduce_bucket_size": 200_000, "allgather_bucket_size": 200_000}
SIDE = 8  # of the latents: activations are small compared with the model


def random_batch(config: Config, samples: int, latent_hw: tuple[int, int] = (SIDE, SIDE)) -> Batch:
    """Return a batch of random numbers with the shapes of a training batch, on the CPU. Its `gate_noise` is None.

    `samples`: number of samples. `latent_hw`: height and width of the latents.
    """
    m, text, factor = config.model, config.text.max_tokens, latent_factor(config.image.vae)
    return Batch(
        position=torch.arange(samples),
        weight=torch.ones(samples),
        x0=torch.randn(samples, m.latent_channels, *latent_hw),
        noise=torch.randn(samples, m.latent_channels, *latent_hw),
        timestep=torch.randint(config.diffusion.num_timesteps, (samples,)),
        text=torch.randn(samples, text, m.text_width),
        text_mask=torch.ones(samples, text, dtype=torch.bool),
        end=torch.full((samples,), text - 1),
        edge=torch.rand(samples, *(factor * side for side in latent_hw)),
        gate_noise=None,
    )


def tensor_bytes() -> int:
    """Return the bytes of all live tensors of this process. Tensors that share a storage count once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def bench_states(config: Config, tree: dict[str, Any], ranks: Ranks, device: torch.device) -> tuple[float, float]:
    """Return the bytes per parameter on this rank, before and after the optimizer update of the second step. Collective.

    The optimizer creates its moments in the first step. `tree`: DeepSpeed's configuration.
    """
    before = tensor_bytes()
    plan = BatchPlan.of(config, ranks.world_size)
    engine = Engine(config, tree, plan, device)
    ema = Ema(engine.fragments, config.ema)
    schedule = NoiseSchedule.create(config.diffusion, device)
    batch = random_batch(config, plan.micro_batch_size)
    num_parameters = sum(torch.Size(shape).numel() for shape in engine.fragments.shapes.values())
    sizes: list[float] = []
    for step in (1, 2):
        for _ in range(plan.accumulation):
            engine.backward(compute_losses(engine, batch, schedule, config, engine.dtype).total.sum() * plan.loss_scale)
        sizes = [(tensor_bytes() - before) / num_parameters]
        engine.step(config.optim.lr)
        ema.update(step)
        sizes.append((tensor_bytes() - before) / num_parameters)
    return sizes[0], sizes[1]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="emoji-tiny", help="preset or YAML file of the model (default emoji-tiny)")
    command.add_argument("--zero", choices=CONFIGURATIONS, default="zero2", help="DeepSpeed configuration (default zero2)")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, e.g. train.dtype=bfloat16")


def run(args: argparse.Namespace) -> None:
    """Print the bytes per parameter on a rank for weights, gradients, optimizer states and the moving average."""
    ranks = discover()
    device = initialise(ranks)
    small = ["train.global_batch_size=8", "train.micro_batch_size=2", "model.checkpoint_activations=blocks"]
    config = load_config(args.config, [*small, *args.overrides])
    zero = {"zero_optimization": {**CONFIGURATIONS[args.zero], **({} if args.zero == "zero2" else BUCKETS)}}
    peak, rest = bench_states(config, zero, ranks, device)
    if ranks.is_main:
        where = f"{config.train.dtype} {args.zero}, {counted(ranks.world_size, 'rank')}"
        print(f"{where}: {peak:.1f} bytes per parameter before the optimizer's update, {rest:.1f} after it")
