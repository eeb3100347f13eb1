"""Times collective operations of torch.distributed, and checks their results against values computed from a formula."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from raphael_dist.parallel.async_collectives import REDUCE_SCATTER

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
# The first name exists since torch 2.13, the second in older versions.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collective:
    """One kind of collective operation in a process group, with buffers of test data whose correct result is known.

    Args:
        name: "all_reduce", "reduce_scatter", "all_gather" or "all_to_all".
        group: the process group of n ranks.
        each: how many float32 numbers a block has. The whole buffer has n blocks: one for each rank.
        device: device of the buffers.

    All numbers of block b (from 0) on rank r are r n + b. The values stay below 2**24 up to 4,096 ranks, so
    that float32 holds them exactly. Their sums may be rounded, which `is_right` allows.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, each: int, device: torch.device) -> None:
        self.name, self.size = name, dist.get_world_size(group)
        self._group, self._each, self._device = group, each, device
        n, rank = self.size, dist.get_rank(group)
        blocks = torch.arange(n, dtype=torch.float32)
        sums = n * n * (n - 1) / 2 + n * blocks
        sent, expected = {
            "all_reduce": (rank * n + blocks, sums),
            "reduce_scatter": (rank * n + blocks, sums[rank : rank + 1]),
            "all_gather": (blocks[rank : rank + 1], blocks),
            "all_to_all": (rank * n + blocks, blocks * n + rank),
        }[name]
        self._sent, self._expected = (t.to(device).repeat_interleave(each) for t in (sent, expected))
        self._received = torch.empty_like(self._expected)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in one run: directly to each rank in all_to_all, else by the ring algorithm."""
        return (2 if self.name == "all_reduce" else 1) * 4 * self._each * (self.size - 1)

    def run(self) -> None:
        """Run the collective operation once on the test data; keep the result in a separate buffer for `is_right`."""
        if self.name == "all_reduce":
            self._received.copy_(self._sent)
            dist.all_reduce(self._received, group=self._group)
        elif self.name == "reduce_scatter":
            REDUCE_SCATTER(self._received, self._sent, group=self._group)
        elif self.name == "all_gather":
            _GATHER(self._received, self._sent, group=self._group)
        else:
            dist.all_to_all_single(self._received, self._sent, group=self._group)

    def is_right(self) -> bool:
        """Return whether the last `run` gave the expected values on this rank, within a relative error of 1e-5."""
        return torch.allclose(self._received, self._expected, rtol=1e-5)

    def seconds(self, repeats: int = 1) -> float:
        """Return the seconds of the fastest of `repeats` runs on this rank. Collective: all ranks of the group call it.

        One more run comes first and is not timed, because it opens connections.
        """
        self.run()
        best = float("inf")
        for _ in range(repeats):
            dist.barrier(group=self._group)
            best = min(best, timed(self.run, self._device))
        return best


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call of `work` takes, including the GPU work that it starts (if `device` is a GPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - began, 1e-9)
