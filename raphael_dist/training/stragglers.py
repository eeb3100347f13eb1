"""Which ranks are slow. All ranks wait for the slowest, so the length of a step alone does not show it.

A rank's own time is that of its data and its forward pass; the backward pass ends in a collective and takes equally long
everywhere. With expert parallelism the forward pass waits too, so all ranks of the slow rank's group appear slow.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from raphael_dist.model.device import from_host, is_gpu
from raphael_dist.runtime.rendezvous import join_first

SLOW_RATIO = 1.5
WINDOW = 20  # least number of steps to compare


class Stopwatch:
    """Adds up the time of this rank's own work, without waiting for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> "float | torch.cuda.Event":
        """Return a mark of this moment, for `stop`."""
        return self._mark() if is_gpu(self._device) else time.perf_counter()

    def stop(self, began: "float | torch.cuda.Event") -> None:
        """Add the time since the mark `began`."""
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began
        else:
            self._spans.append((began, self._mark()))

    def add(self, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds += seconds

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._spans) / 1e3
        self._seconds, self._spans = 0.0, []
        return seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Stragglers:
    """Compares the ranks' own times over the last steps."""

    hosts: list[str]  # by rank
    _recent: deque[tuple[int, list[float]]] = field(default_factory=deque)

    def observe(self, steps: int, seconds: float, device: torch.device) -> None:
        """Record the time of each rank for the last `steps` steps. Collective."""
        local = from_host([seconds], device)
        by_rank = [torch.empty_like(local) for _ in self.hosts]
        dist.all_gather(by_rank, local)
        self._recent.append((steps, torch.cat(by_rank).tolist()))
        while sum(n for n, _ in self._recent) - self._recent[0][0] >= WINDOW:
            self._recent.popleft()

    def slowest_ratio(self) -> float:
        """Return the slowest rank's time relative to the median."""
        return max(self._ratios())

    def describe_slow(self) -> str | None:
        """Return a message that names the ranks above SLOW_RATIO for at least WINDOW steps; None: there are none."""
        if len(self.hosts) < 2 or sum(n for n, _ in self._recent) < WINDOW:
            return None
        late = [(ratio, rank) for rank, ratio in enumerate(self._ratios()) if ratio > SLOW_RATIO]
        names = [f"rank {rank} on {self.hosts[rank]} ({ratio:.1f} times the median)" for ratio, rank in sorted(late)[::-1]]
        return f"slow for {WINDOW} steps or more: {join_first(names, ', ')}" if names else None

    def _ratios(self) -> list[float]:
        sums = [sum(column) for column in zip(*(seconds for _, seconds in self._recent), strict=True)]
        # The lower of the two middle ones, so that one slow rank of two stands out.
        median = sorted(sums)[(len(sums) - 1) // 2]
        return [s / max(median, 1e-9) for s in sums]
