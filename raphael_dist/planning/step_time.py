"""Predicts the time of a step on a cluster from matrix products, memory traffic, kernel launches and communication.

For each operation a device takes the longer of the times for its FLOPs and for its bytes (the roofline model), and at least
a minimum time. The host of a GPU launches operations ahead, so launches only cost the time by which the host is slower than
the GPU. A CPU launches its own operations. `planning.communication` predicts the communication.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raphael_dist.config.schema import Config
from raphael_dist.config.types import bytes_per_element
from raphael_dist.engine.gradient_buckets import bucket_count
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.cluster_spec import CLASSES_WITH_FLOPS, ClusterSpec
from raphael_dist.planning.communication import Communication, Scheme, communications, hidden_seconds
from raphael_dist.planning.memory import MemoryFootprint
from raphael_dist.planning.op_costs import CLASSES
from raphael_dist.planning.operation_recorder import PHASES
from raphael_dist.planning.trace import Trace

# Launches for each parameter in every micro-step: DeepSpeed copies the gradient into a bucket and divides it; with
# contiguous gradients there is one addition, which a captured backward pass contains.
LAUNCHES_PER_PARAMETER = 2
LAUNCHES_IF_CONTIGUOUS = 1


@dataclass(frozen=True)
class StepTime:
    """Predicted time of one optimizer step, in seconds, equal on every rank.

    Attributes:
        products: time of operations with FLOPs (matrix products, convolutions, attention).
        traffic: time of all other operations, which are limited by memory bandwidth.
        update: time of gradient norm, optimizer and moving average.
        launches: additional time because the host launches operations more slowly than the GPU runs them; on a CPU, time of
            all launches.
        exposed: time of communication that does not overlap with computation.
        parts: the predicted communication, one entry per kind, such as the reduction of gradients.
        images: number of images of the step, on all ranks.
        ranks: number of devices.
        flops: model FLOPs per image, three times those of the forward pass.
    """

    products: float
    traffic: float
    update: float
    launches: float
    exposed: float
    parts: tuple[Communication, ...]
    images: int
    ranks: int
    flops: float

    @property
    def compute(self) -> float:
        """Seconds of the step without communication."""
        return self.products + self.traffic + self.update + self.launches

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def communication(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    def mfu(self, peak_tflops: float) -> float:
        """Return the model FLOP utilisation (0..1): model FLOP/s divided by the peak of the devices.

        Recomputed operations do not count. `peak_tflops`: peak of one device, in TFLOP/s.
        """
        return self.images_per_s / self.ranks * self.flops / (peak_tflops * 1e12)


def operation_times(trace: Trace, cluster: ClusterSpec, dtype: str) -> NDArray[np.float64]:
    """Predict the seconds that the device takes for each operation of a micro-step, float64 [ops].

    `trace`: the operations. `cluster`: the description with the speed of the device. `dtype`: `train.dtype`; the speed
    depends on it.
    """
    seconds = np.zeros(trace.launches)
    for i, name in enumerate(CLASSES):
        chosen = trace.op_class == i
        rates = cluster.rate(dtype, name)
        times = trace.bytes[chosen] / (rates.gb_s.value * 1e9)
        if rates.tflops is not None:
            times = np.maximum(times, trace.flops[chosen] / (rates.tflops.value * 1e12))
        seconds[chosen] = rates.us.value * 1e-6 + times
    seconds[trace.phase == PHASES.index("recomputed")] *= cluster.recomputed.value
    return seconds


def device_times(trace: Trace, cluster: ClusterSpec, dtype: str) -> tuple[float, float]:
    """Predict the seconds that the device takes in a micro-step: (for operations with FLOPs, for all others).

    Operations with FLOPs are matrix products, convolutions and attention. `trace`: all operations of the micro-step.
    `dtype`: `train.dtype`, for which `cluster` lists the speed of the device.
    """
    seconds = operation_times(trace, cluster, dtype)
    with_flops = np.isin(trace.op_class, [CLASSES.index(name) for name in CLASSES_WITH_FLOPS])
    return float(seconds[with_flops].sum()), float(seconds[~with_flops].sum())


def update_time(config: Config, footprint: MemoryFootprint, cluster: ClusterSpec) -> float:
    """Predict the seconds of gradient norm, optimizer and moving average in a step, from the memory bandwidth.

    `config`: the run's configuration. `footprint`: memory of a rank, e.g. of weights and moments. `cluster`: the description
    with the bandwidth. These bytes are read and written:

    - The norm reads the gradients, and converts them to float32 if they are in bfloat16.
    - The optimizer reads gradients, and reads and writes fp32 weights and moments.
    - The moving average (EMA) of the weights is read and written. Its update also reads the weights.
    - The weights that the model computes with are written.
    """
    states = footprint.states
    part = states.master or states.weights
    gradients = part * bytes_per_element(config.train.dtype) // 4
    if "adamw" in config.train.kernels:  # one pass after the norm
        num_bytes = 2 * gradients + 2 * part + 2 * states.moments + part // 2 + 2 * states.ema
        return num_bytes / (cluster.rate(config.train.dtype, "product").gb_s.value * 1e9)
    num_bytes = gradients + (gradients + part if footprint.update_bytes else 0) + part
    num_bytes += 2 * part + 2 * states.moments + part // 2 + 3 * states.ema
    # Long contiguous reads, as those of products.
    return num_bytes / (cluster.rate(config.train.dtype, "product").gb_s.value * 1e9)


def scheme_of(footprint: MemoryFootprint) -> Scheme:
    """Return the name of the scheme by which ZeRO divides weights and gradients over ranks (docs/scale.md).

    It is "replicated" for ZeRO-0, "zero3" for ZeRO-3, otherwise "reduce_scatter" if all gradients lie in one buffer and
    "all_reduce" if not. `footprint`: memory of a rank; it states the ZeRO stage and whether gradients lie in one buffer.
    """
    if footprint.stage in (0, 3):
        return "zero3" if footprint.stage else "replicated"
    return "reduce_scatter" if footprint.contiguous else "all_reduce"


def step_time(
    config: Config,
    plan: BatchPlan,
    trace: Trace,
    footprint: MemoryFootprint,
    cluster: ClusterSpec,
    parameters: int,
    num_tensors: int,
    overlap: bool = False,
) -> StepTime:
    """Predict the time of an optimizer step.

    Args:
        config: the run's configuration.
        plan: how the batch is divided over ranks.
        trace: operations of one micro-step.
        footprint: memory of a rank.
        cluster: devices and links.
        parameters: number of parameters of the whole model.
        num_tensors: number of the model's parameter tensors.
        overlap: whether gradients are reduced during the backward pass (`zero2_overlap.json`), in buckets. The reduction of
            the last bucket starts when that pass ends. With ZeRO-3 gradients are always reduced during the backward pass.
    """
    dtype, micro_steps = config.train.dtype, plan.accumulation
    products, traffic = (micro_steps * seconds for seconds in device_times(trace, cluster, dtype))
    update = update_time(config, footprint, cluster)
    device = products + traffic + update
    per_tensor = LAUNCHES_IF_CONTIGUOUS if footprint.contiguous else LAUNCHES_PER_PARAMETER
    num_launches = 0 if config.train.cuda_graphs else micro_steps * (trace.launches + per_tensor * num_tensors)
    host = num_launches * cluster.launch_us.value * 1e-6
    launches = max(0.0, host - device) if cluster.device == "gpu" else host
    # ZeRO-2 and 3 reduce in every micro-step, the others once a step.
    reductions = micro_steps if footprint.stage >= 2 else 1
    links = cluster.links(plan.world_size)
    scheme = scheme_of(footprint)
    buckets = bucket_count(parameters, plan.world_size) if overlap else 1
    parts = tuple(communications(config, plan, links, parameters, scheme, reductions, footprint.persistent, buckets))
    forward = trace.total(trace.flops, "forward")
    hidden = 0.0
    if overlap or footprint.stage == 3:
        backward_share = 1 - forward / max(1, trace.total(trace.flops))
        passes = products + traffic + launches
        hidden = hidden_seconds(parts, (1 - backward_share) * passes, backward_share * passes)
        if footprint.stage < 3:
            hidden = min(hidden, (1 - 1 / buckets) * sum(part.seconds for part in parts if part.hidden_by == "backward"))
    exposed = sum(part.seconds for part in parts) - hidden
    images = config.train.global_batch_size
    model_flops = 3 * forward / trace.samples
    return StepTime(products, traffic, update, launches, exposed, parts, images, plan.world_size, model_flops)


def seconds_by_phase(trace: Trace, cluster: ClusterSpec, dtype: str) -> dict[str, float]:
    """Predict the seconds that the device takes in each phase of a micro-step: "forward", "backward" and "recomputed".

    `trace`: all operations of the micro-step. `dtype`: `train.dtype`, for which `cluster` lists the speed of the device.
    """
    seconds = operation_times(trace, cluster, dtype)
    return {phase: float(seconds[trace.phase == i].sum()) for i, phase in enumerate(PHASES)}
