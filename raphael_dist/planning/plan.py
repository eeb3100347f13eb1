"""The plan of a run: the ranked choices, and what the first of them costs in days, GPU-hours and money."""

import math
from dataclasses import dataclass

from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.config import Config
from raphael_dist.errors import UserError
from raphael_dist.planning.checkpoints import Saving, saving
from raphael_dist.planning.cluster import ClusterSpec
from raphael_dist.planning.search import Outcome, Search

STATE_BYTES = 16  # of a parameter in a checkpoint: fp32 weights, two moments, average


@dataclass(frozen=True)
class RunPlan:
    """ranked: all choices, the best first. images: the target. active: parameters that one image token meets."""

    config: Config
    cluster: ClusterSpec
    search: Search
    ranked: list[Outcome]
    images: int
    parameters: int
    active: int
    saving: Saving
    price: float

    @property
    def best(self) -> Outcome:
        return self.ranked[0]

    @property
    def seconds(self) -> float:
        """To the target, with what saves and failures lose."""
        return self.images / self.best.step.images_per_s / (1 - self.saving.lost)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.search.world

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.price

    def save_every(self) -> int:
        """Return `checkpoint.every` by the best interval: steps, at least 1."""
        return max(1, round(self.saving.interval_s / self.best.step.seconds))


def make_plan(
    search: Search, images: int | None = None, price: float | None = None, mtbf_gpu_hours: float | None = None
) -> RunPlan:
    """Reckon all choices and what the best costs. UserError where none fits, with what is missing."""
    config, cluster = search.config, search.cluster
    ranked = search.ranked()
    best = ranked[0]
    if not best.fits:
        raise UserError(
            f"{search.world} devices of {cluster.name}: nothing fits; the least is {best.memory.total / 1e9:.1f} GB a rank "
            f"({best.choice}), of {cluster.memory_gb.value:.0f} GB; use more nodes or devices with more memory"
        )
    hours = cluster.gpu_hours_per_failure.value if mtbf_gpu_hours is None else mtbf_gpu_hours
    num_bytes = STATE_BYTES * search.parameters
    nodes = math.ceil(search.world / cluster.per_node.value)
    saved = saving(
        num_bytes,
        num_bytes / search.world / (cluster.host_gb_s.value * 1e9),
        num_bytes / nodes / (cluster.storage_gb_s.value * 1e9),
        hours * 3600 / search.world,
        cluster.restart_s.value,
        best.step.seconds,
    )
    return RunPlan(
        config,
        cluster,
        search,
        ranked,
        config.train.max_steps * config.train.global_batch if images is None else images,
        search.parameters,
        active_parameters(search),
        saved,
        cluster.price.value if price is None else price,
    )


def active_parameters(search: Search) -> int:
    """Return the parameters that one image token meets: one time expert and one space expert of each layer, and all else."""
    total = search.parameters
    for name, shape in search.shapes.items():
        if stacked(name):
            total -= math.prod(shape) * (shape[0] - 1) // shape[0]
    return total
