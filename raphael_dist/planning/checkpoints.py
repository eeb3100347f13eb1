"""How often to save, from how often a run fails: the interval of Young (1974) and of Daly (2006)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Saving:
    """How to save. bytes: of a checkpoint. stall_s: how long training waits for a save; write_s: until it is on disk.

    interval_s: between two saves; mtbf_s: between two failures of the whole run. lost: share of the time that goes to saves,
    repeated work and restarts.
    """

    bytes: int
    stall_s: float
    write_s: float
    interval_s: float
    mtbf_s: float
    lost: float


def young(save_s: float, mtbf_s: float) -> float:
    """Return the interval between saves that loses least, to first order: sqrt(2 save mtbf) (Young 1974)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly(save_s: float, mtbf_s: float) -> float:
    """Return the interval between saves that loses least, to higher order (Daly 2006, Eq. 37).

    `sqrt(2 s M) (1 + 1/3 sqrt(s / 2M) + 1/9 (s / 2M)) - s` for s < 2M, else M.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, stall_s: float, write_s: float, mtbf_s: float, restart_s: float) -> float:
    """Return the share of the time that is no progress, to first order.

    Every interval waits for its save; every failure throws away half an interval, and what was being written then, and waits
    for the restart.
    """
    return stall_s / (interval_s + stall_s) + (interval_s / 2 + write_s + restart_s) / mtbf_s


def saving(
    num_bytes: int, stall_s: float, write_s: float, mtbf_s: float, restart_s: float, shortest_s: float = 0.0
) -> Saving:
    """Return the best interval and what it loses. shortest_s: of a step, below which nothing can be saved.

    The wait is what a save costs. The next save waits for the one before, so that no interval is shorter than a write.
    """
    interval = max(daly(stall_s, mtbf_s), write_s, shortest_s)
    return Saving(num_bytes, stall_s, write_s, interval, mtbf_s, lost_share(interval, stall_s, write_s, mtbf_s, restart_s))
