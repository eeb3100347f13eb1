"""What a rank holds, in bytes by kind, for every ZeRO stage, precision and expert parallelism.

The states are exact: where each element lies is `convert.partition`'s arithmetic, which real engines are held to, and what
DeepSpeed 0.19 keeps of it was read and is tested byte for byte. Activations come from a trace. Buffers are what DeepSpeed
allocates by its own settings.
"""

from dataclasses import dataclass, fields, replace
from math import prod

import torch

from raphael_dist.checkpoint.tensors import Shapes
from raphael_dist.config import Config
from raphael_dist.convert.partition import Topology, groups, local, topology_of, zero3
from raphael_dist.convert.plan import Options
from raphael_dist.engine.ds_config import REDUCE_BUCKET as COLLECTED
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.communication import REDUCE_BUCKET

GATHERED = 1_000_000_000  # numbers; DeepSpeed's stage3_max_live_parameters
# Share of the activations that the caching allocator cannot reuse: blocks are rounded up and split. Assumed.
SLACK = 0.05
# What torch and DeepSpeed load and keep of their own from the first step on, on a CPU. Of one measured run of six, which the
# others are held to (docs/performance.md, section 1).
LIBRARIES = 65_000_000


@dataclass(frozen=True)
class States:
    """Bytes of a rank's model states; gradients are those after the last backward pass, before the update."""

    weights: int
    master: int
    moments: int
    ema: int
    gradients: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment of a step.

    activations: at the peak of a micro-step. buffers: for reducing gradients, and under ZeRO-3 the gathered weights.
    update: what the update needs for itself, after the activations are gone. slack: lost in the allocator; on a CPU what
    libraries take for themselves.
    """

    states: States
    activations: int
    buffers: int
    update: int
    slack: int

    @property
    def total(self) -> int:
        """The larger of the two fullest moments: in the backward pass, and in the update."""
        return self.states.total + max(self.activations + self.buffers + self.slack, self.update)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes by kind, for tables and figures; the update's are there where it is the fullest moment."""
        kinds = {f.name: getattr(self.states, f.name) for f in fields(self.states)}
        if self.update > self.activations + self.buffers + self.slack:
            return {**kinds, "update": self.update}
        return {**kinds, "activations": self.activations, "buffers": self.buffers, "slack": self.slack}


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters of the whole model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in RaphaelUNet(config).named_parameters()}


def topology(config: Config, stage: int, world: int) -> Topology:
    """Return where a configuration's parameters lie on `world` ranks."""
    parallel = config.parallel
    options = Options(world=world, space_ep=parallel.space_ep, time_ep=parallel.time_ep, stage=stage)
    return topology_of(config, options)


def states(
    config: Config, shapes: Shapes, where: Topology, accumulation: int, rank: int = 0, *, collected: bool = True
) -> States:
    """Return a rank's model states. accumulation: micro-steps of a step; collected: as in `Held`, of ZeRO-1 and 2."""
    width = _width(config)
    count = _moments(config)
    several = _in_float32(config, accumulation)
    if where.stage == 0:
        n = sum(prod(shape) for shape in shapes.values())
        return States(width * n, 0, 4 * count * n, _ema(config, n), width * n)
    if where.stage == 3:
        part = zero3(shapes, where.world, rank)[1]
        owned = sum(span.numel for span in zero3(shapes, where.world, rank)[0])
        # Its own part of each weight, and the gradients, which it keeps from its first step on.
        gradients = (4 if several else width) * part
        return States(width * part, 4 * part, 4 * count * part, _ema(config, owned), gradients)
    if where.stage == 1 and several:
        where = replace(where, alignment=1)  # DeepSpeed's BF16_Optimizer rounds no parameter up
    mine = groups(shapes, where, rank)
    whole = sum(g.per_rank_padded * g.ranks for g in mine)
    part = sum(g.per_rank_padded for g in mine)
    owned = sum(span.numel for g in mine for span in g.spans)
    held = sum(prod(local(name, shape, where, rank)[0]) for name, shape in shapes.items())
    if where.stage == 1 and several:
        # All ranks hold the whole sum in float32, and the last micro-step's own gradients.
        gradients = 4 * whole + width * held
    elif collected:
        # One buffer for all, and this rank's part: of a mean over ranks, or of the sum over micro-steps.
        sums = where.stage == 2 and accumulation > 1
        apart = sum(g.per_rank_padded for g in mine if g.ranks > 1 or sums)
        gradients = width * whole + (4 if several else width) * apart
    else:
        gradients = 4 * part if several else width * owned
    return States(width * whole, 4 * part, 4 * count * part, _ema(config, owned), gradients)


@dataclass(frozen=True)
class Held:
    """What a rank holds whatever its micro-batch. numbers: of its own copy of the model; stage: of ZeRO.

    collected: gradients are reduced at once (`engine.zero.Collected`). buffered: numbers in the buckets through which
    DeepSpeed reduces them, and under ZeRO-3 in the gathered weights. update: bytes into which the update of ZeRO-1 to 3
    copies its part of the gradients, to one tensor and to float32.
    """

    states: States
    numbers: int
    stage: int
    collected: bool
    buffered: int
    update: int


def held(config: Config, shapes: Shapes, where: Topology, accumulation: int, overlap: bool = False) -> Held:
    """Return what rank 0 holds, the fullest. overlap: gradients are reduced during the backward pass."""
    numbers = sum(prod(local(name, shape, where, 0)[0]) for name, shape in shapes.items())
    flat = where.stage in (1, 2) and not _bf16_optimizer(config, where, accumulation)
    collected = flat and not overlap and (where.stage == 1 or numbers <= 2 * COLLECTED)
    found = states(config, shapes, where, accumulation, collected=collected)
    part = found.master // 4
    joined = 0 if collected or _width(config) == 4 else 2
    widened = 0 if collected and (_width(config) == 4 or _in_float32(config, accumulation)) else 4
    buffered = 0
    if flat and not collected:
        # A bucket is allocated whole, and what is reduced is flattened into a copy of at most the gradients that fill it.
        buckets, size = (2, REDUCE_BUCKET) if overlap else (1, COLLECTED)
        buffered = buckets * size + min(size, numbers)
    elif where.stage == 3:
        buffered = min(GATHERED, numbers) + min(REDUCE_BUCKET, numbers)
    return Held(found, numbers, where.stage, collected, buffered, part * (joined + widened))


def memory(config: Config, held: Held, activations: int, *, allocator: bool = True) -> Memory:
    """Return a rank's memory. activations: the trace's peak. allocator: torch's, which keeps blocks; False on a CPU."""
    buffers = _width(config) * held.buffered
    slack = round(SLACK * activations) if allocator else LIBRARIES
    return Memory(held.states, activations, buffers, held.update + (0 if allocator else slack), slack)


def _width(config: Config) -> int:
    return 2 if config.train.dtype == "bfloat16" else 4


def _in_float32(config: Config, accumulation: int) -> bool:
    """Return whether gradients of bfloat16 are added up in float32 (ds_config.merge)."""
    return config.train.dtype == "bfloat16" and accumulation > 1


def _bf16_optimizer(config: Config, where: Topology, accumulation: int) -> bool:
    return where.stage == 1 and _in_float32(config, accumulation)


def _moments(config: Config) -> int:
    return 2 if config.optim.kind == "adamw" else 0


def _ema(config: Config, owned: int) -> int:
    return 4 * owned if config.ema.enabled else 0
