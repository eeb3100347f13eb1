"""Computes how often to save a checkpoint if the mean time between failures is known (Young 1974; Daly 2006)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SavePlan:
    """The best interval between two checkpoints, and the cost of saving checkpoints.

    Attributes:
        bytes: size of a checkpoint.
        stall_s: seconds that training waits for a save.
        write_s: seconds until the checkpoint is on disk, while training continues.
        interval_s: seconds of training between two saves.
        mtbf_s: mean seconds between two failures of the whole run.
        lost: share of the time (0..1) spent on waiting for saves, repeating lost work and restarting.
    """

    bytes: int
    stall_s: float
    write_s: float
    interval_s: float
    mtbf_s: float
    lost: float


def young(save_s: float, mtbf_s: float) -> float:
    """Return the best interval between saves in seconds, to first order: sqrt(2 save_s mtbf_s) (Young 1974).

    `save_s`: seconds that a save costs. `mtbf_s`: mean seconds between two failures.
    """
    return math.sqrt(2 * save_s * mtbf_s)


def daly(save_s: float, mtbf_s: float) -> float:
    """Return the best interval between saves in seconds, to higher order (Daly 2006, Eq. 37).

    `sqrt(2 s M) (1 + 1/3 sqrt(s / 2M) + 1/9 (s / 2M)) - s` for s < 2M, else M. s = save_s: seconds that a save costs. M =
    mtbf_s: mean seconds between two failures.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, stall_s: float, write_s: float, mtbf_s: float, restart_s: float) -> float:
    """Return the share of the time (0..1) that is lost to saves and failures, to first order.

    Training waits `stall_s` seconds for a save after every `interval_s` seconds. Each failure (every `mtbf_s` seconds on
    average) loses half an interval of work, the `write_s` seconds until a save is on disk, and `restart_s` seconds.
    """
    return stall_s / (interval_s + stall_s) + (interval_s / 2 + write_s + restart_s) / mtbf_s


def plan_saves(
    num_bytes: int, stall_s: float, write_s: float, mtbf_s: float, restart_s: float, shortest_s: float = 0.0
) -> SavePlan:
    """Compute the best interval between checkpoints (`daly`) and what saving costs. All times are in seconds.

    Args:
        num_bytes: size of a checkpoint.
        stall_s: time that training waits for a save.
        write_s: time until a checkpoint is on disk. The interval is at least as long, because a save waits for the end of
            the previous save.
        mtbf_s: mean time between two failures of the run.
        restart_s: time from a failure to the next step.
        shortest_s: lower limit of the interval, such as the time of one step.
    """
    interval = max(daly(stall_s, mtbf_s), write_s, shortest_s)
    lost = lost_share(interval, stall_s, write_s, mtbf_s, restart_s)
    return SavePlan(num_bytes, stall_s, write_s, interval, mtbf_s, lost)
