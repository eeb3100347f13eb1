"""How long a step takes on a cluster: products, memory traffic, launches and communication, and what hides behind what.

A device takes, for every operation, the longer of its FLOPs and its bytes (the roofline), and a smallest time. A GPU's host
launches ahead of it, so that launches cost only what they take longer than the device; a CPU is its own host. Communication
is `parallel.communication`'s.
"""

from dataclasses import dataclass, replace

import numpy as np

from raphael_dist.config import Config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.communication import Part, Scheme, communication
from raphael_dist.planning.cluster import MULTIPLY, ClusterSpec
from raphael_dist.planning.memory import Held
from raphael_dist.planning.operations import CLASSES
from raphael_dist.planning.trace import PHASES, Trace

# Launches for each parameter in every micro-step: where DeepSpeed reduces, a copy into the bucket and the division; where
# gradients are collected, the sum, which a captured backward pass has among its own.
LAUNCHES_PER_PARAMETER = 2
LAUNCHES_WHEN_COLLECTED = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank.

    products: operations with FLOPs. traffic: all other operations. update: gradient norm, optimizer, average. launches: by
    how much the host is behind. exposed: communication that nothing hides; parts: all of it. images: of the step.
    """

    products: float
    traffic: float
    update: float
    launches: float
    exposed: float
    parts: tuple[Part, ...]
    images: int
    ranks: int
    flops: float  # of the model for one image, forward times three

    @property
    def compute(self) -> float:
        """Without communication."""
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
        """Return the share of the devices' peak that the model's FLOPs take, recomputation left out."""
        return self.images_per_s / self.ranks * self.flops / (peak_tflops * 1e12)


def device_times(trace: Trace, cluster: ClusterSpec, dtype: str) -> tuple[float, float]:
    """Return the seconds that the device spends on operations with FLOPs, and on all others, in a micro-step."""
    seconds = np.zeros(trace.launches)
    for i, sort in enumerate(CLASSES):
        chosen = trace.sort == i
        rates = cluster.rate(dtype, sort)
        times = trace.bytes[chosen] / (rates.gb_s.value * 1e9)
        if rates.tflops is not None:
            times = np.maximum(times, trace.flops[chosen] / (rates.tflops.value * 1e12))
        seconds[chosen] = rates.us.value * 1e-6 + times
    seconds[trace.phase == PHASES.index("recomputed")] *= cluster.recomputed.value
    multiplies = np.isin(trace.sort, [CLASSES.index(sort) for sort in MULTIPLY])
    return float(seconds[multiplies].sum()), float(seconds[~multiplies].sum())


def update_time(config: Config, held: Held, cluster: ClusterSpec) -> float:
    """Return the seconds of gradient norm, optimizer and average, which are bound by their bytes.

    Gradients are read for the norm, and converted to float32 where they are not yet; the optimizer reads them, and reads and
    writes master weights and moments; the average reads the weights, and is read and written; the weights that compute are
    written.
    """
    states = held.states
    part = states.master or states.weights
    gradients = part // 2 if config.train.dtype == "bfloat16" else part
    num_bytes = gradients + (gradients + part if held.update else 0) + part
    num_bytes += 2 * part + 2 * states.moments + part // 2 + 3 * states.ema
    return num_bytes / (cluster.rate(config.train.dtype, "product").gb_s.value * 1e9)  # in long streams, as products read


def scheme_of(held: Held) -> Scheme:
    """Return how weights and gradients are shared out (docs/scale.md)."""
    return "zero3" if held.stage == 3 else "reduce_scatter" if held.collected else "all_reduce"


def step_time(
    config: Config,
    plan: BatchPlan,
    trace: Trace,
    held: Held,
    cluster: ClusterSpec,
    parameters: int,
    num_tensors: int,
    overlap: bool = False,
) -> StepTime:
    """Return what a step takes. trace: of a micro-step; parameters: of the whole model, in num_tensors tensors.

    overlap: gradients are reduced during the backward pass (`zero2_overlap.json`); ZeRO-3 always does, and gathers ahead.
    """
    dtype, micro_steps = config.train.dtype, plan.accumulation
    products, traffic = (micro_steps * seconds for seconds in device_times(trace, cluster, dtype))
    update = update_time(config, held, cluster)
    device = products + traffic + update
    of_each = LAUNCHES_WHEN_COLLECTED if held.collected else LAUNCHES_PER_PARAMETER
    num_launches = 0 if config.train.cuda_graphs else micro_steps * (trace.launches + of_each * num_tensors)
    host = num_launches * cluster.launch_us.value * 1e-6
    launches = max(0.0, host - device) if cluster.device == "gpu" else host
    # ZeRO-2 and 3 reduce in every micro-step, the others once a step.
    reductions = micro_steps if held.stage >= 2 else 1
    links = cluster.links(plan.world_size)
    parts = tuple(communication(config, plan, links, parameters, scheme_of(held), reductions))
    forward = trace.total(trace.flops, "forward")
    backward = 1 - forward / max(1, trace.total(trace.flops))
    hidden = 0.0
    if overlap or held.stage == 3:
        for behind, share in (("forward", 1 - backward), ("backward", backward)):
            wanted = sum(part.seconds for part in parts if part.behind == behind)
            hidden += min(wanted, share * (products + traffic + launches))
    exposed = sum(part.seconds for part in parts) - hidden
    images = config.train.global_batch
    model_flops = 3 * forward / trace.samples
    return StepTime(products, traffic, update, launches, exposed, parts, images, plan.world_size, model_flops)


def by_phase(trace: Trace, cluster: ClusterSpec, dtype: str) -> dict[str, float]:
    """Return the device's seconds of each phase of a micro-step."""
    seconds, names = {}, ("kind", "phase", "sort", "segment", "flops", "bytes")
    for i, phase in enumerate(PHASES):
        chosen = trace.phase == i
        part = replace(trace, **{name: getattr(trace, name)[chosen] for name in names})
        seconds[phase] = sum(device_times(part, cluster, dtype))
    return seconds
