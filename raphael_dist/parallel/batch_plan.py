"""Which sample positions each rank takes in each micro-step, so that a step sees exactly the global batch.

Progress is one integer, `samples_seen`: step s takes the positions [s * G, (s + 1) * G). They are cut into chunks and dealt
in order, over *units* of ranks and then micro-steps. A unit is one rank, or the ranks that exchange samples because they
share experts; these see one image size at a time, so with several sizes a chunk ends where a run of one size ends, whatever
the length of the runs: one that is no multiple of a unit's slots leaves some of them empty. Slots
that hold no sample repeat one with weight 0: shapes are the same everywhere and no rank leaves a collective.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from raphael_dist.config import Config
from raphael_dist.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The division of `global_batch` samples over `world_size` ranks and `accumulation` micro-steps.

    Attributes:
        unit: consecutive ranks that must see the same image size at a time; divides `world_size`.
        run: positions [n * run, (n + 1) * run) share an image size; 0: all positions do.
        aligned: steps begin at multiples of `global_batch`; not so once a run has changed it.
    """

    global_batch: int
    world_size: int
    micro_batch: int
    unit: int = 1
    run: int = 0
    aligned: bool = True

    @classmethod
    def of(cls, config: Config, world_size: int, samples_seen: Iterable[int] = ()) -> "BatchPlan":
        """Return the plan of a configuration's training step. `samples_seen`: where a run that goes on may begin."""
        batch, run = config.train.global_batch, run_of(config)
        aligned = all(seen % math.gcd(run, batch) == 0 for seen in samples_seen)
        return cls(batch, world_size, config.train.micro_batch, unit_of(config), run, aligned)

    def __post_init__(self) -> None:
        if self.global_batch < self.world_size:
            raise UserError(
                f"train.global_batch = {self.global_batch} cannot serve {self.world_size} ranks: each needs at least one "
                f"sample per step; use at most {self.global_batch} ranks or train.global_batch >= {self.world_size}"
            )

    @cached_property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step: the same in every step, enough for the one with most chunks."""
        return -(-self._most_chunks // max(1, self.world_size // self.unit))

    @cached_property
    def _most_chunks(self) -> int:
        offsets = range(0, self.run, math.gcd(self.run, self.global_batch) if self.aligned else 1) if self.run else [0]
        return max(len(_chunks(self.global_batch, self._span, self.run, offset)) for offset in offsets)

    @property
    def waste(self) -> float:
        """Share of the slots that hold no sample."""
        return 1 - self.global_batch / (self.accumulation * self.world_size * self.micro_batch)

    @property
    def loss_scale(self) -> float:
        """Factor on a rank's sum of sample losses that makes DeepSpeed's mean the mean over the global batch.

        DeepSpeed divides by `accumulation` in backward and by `world_size` in the all-reduce.
        """
        return self.world_size * self.accumulation / self.global_batch

    def slots(self, samples_seen: int, rank: int, micro_step: int) -> list[tuple[int, float]]:
        """Return (position, weight) of each slot of one micro-batch; weight 0 marks a slot without a sample."""
        chunks = _chunks(self.global_batch, self._span, self.run, samples_seen % self.run if self.run else 0)
        number = micro_step * (self.world_size // self.unit) + rank // self.unit
        first, last = chunks[min(number, len(chunks) - 1)]
        taken = last if number < len(chunks) else first  # no chunk is left: repeat the last one's, with weight 0
        indices = range(first + rank % self.unit * self.micro_batch, first + (rank % self.unit + 1) * self.micro_batch)
        return [(samples_seen + min(i, last - 1), float(i < taken)) for i in indices]

    @property
    def _span(self) -> int:
        return self.unit * self.micro_batch

    def advice(self) -> list[str]:
        """Return what to change when more than 10% of the GPU time is spent on empty slots; [] when it is not."""
        if self.waste <= 0.1:
            return []
        found = []
        micro, world = self.better_micro_batch(), self.better_world_size()
        if micro != self.micro_batch:
            found.append(f"train.micro_batch={micro} ({replace(self, micro_batch=micro).waste:.1%})")
        if world != self.world_size:
            found.append(f"{world} ranks ({replace(self, world_size=world).waste:.1%}), which take as many micro-steps")
        if self.run % self._span:
            run = -(-self.run // self._span) * self._span
            found.append(f"data.bucket_run={run} in a new run ({replace(self, run=run).waste:.1%})")
        better = f"; better: {' or '.join(found)}" if found else ""
        return [f"{self.waste:.1%} of the compute goes to empty slots{better}"]

    def better_micro_batch(self) -> int:
        """Return the micro-batch no larger than the given one that wastes least, the largest of equals."""
        plans = [
            replace(self, micro_batch=m)
            for m in range(1, min(self.micro_batch, -(-self.global_batch // self.world_size)) + 1)
        ]
        return min(plans or [self], key=lambda p: (round(p.waste, 6), -p.micro_batch)).micro_batch

    def better_world_size(self) -> int:
        """Return the fewest ranks that need no more micro-steps."""
        return -(-self._most_chunks // self.accumulation) * self.unit


def unit_of(config: Config) -> int:
    """Return how many consecutive ranks exchange samples with each other, directly or through others."""
    return math.lcm(config.parallel.space_ep, config.parallel.time_ep)


def run_of(config: Config, training: bool = True) -> int:
    """Return how many consecutive positions share an image size; 0 when all do.

    Samples of one size that do not fill a run are left out of an epoch. In validation runs are as short as can be, so that
    few are left out.
    """
    if len(config.image.buckets) == 1:
        return 0
    return config.data.bucket_run if training else config.train.micro_batch


@lru_cache(maxsize=256)
def _chunks(global_batch: int, span: int, run: int, offset: int) -> list[tuple[int, int]]:
    """Return [first, last) of each chunk of 0 .. global_batch - 1, when index 0 is `offset` positions into a run."""
    ends = [*range(run - offset, global_batch, run), global_batch] if run else [global_batch]
    pieces = zip([0, *ends[:-1]], ends, strict=True)
    return [(first, min(first + span, end)) for start, end in pieces for first in range(start, end, span)]
