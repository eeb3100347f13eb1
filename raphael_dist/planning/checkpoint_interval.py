"""Computes how often to save a checkpoint if the mean time between failures is known (Young 1974; Daly 2006)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SavePlan:
    """The cost of saving checkpoints, and the best interval between two of them.

    Attributes:
        bytes: size of a checkpoint.
        stall_s: seconds that training waits for a save.
        write_s: seconds until the checkpoint is on disk.
        interval_s: seconds between two saves.
        mtbf_s: mean seconds between two failures of the whole run.
        lost: share of the time spent on saves, repeated work and restarts.
    """

    bytes: int
    stall_s: float
    write_s: float
    interval_s: float
    mtbf_s: float
    lost: float


def young(save_s: float, mtbf_s: float) -> float:
    """Return the best interval between saves in seconds, to first order: sqrt(2 save_s mtbf_s) (Young 1974)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly(save_s: float, mtbf_s: float) -> float:
    """Return the best interval between saves in seconds, to higher order (Daly 2006, Eq. 37).

    `sqrt(2 s M) (1 + 1/3 sqrt(s / 2M) + 1/9 (s / 2M)) - s` for s < 2M, else M, with s = save_s and M = mtbf_s.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, stall_s: float, write_s: float, mtbf_s: float, restart_s: float) -> float:
    """Return the share of the time (0..1) that is lost to saves and failures, to first order.

    Once per interval, training waits `stall_s` for a save. Each failure loses half an interval of work, the save that was
    being written, and the time of the restart.
    """
    return stall_s / (interval_s + stall_s) + (interval_s / 2 + write_s + restart_s) / mtbf_s


def plan_saves(
    num_bytes: int, stall_s: float, write_s: float, mtbf_s: float, restart_s: float, shortest_s: float = 0.0
) -> SavePlan:
    """Return the best interval between checkpoints and its cost.

    The cost of a save is the time that training waits for it (`stall_s`). An interval is at least as long as a write,
    because a save waits for the previous one, and at least `shortest_s`, the time of one step.
    """
    interval = max(daly(stall_s, mtbf_s), write_s, shortest_s)
    lost = lost_share(interval, stall_s, write_s, mtbf_s, restart_s)
    return SavePlan(num_bytes, stall_s, write_s, interval, mtbf_s, lost)
