"""`tools/bench.py step`: an optimizer step compared with alternatives on the same work, in one process.

The following are compared:

- our U-Net without experts ("ours, dense")
- diffusers' `UNet2DConditionModel` of the same widths in a plain PyTorch loop
- our U-Net with experts, with model.expert_backend=auto, and with `reference`: the paper's formula as printed
- our blocks with DeepSpeed's `MoE` layers

All get equal batches in float32 and use AdamW. The models take steps in turn. The fastest forward pass, backward pass and
update of each model count, because they were disturbed least. The column "by FLOPs" is a model's time per FLOP in the
forward and backward pass, divided by that of our U-Net without experts: above 1.00, the model is less efficient.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.states import random_batch
from raphael_dist.config.schema import Config, load_config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule, denoise_loss_B
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.losses import Losses, compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from raphael_dist.text import counted
from raphael_dist.training.metrics import Metrics
from raphael_dist.training.throughput import FLOPS

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
WIDTHS = {
    # The widths of the demo, with experts as wide as the dense layer; and two levels of the paper's model.
    "demo": ["model.expert_width=[128,256,384,384]"],
    "paper": [
        "model.channels=[384,768]",
        "model.attention=[true,true]",
        "model.expert_width=[1536,3072]",
        "model.layers_per_block=1",
        "model.head_dim=64",
        "model.norm_groups=32",
        "train.micro_batch_size=2",
    ],
}


@dataclass(frozen=True)
class StepRow:
    """Results of the model `name`: fastest forward pass, backward pass and update in milliseconds, and FLOPs of a step."""

    name: str
    forward: float
    backward: float
    update: float
    flops: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update


class Contender:
    """One of the compared models, with an AdamW optimizer and a function that computes its loss on a fixed batch."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model, self._loss = model, loss
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self) -> tuple[float, float, float]:
        """Take one optimizer step; return the seconds of forward pass, backward pass and update."""
        self._optimizer.zero_grad()
        began = clock()
        loss = self._loss(self.model)
        forward = clock()
        loss.backward()
        backward = clock()
        self._optimizer.step()
        return forward - began, backward - forward, clock() - backward

    def flops(self) -> float:
        """Return the FLOPs of the forward and backward pass of a step, counted while it runs."""
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            self._loss(self.model).backward()
        return float(counter.get_total_flops())


def contenders(config: Config, reference: bool, side: int = 16) -> dict[str, Contender]:
    """Build the models to compare, by name.

    Args:
        config: configuration of the model with experts.
        reference: whether to include the paper's formula as printed, which is slow.
        side: height and width of the latents.
    """
    schedule, batch = (
        NoiseSchedule.create(config.diffusion),
        random_batch(config, config.train.micro_batch_size, (side, side)),
    )

    def ours(config: Config) -> Contender:
        torch.manual_seed(0)
        return Contender(
            RaphaelUNet(config), lambda model: compute_losses(model, batch, schedule, config, torch.float32).total.sum()
        )

    dense = dense_of(config)
    compared = {"ours, dense": ours(dense), "diffusers, dense": _diffusers(dense, batch, schedule)}
    compared["RAPHAEL, auto"] = ours(config)
    compared["DeepSpeed MoE, k=1"] = _deepspeed(config, batch, schedule)
    if reference:
        compared["RAPHAEL, reference"] = ours(_with(config, "model", expert_backend="reference"))
    return compared


def dense_of(config: Config) -> Config:
    """Return the configuration without experts and edge modules: Stable Diffusion's U-Net of the same widths."""
    config = _with(config, "model", space_experts=0, time_experts=0, time_activation="geglu")
    return _with(config, "edge", weight=0.0)


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _diffusers(config: Config, batch: Batch, schedule: NoiseSchedule) -> Contender:
    from benchmarks.gpu_step import diffusers_unet  # imports diffusers

    torch.manual_seed(0)
    model: Any = diffusers_unet(config)

    def loss(model: nn.Module) -> Tensor:
        noised = schedule.add_noise(batch.x0, batch.noise, batch.timestep)
        predicted = model(noised, batch.timestep, batch.text, return_dict=False)[0]
        return (denoise_loss_B(predicted, schedule.target(batch.x0, batch.noise, batch.timestep)) * batch.weight).sum()

    return Contender(model.train(), loss)


class _NativeMoE(nn.Module):
    """A layer x + MoE(norm(x)) with DeepSpeed's `MoE`, configured to drop no tokens, because our layers drop none."""

    def __init__(self, dim: int, hidden: int, experts: int, ep_size: int = 1) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)
        self.moe = MoE(dim, expert, experts, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False)
        if ep_size == 1:  # otherwise DeepSpeed's engine calls it
            self.moe.set_deepspeed_parallelism()

    def forward(self, h_BND: Tensor) -> Tensor:
        return h_BND + self.moe(self.norm(h_BND))[0]


def _deepspeed(config: Config, batch: Batch, schedule: NoiseSchedule) -> Contender:
    """Build the model of `with_deepspeed_moe` with its optimizer and loss, for one rank."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise DeepSpeed compiles it
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model, dense = with_deepspeed_moe(config)
    return Contender(model, lambda model: compute_losses(model, batch, schedule, dense, torch.float32).total.sum())


def with_deepspeed_moe(config: Config, ranks: int = 1) -> tuple[RaphaelUNet, Config]:
    """Return our dense U-Net with two DeepSpeed `MoE` layers in place of each feed-forward layer, and its configuration.

    One layer has as many experts as our Time-MoE, the other as many as our Space-MoE. The experts of each layer are sharded
    over as many ranks as possible: the greatest common divisor of `ranks` and the number of experts.
    """
    m, dense = config.model, dense_of(config)
    model = RaphaelUNet(dense)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    for level, block in zip(model.block_levels, blocks, strict=True):
        dim, hidden = m.channels[level], m.expert_width[level]
        block.norm3, block.ff = (
            nn.Identity(),
            nn.Sequential(*(_NativeMoE(dim, hidden, n, gcd(n, ranks)) for n in (m.time_experts, m.space_experts))),
        )
    return model, dense


def bench_step(config: Config, rounds: int, reference: bool = True) -> list[StepRow]:
    """Time `rounds` steps of each model (`contenders`); return a row for each."""
    compared = contenders(config, reference)
    flops = {name: contender.flops() for name, contender in compared.items()}
    times: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for i in range(rounds + 1):
        for name, contender in compared.items():
            if name != "RAPHAEL, reference" or i < 3:
                times[name].append(contender.step())
    rows = []
    for name, steps in times.items():
        forward, backward, update = (min(part) * 1e3 for part in zip(*steps[1:], strict=True))
        rows.append(StepRow(name, forward, backward, update, flops[name]))
    return rows


def bench_engine(config: Config, rounds: int, ranks: Ranks, device: torch.device) -> dict[str, float]:
    """Return the fastest time in milliseconds of a training step and of the trainer's work around it, by name.

    "plain loop" and "engine" are the whole step without and with DeepSpeed. "average" (update of the weights' moving
    average) and "metrics" are further work of the trainer.
    """
    plan = BatchPlan.of(config, ranks.world_size)
    plain = contenders(config, reference=False)["RAPHAEL, auto"]
    engine = Engine(config, {"zero_optimization": {"stage": 1}}, plan, device)
    ema, metrics = Ema(engine.fragments, config.ema), Metrics(device)
    schedule, batch = NoiseSchedule.create(config.diffusion), random_batch(config, plan.micro_batch_size, (16, 16))
    times: dict[str, list[float]] = defaultdict(list)
    for i in range(rounds + 1):
        times["plain loop"].append(sum(plain.step()))
        began = clock()
        losses = compute_losses(engine, batch, schedule, config, engine.dtype)
        engine.backward(losses.total.sum() * plan.loss_scale)
        engine.step(config.optim.lr)
        times["engine"].append(clock() - began)
        times["average"].append(_seconds(partial(ema.update, i + 1)))
        times["metrics"].append(_seconds(partial(_record, metrics, batch, losses)))
    return {name: min(values[1:]) * 1e3 for name, values in times.items()}


def _seconds(work: Callable[[], object]) -> float:
    began = clock()
    work()
    return clock() - began


def _record(metrics: Metrics, batch: Batch, losses: Losses) -> None:
    """Record the metrics of a micro-step and reduce them over ranks, as the trainer does for a log line."""
    count = batch.weight.sum()
    metrics.add("samples", count, "sum")
    for tag, value in (("loss", losses.denoise), ("loss_weighted", losses.total), ("loss_edge", losses.edge)):
        metrics.add(tag, value.sum(), "mean", count)
    for tag, load in (("load/space", losses.space_used), ("load/time", losses.time_load)):
        if load is not None:
            metrics.add(tag, load, "sum")
    metrics.reduce()


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument(
        "--widths", choices=WIDTHS, nargs="+", default=list(WIDTHS), help="sizes of the models (default: all)"
    )
    command.add_argument("--rounds", type=int, default=9, help="steps of each model that are timed (default 9)")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    command.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu measures processor time, for a busy machine; requires --threads 1",
    )
    command.add_argument(
        "--no-reference", action="store_true", help="do not measure the paper's formula as printed, which is slow"
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as for train.py")


def run(args: argparse.Namespace) -> None:
    """Time our optimizer step, compared with diffusers' U-Net and DeepSpeed's MoE, and the time that the engine adds."""
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(args.threads)
    global clock
    clock = CLOCKS[args.clock]
    for name in args.widths:
        config = load_config("emoji-tiny", [*WIDTHS[name], *args.overrides])
        micro = config.train.micro_batch_size
        config = _with(config, "train", global_batch_size=micro)
        rows = bench_step(config, args.rounds, not args.no_reference)
        print(
            f"{name}'s widths, batches of {micro}, 16 x 16 latents, {counted(args.threads, 'thread')}, {args.clock} time, "
            f"fastest of {args.rounds}"
        )
        print(_table(rows))
        if name == "demo":
            print(_engine_table(bench_engine(config, args.rounds, ranks, device)))
    torch.distributed.destroy_process_group()


def _table(rows: list[StepRow]) -> str:
    titles = ("forward", "backward", "update", "step", "GFLOP", "GFLOP/s", "by dense", "by FLOPs")
    lines = [f"{'ms':<22}" + "".join(f"{title:>10}" for title in titles)]
    dense = rows[0]
    rate = dense.flops / (dense.forward + dense.backward)
    for row in rows:
        work = row.forward + row.backward
        numbers = [row.forward, row.backward, row.update, row.total, row.flops / 1e9, row.flops / work / 1e6]
        ratios = [row.total / dense.total, work * rate / row.flops]
        line = "".join(f"{x:>10.1f}" for x in numbers) + "".join(f"{x:>10.2f}" for x in ratios)
        lines.append(f"{row.name:<22}{line}")
    return "\n".join(lines)


def _engine_table(times: dict[str, float]) -> str:
    added = times["engine"] - times["plain loop"] + times["average"] + times["metrics"]
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
    return f"ms of a step: {parts}; engine, average and metrics add {added / times['plain loop']:.1%} to the plain loop"
