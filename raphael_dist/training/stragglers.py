"""Finds slow ranks. All ranks wait for the slowest one, so the duration of a step does not show which rank is slow.

A rank's own time is the time for its data and its forward pass. The backward pass ends in a collective and takes equally
long on all ranks. With expert parallelism the forward pass has collectives too, so all ranks in the group of a slow rank
appear slow.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from raphael_dist.model.device import from_host, is_gpu
from raphael_dist.runtime.rendezvous import join_first

SLOW_RATIO = 1.5
WINDOW = 20  # least number of steps to compare


class Stopwatch:
    """Adds up the seconds that this rank needs for its own work (data and forward pass). Only `take` waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Return a context manager that adds the duration of its body, with the GPU work that it starts, to the total."""
        if not is_gpu(self._device):
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._spans.append((first, last))

    def add(self, seconds: float) -> None:
        """Add seconds that were measured elsewhere to this stopwatch's total."""
        self._seconds += seconds

    def take(self) -> float:
        """Return this stopwatch's total in seconds, and set it back to 0. Waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._spans) / 1e3
        self._seconds, self._spans = 0.0, []
        return seconds


@dataclass
class Stragglers:
    """Compares the time that each rank needs for its own work (data and forward pass), over the last 20 steps or more.

    Attributes:
        hosts: the host name of each rank, for messages.
    """

    hosts: list[str]
    _recent: deque[tuple[int, list[float]]] = field(default_factory=deque)

    def observe(self, steps: int, seconds: float, device: torch.device) -> None:
        """Exchange and record the time that each rank needed for its own work (data and forward pass). Collective.

        Args:
            steps: number of optimizer steps since the last call.
            seconds: this rank's time for its own work in these steps, in seconds.
            device: this rank's device.
        """
        local = from_host([seconds], device)
        by_rank = [torch.empty_like(local) for _ in self.hosts]
        dist.all_gather(by_rank, local)
        self._recent.append((steps, torch.cat(by_rank).tolist()))
        while sum(n for n, _ in self._recent) - self._recent[0][0] >= WINDOW:
            self._recent.popleft()

    def slowest_ratio(self) -> float:
        """Return how many times longer the slowest rank's own work (data and forward pass) takes than the median rank's."""
        return max(self._ratios())

    def describe_slow(self) -> str | None:
        """Return a message that names the slow ranks, the slowest first.

        A rank is slow if its own work (data and forward pass) takes more than 1.5 times the median of all ranks
        (SLOW_RATIO). Returns None if there is no such rank, or if fewer than 20 steps (WINDOW) were observed.
        """
        if len(self.hosts) < 2 or sum(n for n, _ in self._recent) < WINDOW:
            return None
        late = [(ratio, rank) for rank, ratio in enumerate(self._ratios()) if ratio > SLOW_RATIO]
        names = [
            f"rank {rank} on {self.hosts[rank]} (its own work takes {ratio:.1f} times the median)"
            for ratio, rank in sorted(late)[::-1]
        ]
        return f"slow ranks for {WINDOW} steps or more: {join_first(names, ', ')}" if names else None

    def _ratios(self) -> list[float]:
        sums = [sum(column) for column in zip(*(seconds for _, seconds in self._recent), strict=True)]
        # The lower of the two middle ones, so that one slow rank of two stands out.
        median = sorted(sums)[(len(sums) - 1) // 2]
        return [s / max(median, 1e-9) for s in sums]
