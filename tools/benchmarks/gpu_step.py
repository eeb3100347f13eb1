"""`tools/bench.py gpu`: a whole optimizer step of a preset, compared with a step of diffusers' U-Net of the same widths.

Our step is that of training: the engine with its ZeRO stage, forward, backward, clipping, AdamW on fp32 weights, the moving
average, and the copy of the batch. diffusers' step is plain PyTorch as in its training scripts: fp32 weights, autocast,
AdamW, clipping, no average. Its blocks are dense. The preset `sd2-dense` computes the same as diffusers' U-Net. For a preset
with experts, the difference is the cost of experts, gates and edge modules. Samples are random and have the first size of
`image.buckets`.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_all
from benchmarks.states import random_batch
from raphael_dist.config.schema import Config, load_config
from raphael_dist.engine.ds_config import read_deepspeed_json
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.compiling import uncompiled
from raphael_dist.model.device import HostCopy, is_gpu
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.moe import SpaceMoE
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, all_reduce_on_device, discover, initialise
from raphael_dist.storage.versions import versions
from raphael_dist.training.throughput import FLOPS, throughput, warmup_step

STEPS = ("ours", "diffusers", "diffusers-compiled")
DENSITY = 0.42  # share of the image tokens that a space expert needs in a trained model (docs/expert_routes.md)
WARM_UP = 3  # steps: libraries choose their kernels, optimizers make their state


@dataclass(frozen=True)
class StepTime:
    """The measured time and memory of an optimizer step.

    Attributes:
        seconds: seconds of a step, the median of several rounds.
        flops: FLOPs of the model per sample, with every space expert on every image token, as they are computed.
        useful_flops: `flops` without the work of space experts on image tokens whose weight for the expert is 0.
        peak_gib: largest memory of the device in GiB; 0 on a CPU.
    """

    seconds: float
    flops: float
    useful_flops: float
    peak_gib: float


def time_ours(config: Config, tree: dict[str, Any], ranks: Ranks, device: torch.device, steps: int) -> StepTime:
    """Measure the trainer's optimizer step with one micro-step, in three rounds of `steps` steps. Collective.

    `tree`: DeepSpeed's configuration.
    """
    plan = BatchPlan.of(config, ranks.world_size)
    torch.manual_seed(config.run.seed)  # the same weights on every rank
    with device:  # drawn on the device: 2.9 B numbers take a minute on a CPU
        model = RaphaelUNet(config)
    engine = Engine(config, tree, plan, device, model)
    ema = engine.create_ema()
    schedule, batch = NoiseSchedule.create(config.diffusion, device), _batch(config, device)
    _set_density(engine, batch.to(device), schedule)
    flops = warmup_step(engine, batch, schedule)
    idle = _idle_flops(engine, batch.to(device), schedule)

    def step() -> None:
        losses = compute_losses(engine, batch.to(device), schedule, config, engine.dtype)
        engine.backward(losses.total.sum() * plan.loss_scale)
        if engine.defers_update:
            step_before[0].read()
            step_before[0] = _start_update(engine, ema)
        else:
            engine.step(config.optim.lr, ema)

    step_before = [HostCopy(torch.zeros((), device=device))]
    seconds, peak = _timed(step, device, steps)
    return StepTime(seconds, flops, flops - idle, peak)


def _start_update(engine: Engine, ema: Ema | None) -> HostCopy:
    """Start the update of a step as `training.deferred_update` does; return the gradient norm, to be read a step later."""
    norm = all_reduce_on_device(engine.grad_square(), engine.device).sqrt()
    engine.update_if(norm < math.inf, engine.config.optim.lr, norm, ema)
    return HostCopy(norm)


def _set_density(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> None:
    """Set `mask_threshold` of each transformer block so that its space experts need about DENSITY of the image tokens.

    With random weights a word's attention is spread over the image, so with the preset's threshold experts would need nearly
    all tokens, unlike in a trained model.
    """
    modules = engine.module.modules()  # in order of execution
    blocks = [module for module in modules if isinstance(module, TransformerBlock) and module.space_moe is not None]
    low, high = [0.0] * len(blocks), [1.0] * len(blocks)
    for _ in range(12 if blocks else 0):
        for block, *ends in zip(blocks, low, high, strict=True):
            block.mask_threshold = sum(ends) / 2
        for i, (_, _, share) in enumerate(_needed_shares(engine, batch, schedule)):
            (low if share > DENSITY else high)[i] = blocks[i].mask_threshold


def _idle_flops(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> float:
    """Return the FLOPs per sample of space experts on image tokens whose weight for the expert is 0, in a training step.

    The FLOPs of the backward pass are included, as twice those of the forward pass.
    """
    needed = _needed_shares(engine, batch, schedule)
    return 3 * sum((1 - share) * 4 * tokens * m.num_experts * m.dim * m.hidden for m, tokens, share in needed)


def _needed_shares(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> list[tuple[SpaceMoE, int, float]]:
    """Run the model; return each SpaceMoE, its image tokens, and the share of them with a weight, averaged over experts."""
    needed: list[tuple[SpaceMoE, int, float]] = []

    def count(layer: SpaceMoE, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        needed.append((layer, inputs[0].shape[1], float(outputs[1].mean())))

    hooks = [m.register_forward_hook(count) for m in engine.module.modules() if isinstance(m, SpaceMoE)]
    with uncompiled(), torch.no_grad():  # each other `mask_threshold` would be compiled
        compute_losses(engine.module, batch, schedule, engine.config, engine.dtype)
    for hook in hooks:
        hook.remove()
    return needed


def time_diffusers(config: Config, device: torch.device, steps: int, compiled: bool = False) -> StepTime:
    """Measure an optimizer step of diffusers' U-Net on this rank alone, in three rounds of `steps` steps.

    Gradient checkpointing is on if our model recomputes activations. `compiled`: use torch.compile.
    """
    with device:
        model: Any = diffusers_unet(config)
    if config.model.checkpoint_activations != "none":
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    dtype, batch = getattr(torch, config.train.dtype), _batch(config, device)

    def loss() -> torch.Tensor:
        inputs = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(inputs.x0, inputs.timestep, inputs.text).sample
        return (out.float() - inputs.noise).square().mean()

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        loss()
    flops = 3 * counter.get_total_flops() / config.train.micro_batch_size
    if compiled:
        model.compile()
    seconds, peak = _timed(step, device, steps)
    return StepTime(seconds, flops, flops, peak)


def diffusers_unet(config: Config) -> UNet2DConditionModel:
    """Build diffusers' dense U-Net with the widths and layers of a configuration."""
    m = config.model
    names = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in m.attention]
    return UNet2DConditionModel(
        in_channels=m.latent_channels,
        out_channels=m.latent_channels,
        block_out_channels=m.channels,
        down_block_types=names,
        up_block_types=[name.replace("Down", "Up") for name in reversed(names)],
        layers_per_block=m.layers_per_block,
        norm_num_groups=m.norm_groups,
        cross_attention_dim=m.text_width,
        attention_head_dim=[width // m.head_dim for width in m.channels],  # diffusers' name for the number of heads
        use_linear_projection=True,
    )


def _batch(config: Config, device: torch.device) -> Batch:
    factor, (height, width) = latent_factor(config.image.vae), config.image.buckets[0]
    batch = random_batch(config, config.train.micro_batch_size, (height // factor, width // factor))
    return batch.pack() if is_gpu(device) else batch


def _timed(step: Callable[[], None], device: torch.device, steps: int) -> tuple[float, float]:
    """Return the seconds of a step (median of three rounds of `steps` steps), and the peak of the device's memory in GiB."""

    def finish() -> None:
        if is_gpu(device):
            torch.cuda.synchronize(device)

    if is_gpu(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        step()
    rounds = []
    for _ in range(3):
        finish()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        finish()
        rounds.append((time.perf_counter() - began) / steps)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if is_gpu(device) else 0.0
    return statistics.median(rounds), peak


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="raphael-3b", help="preset or YAML file of the model (default raphael-3b)")
    command.add_argument(
        "--micro-batch", type=int, nargs="+", default=[2, 8, 16], help="samples of a step on each rank (default 2 8 16)"
    )
    command.add_argument("--deepspeed_config", help="DeepSpeed configuration (default: as in training)")
    command.add_argument("--steps", type=int, default=10, help="steps in each of three rounds (default 10)")
    command.add_argument("--step-of", nargs="+", choices=STEPS, default=["ours", "diffusers"], help="models to measure")
    command.add_argument("--json", action="store_true", help="print a line of JSON per measurement instead of a table")
    command.add_argument("--all", action="store_true", help="measure all presets and kernels; a second call continues")
    command.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="file with the results of --all")
    command.add_argument("--minutes", type=float, default=9, help="time after which --all ends (default 9)")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, e.g. train.compile=true")


def run(args: argparse.Namespace) -> None:
    """Time a whole optimizer step, compared with that of diffusers' U-Net of the same widths."""
    if args.all:
        gpu_all.run_all(args)
        return
    ranks = discover()
    device = initialise(ranks)
    if ranks.is_main and not args.json:
        print(_machine(ranks, device), flush=True)
        print("| model | micro-batch | ms a step | images/s a rank | TFLOP/s a rank | MFU | useful MFU | peak GiB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for micro in args.micro_batch:
        sizes = [
            f"train.micro_batch_size={micro}",
            f"train.global_batch_size={micro * ranks.world_size}",
            f"data.bucket_run={micro}",
        ]
        config = load_config(args.config, [*args.overrides, *sizes])
        tree = read_deepspeed_json(args.deepspeed_config, config.train.dtype)
        works: dict[str, Callable[[], StepTime]] = {
            "ours": partial(time_ours, config, tree, ranks, device, args.steps),
            "diffusers": partial(time_diffusers, config, device, args.steps),
            "diffusers-compiled": partial(time_diffusers, config, device, args.steps, compiled=True),
        }
        for name in args.step_of:
            record = _record(config, works[name], ranks, device)
            gc.collect()  # DeepSpeed's engine refers to itself, so it is not freed at once
            if ranks.is_main and args.json:
                print(json.dumps(record), flush=True)
            elif ranks.is_main:
                what = args.config if name == "ours" else f"{name}, widths of {args.config}"
                print(f"| {what} | {micro} | {_line(record, micro)} |", flush=True)


def _record(config: Config, work: Callable[[], StepTime], ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Run `work`; return its `StepTime` as a dict, with TFLOP/s and MFU per rank, or {"error": text}."""
    try:
        measured = work()
    except (torch.OutOfMemoryError, UserError) as error:
        return {"error": " ".join(str(error).split())}
    samples, dtype = config.train.micro_batch_size * ranks.world_size, getattr(torch, config.train.dtype)
    rates = throughput(samples, measured.seconds, measured.flops, device, dtype, ranks.world_size)
    mfu = rates["throughput/mfu"]
    useful = mfu * measured.useful_flops / measured.flops
    return {**asdict(measured), "tflops": rates["throughput/tflops"], "mfu": mfu, "useful_mfu": useful}


def _line(record: dict[str, Any], micro: int) -> str:
    if "error" in record:
        return f"{record['error'][:80]} | | | | |"
    step = f"{record['seconds'] * 1e3:.1f} | {micro / record['seconds']:.2f} | {record['tflops']:.4g}"
    return f"{step} | {record['mfu']:.1%} | {record['useful_mfu']:.1%} | {record['peak_gib']:.1f}"


def _machine(ranks: Ranks, device: torch.device) -> str:
    """Return a line that states the device, the number of ranks and the versions of packages."""
    name = torch.cuda.get_device_name(device) if is_gpu(device) else "CPU"
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if is_gpu(device) else {}
    return f"{ranks.world_size} x {name}; " + ", ".join(f"{k} {v}" for k, v in {**versions(), **cuda}.items()) + "\n"
