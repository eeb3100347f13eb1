"""The plan of a run: possible settings, the fastest first, and what the fastest ones cost in days, GPU hours and dollars."""

import math
from dataclasses import dataclass

from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.errors import UserError
from raphael_dist.planning.checkpoint_interval import SavePlan, plan_saves
from raphael_dist.planning.search import Outcome, Search
from raphael_dist.text import counted

STATE_BYTES = 16  # per parameter in a checkpoint: fp32 weights, two moments, moving average


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: possible settings with predicted memory and speed, and the cost of the best ones.

    Attributes:
        search: the object that made the predictions: for the configuration `search.config` on `search.world` devices of
            `search.cluster`.
        ranked: all possible settings (ZeRO stage, micro-batch, ...) with predicted memory and time, the best first.
        images: number of images to train on.
        saves: how often to save a checkpoint, and what this costs.
        price: dollars per device hour.
    """

    search: Search
    ranked: list[Outcome]
    images: int
    saves: SavePlan
    price: float

    @property
    def best(self) -> Outcome:
        return self.ranked[0]

    @property
    def seconds(self) -> float:
        """Predicted seconds of the whole run with the best settings, including saves and failures."""
        return self.images / self.best.step.images_per_s / (1 - self.saves.lost)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.search.world

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.price

    def save_every(self) -> int:
        """Return the best interval between checkpoints in steps, for the setting `checkpoint.every`."""
        return max(1, round(self.saves.interval_s / self.best.step.seconds))


def make_plan(
    search: Search, images: int | None = None, price: float | None = None, mtbf_gpu_hours: float | None = None
) -> RunPlan:
    """Predict memory and time of a run for all possible settings, and compute the cost of the best ones.

    Args:
        search: the run's configuration, the cluster, and the number of devices.
        images: number of images to train on; None: `train.max_steps` times `train.global_batch_size`.
        price: dollars per device hour; None: that of the cluster description.
        mtbf_gpu_hours: device hours between two failures; None: that of the cluster description.

    Raises:
        UserError: no settings fit into memory.
    """
    config, cluster = search.config, search.cluster
    ranked = search.ranked()
    best = ranked[0]
    if not best.fits:
        raise UserError(
            f"the cluster {cluster.name} has too little memory on {counted(search.world, 'device')}: the settings that need "
            f"least ({best.choice}) require {best.memory.total / 1e9:.1f} GB per rank, but a device has "
            f"{cluster.memory_gb.value:.0f} GB. Use more nodes, or devices with more memory."
        )
    num_bytes = STATE_BYTES * search.parameters
    nodes = math.ceil(search.world / cluster.per_node.value)
    hours = cluster.gpu_hours_per_failure.value if mtbf_gpu_hours is None else mtbf_gpu_hours
    saves = plan_saves(
        num_bytes,
        stall_s=num_bytes / search.world / (cluster.host_gb_s.value * 1e9),
        write_s=num_bytes / nodes / (cluster.storage_gb_s.value * 1e9),
        mtbf_s=hours * 3600 / search.world,
        restart_s=cluster.restart_s.value,
        shortest_s=best.step.seconds,
    )
    return RunPlan(
        search=search,
        ranked=ranked,
        images=config.train.max_steps * config.train.global_batch_size if images is None else images,
        saves=saves,
        price=cluster.price.value if price is None else price,
    )


def active_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return how many parameters process one image token, if this token uses one expert of each kind in each block.

    All parameters outside of experts count. A token that lies in the image regions of several words is processed by the
    experts of all these words. The number of these experts depends on the trained gates, so only one is counted.

    `shapes`: shapes of all parameters of the whole model, by name.
    """
    total = 0
    for name, shape in shapes.items():
        total += math.prod(shape[1:] if stacked(name) else shape)
    return total
