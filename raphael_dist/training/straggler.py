"""Which ranks are slow: everyone waits for the slowest, so a step's length alone does not tell.

What a rank needs by itself is the time for its data and its forward pass; the backward pass ends in a collective and shows
the same length everywhere. With experts spread over ranks the forward pass waits too: then the slow rank's group stands out.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from raphael_dist.model.device import from_host, is_gpu

SLOW_RATIO = 1.5
WINDOW = 20  # steps that a judgement is based on, at least


class Stopwatch:
    """Adds up spans of this rank's own work, on a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> "float | torch.cuda.Event":
        """Return the mark of a span's beginning."""
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
    """Compares the ranks' own time over the last steps."""

    hosts: list[str]  # by rank
    _recent: deque[tuple[int, list[float]]] = field(default_factory=deque)

    def observe(self, steps: int, seconds: float, device: torch.device) -> None:
        """Take in what each rank needed for the last `steps` steps. Collective."""
        mine = from_host([seconds], device)
        everywhere = [torch.empty_like(mine) for _ in self.hosts]
        dist.all_gather(everywhere, mine)
        self._recent.append((steps, torch.cat(everywhere).tolist()))
        while sum(n for n, _ in self._recent) - self._recent[0][0] >= WINDOW:
            self._recent.popleft()

    def slowest_ratio(self) -> float:
        """Return the slowest rank's time relative to the median."""
        ratios = self._ratios()
        return max(ratios)

    def slow(self) -> str | None:
        """Name the ranks beyond SLOW_RATIO over at least WINDOW steps; None without any."""
        if len(self.hosts) < 2 or sum(n for n, _ in self._recent) < WINDOW:
            return None
        late = [(ratio, rank) for rank, ratio in enumerate(self._ratios()) if ratio > SLOW_RATIO]
        names = [f"rank {rank} on {self.hosts[rank]} ({ratio:.1f} times the median)" for ratio, rank in sorted(late)[::-1]]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"slow for {WINDOW} steps or more: {', '.join(names[:5])}{more}" if names else None

    def _ratios(self) -> list[float]:
        sums = [sum(column) for column in zip(*(seconds for _, seconds in self._recent), strict=True)]
        # The lower of the two middle ones, so that one slow rank of two stands out.
        median = sorted(sums)[(len(sums) - 1) // 2]
        return [s / max(median, 1e-9) for s in sums]
