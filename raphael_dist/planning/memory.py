"""Predicts the memory of one rank in bytes, by kind, for every ZeRO stage, precision and expert-parallel size.

Model states (weights, gradients, optimizer moments, moving average) are exact: `convert.zero_partition` computes which
elements each rank stores. (With `overlap_comm` the padding of each bucket, a few elements per rank, is left out.) Tests
compare the stored elements with those of real engines, and the bytes with those of DeepSpeed 0.19. Activations are predicted
from a recorded list of the operations of a micro-step (trace.py), and buffers from DeepSpeed's settings.
"""

from dataclasses import dataclass, fields, replace
from math import prod

from raphael_dist.checkpoint.tensors import Shapes
from raphael_dist.config.schema import Config
from raphael_dist.config.types import bytes_per_element
from raphael_dist.convert.write_plan import Options
from raphael_dist.convert.zero_partition import Topology, groups, local, topology_of, zero3
from raphael_dist.engine.ds_config import CONTIGUOUS_BUCKET, sums_in_float32, uses_contiguous_gradients
from raphael_dist.planning.communication import DEEPSPEED_BUCKET, PERSISTENT

MAX_LIVE_PARAMETERS = 1_000_000_000  # elements; DeepSpeed's stage3_max_live_parameters
# Share of the activations that the caching allocator cannot reuse, because blocks are rounded up and split. Assumed.
SLACK = 0.05
# Bytes that torch and DeepSpeed load and keep from the first step on, on a CPU. Fitted to one of six measured runs; the
# other five check it (docs/performance.md, "Memory").
LIBRARIES = 65_000_000


@dataclass(frozen=True)
class States:
    """Bytes of one rank for the model states: weights, gradients, and what the optimizer stores.

    Attributes:
        weights: weights that the model computes with, in `train.dtype`.
        master: the part of the fp32 weights that this rank's optimizer updates; 0 with ZeRO-0, which updates `weights`.
        moments: optimizer moments.
        ema: moving average of the weights.
        gradients: gradients after the last backward pass of a step, before the update.
    """

    weights: int
    master: int
    moments: int
    ema: int
    gradients: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class RankMemory:
    """Peak memory of one rank during a step, in bytes.

    Attributes:
        states: model states: weights, gradients, optimizer moments and moving average.
        activations: largest memory of activations in a micro-step.
        buffers: buffers for the reduction of gradients; under ZeRO-3 also gathered weights.
        update: temporary memory of the optimizer update, which runs after the activations have been freed.
        slack: memory that the allocator cannot reuse; on a CPU, memory of the libraries.
    """

    states: States
    activations: int
    buffers: int
    update: int
    slack: int

    @property
    def total(self) -> int:
        """Peak bytes of the rank: the larger of the peaks in the backward pass and in the optimizer update."""
        return self.states.total + max(self.activations + self.buffers + self.slack, self.update)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of each kind of memory at the peak, by name.

        The names are "weights", "master", "moments", "ema" and "gradients", and in addition "activations", "buffers" and
        "slack" if the peak is in the backward pass, or "update" if it is in the optimizer update.
        """
        kinds = {f.name: getattr(self.states, f.name) for f in fields(self.states)}
        if self.update > self.activations + self.buffers + self.slack:
            return {**kinds, "update": self.update}
        return {**kinds, "activations": self.activations, "buffers": self.buffers, "slack": self.slack}


@dataclass(frozen=True)
class MemoryFootprint:
    """Memory of a rank that does not depend on the micro-batch.

    Attributes:
        states: bytes of weights, gradients, optimizer moments and moving average.
        elements: number of parameters in the rank's copy of the model.
        stage: ZeRO stage.
        contiguous: whether gradients lie in flat buffers that are reduced without copies (`engine.zero.Zero12Contiguous`).
        buffer_elements: elements in DeepSpeed's buckets for gradients, and under ZeRO-3 in the gathered weights.
        update_bytes: bytes of temporary copies in the optimizer update of ZeRO-1 to 3: copies of the rank's gradients (flat,
            and in float32), and with `overlap_comm` of the weights, which are gathered at once.
        persistent: total elements of the small parameters, which ZeRO-3 never frees.
    """

    states: States
    elements: int
    stage: int
    contiguous: bool
    buffer_elements: int
    update_bytes: int
    persistent: int


def topology(config: Config, stage: int, world: int) -> Topology:
    """Return how a model's parameters are divided over `world` ranks, by ZeRO and by the expert parallelism of `config`.

    `stage`: the ZeRO stage, 0 to 3.
    """
    parallel = config.parallel
    options = Options(world=world, space_ep=parallel.space_ep, time_ep=parallel.time_ep, stage=stage)
    return topology_of(config, options)


def model_states(
    config: Config, shapes: Shapes, where: Topology, accumulation: int, rank: int = 0, *, contiguous: bool = True
) -> States:
    """Compute the bytes of the model states of a rank: weights, fp32 weights, moments, moving average and gradients.

    Args:
        config: the run's configuration.
        shapes: shapes of the whole model's parameters, by name.
        where: how these parameters are divided over the ranks, and the ZeRO stage.
        accumulation: micro-steps per optimizer step.
        rank: the rank whose memory is computed.
        contiguous: whether all gradients lie in one buffer and are reduced at once; used for ZeRO-1 and 2 only.
    """
    width = bytes_per_element(config.train.dtype)
    moments = 8 if config.optim.has_moments else 0  # bytes per element: two in float32
    ema = 4 if config.ema.enabled else 0
    float32_sums = sums_in_float32(config.train.dtype, accumulation)
    sum_width = 4 if float32_sums else width
    if where.stage == 0:
        n = sum(prod(shape) for shape in shapes.values())
        return States(width * n, 0, moments * n, ema * n, width * n)
    if where.stage == 3:
        spans, part = zero3(shapes, where.world, rank)
        owned = sum(span.numel for span in spans)
        # Gradients stay allocated from the first step on.
        return States(width * part, 4 * part, moments * part, ema * owned, sum_width * part)
    bf16_optimizer = where.stage == 1 and float32_sums
    if bf16_optimizer:
        where = replace(where, alignment=1)  # DeepSpeed's BF16_Optimizer does not pad parameters
    rank_groups = groups(shapes, where, rank)
    whole = sum(g.per_rank_padded * g.ranks for g in rank_groups)
    part = sum(g.per_rank_padded for g in rank_groups)
    owned = sum(span.numel for g in rank_groups for span in g.spans)
    if bf16_optimizer:
        # Every rank has the whole sum in float32, and the gradients of the last micro-step.
        gradients = 4 * whole + width * _local_elements(shapes, where, rank)
    elif contiguous:
        # One buffer for all gradients, and this rank's part of the mean over ranks or of the sum over micro-steps.
        keeps_sum = where.stage == 2 and accumulation > 1
        separate = sum(g.per_rank_padded for g in rank_groups if g.ranks > 1 or keeps_sum)
        gradients = width * whole + sum_width * separate
    else:
        gradients = 4 * part if float32_sums else width * owned
    return States(width * whole, 4 * part, moments * part, ema * owned, gradients)


def memory_footprint(
    config: Config, shapes: Shapes, where: Topology, accumulation: int, overlap: bool = False
) -> MemoryFootprint:
    """Compute the memory of rank 0 that does not depend on the micro-batch. No other rank needs more.

    Args:
        config: the run's configuration.
        shapes: shapes of the whole model's parameters, by name.
        where: how these parameters are divided over the ranks, and the ZeRO stage.
        accumulation: micro-steps per optimizer step.
        overlap: whether gradients are reduced during the backward pass.
    """
    width = bytes_per_element(config.train.dtype)
    float32_sums = sums_in_float32(config.train.dtype, accumulation)
    elements = _local_elements(shapes, where, 0)
    flat = where.stage in (1, 2) and not (where.stage == 1 and float32_sums)
    contiguous = flat and uses_contiguous_gradients(where.stage, overlap=overlap, offload=False, elements=elements)
    states = model_states(config, shapes, where, accumulation, contiguous=contiguous)
    part = states.master // 4
    flat_copy = 0 if contiguous or width == 4 else 2
    float32_copy = 0 if contiguous and (width == 4 or float32_sums) else 4
    buffer_elements = 0
    if flat and not contiguous:
        # A bucket is allocated whole. Its gradients are flattened into a copy, which is never larger than the gradients.
        buffer_elements = CONTIGUOUS_BUCKET + min(CONTIGUOUS_BUCKET, elements)
    elif where.stage == 3:
        buffer_elements = min(MAX_LIVE_PARAMETERS, elements) + min(DEEPSPEED_BUCKET, elements)
    update_bytes = part * (flat_copy + float32_copy)
    if overlap and contiguous and where.world > 1:
        update_bytes += width * part + states.weights
    persistent = persistent_elements(shapes) if where.stage == 3 else 0
    return MemoryFootprint(states, elements, where.stage, contiguous, buffer_elements, update_bytes, persistent)


def persistent_elements(shapes: Shapes) -> int:
    """Return the total elements of the small parameters, which ZeRO-3 never frees.

    A parameter is small if it has up to 100,000 elements (stage3_param_persistence_threshold in ds_configs/zero3.json).
    `shapes`: shapes of the whole model's parameters, by name.
    """
    return sum(size for size in map(prod, shapes.values()) if size <= PERSISTENT)


def rank_memory(config: Config, footprint: MemoryFootprint, activations: int, *, allocator: bool = True) -> RankMemory:
    """Compute the peak memory of one rank during a step, by kind, in bytes.

    Args:
        config: the run's configuration.
        footprint: memory of the rank that does not depend on the micro-batch (weights, optimizer states, buffers).
        activations: largest memory of activations in a micro-step, in bytes.
        allocator: whether torch's caching allocator keeps freed blocks; False on a CPU.
    """
    buffers = bytes_per_element(config.train.dtype) * footprint.buffer_elements
    slack = round(SLACK * activations) if allocator else LIBRARIES
    update = footprint.update_bytes + (0 if allocator else slack)
    return RankMemory(footprint.states, activations, buffers, update, slack)


def _local_elements(shapes: Shapes, where: Topology, rank: int) -> int:
    return sum(prod(local(name, shape, where, rank)[0]) for name, shape in shapes.items())
