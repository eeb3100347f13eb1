"""Assigns samples to ranks and micro-steps, so that an optimizer step processes exactly the global batch.

A position is the number of a sample in the order of training, counted through all epochs. Progress is one integer,
`samples_seen`, the number of samples processed so far: with a global batch size G, step s processes the positions
[s * G, (s + 1) * G).

A slot is one place for a sample in a micro-batch of a rank. A unit is one rank, or the consecutive ranks that exchange
samples because they share experts. The positions of a step are divided into chunks of consecutive positions. In order, each
unit gets one chunk for the first micro-step, then each unit gets one for the second micro-step, and so on.

A unit processes one image size at a time. With several image sizes, the order of training is divided into runs of
consecutive positions with one size, and a chunk ends where such a run ends. If a chunk has fewer samples than a unit has
slots, some slots stay empty. An empty slot repeats a sample with weight 0, so that all ranks have equal shapes and take part
in all collectives.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from raphael_dist.config.schema import Config
from raphael_dist.errors import UserError
from raphael_dist.text import counted


@dataclass(frozen=True)
class BatchPlan:
    """The division of `global_batch_size` samples over `world_size` ranks and `accumulation` micro-steps.

    A position is the number of a sample in the order of training. A slot is one place in a micro-batch of a rank.

    Attributes:
        global_batch_size: samples per step.
        world_size: number of ranks.
        micro_batch_size: samples per rank and micro-step.
        unit: number of consecutive ranks that process the same image size at a time; divides `world_size`.
        run: number of consecutive positions with one image size, counted from position 0; 0: there is only one size.
        aligned: whether all steps start at multiples of `global_batch_size`; False if `global_batch_size` was changed in the
            course of training.
    """

    global_batch_size: int
    world_size: int
    micro_batch_size: int
    unit: int = 1
    run: int = 0
    aligned: bool = True

    @classmethod
    def of(cls, config: Config, world_size: int, samples_seen: Iterable[int] = ()) -> "BatchPlan":
        """Return the plan by which a configuration's global batch is divided over ranks and micro-steps.

        Args:
            config: the run's configuration.
            world_size: number of ranks.
            samples_seen: for each checkpoint from which the run may resume, how many samples were processed before it. These
                numbers decide whether all steps start at multiples of the global batch size (`aligned`).

        Raises:
            UserError: there are more ranks than samples in a global batch.
        """
        batch, run = config.train.global_batch_size, bucket_run_length(config)
        aligned = all(seen % math.gcd(run, batch) == 0 for seen in samples_seen)
        return cls(batch, world_size, config.train.micro_batch_size, ranks_per_unit(config), run, aligned)

    def __post_init__(self) -> None:
        if self.global_batch_size < self.world_size:
            raise UserError(
                f"train.global_batch_size={self.global_batch_size} must be at least the number of ranks "
                f"({self.world_size}), because each rank takes at least one sample per step. Use fewer ranks, or set "
                f"train.global_batch_size={self.world_size} or more."
            )

    @cached_property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step, equal in all steps: enough for the step that is divided into the most chunks.

        A chunk is the samples, all of one image size, that `unit` consecutive ranks process in one micro-step.
        """
        return -(-self._most_chunks // max(1, self.world_size // self.unit))

    @cached_property
    def _most_chunks(self) -> int:
        offsets = range(0, self.run, math.gcd(self.run, self.global_batch_size) if self.aligned else 1) if self.run else [0]
        return max(len(_chunks(self.global_batch_size, self._span, self.run, offset)) for offset in offsets)

    @property
    def waste(self) -> float:
        """Share (0..1) of padding in a step's micro-batches: samples of weight 0 divided by all samples."""
        return 1 - self.global_batch_size / (self.accumulation * self.world_size * self.micro_batch_size)

    @property
    def loss_scale(self) -> float:
        """Factor on a micro-step's sum of sample losses, so that gradients become those of the mean over the global batch.

        It cancels DeepSpeed's divisions: by `accumulation` in the backward pass, and by `world_size` in the all-reduce.
        """
        return self.world_size * self.accumulation / self.global_batch_size

    def slots(self, samples_seen: int, rank: int, micro_step: int) -> list[tuple[int, float]]:
        """Return (position, weight) of each sample in one micro-batch of a rank. The weight is 1, or 0 for an empty slot.

        A slot is a place for a sample in a micro-batch; an empty slot repeats the position of another sample. A position is
        the number of a sample in the order of training.

        Args:
            samples_seen: number of samples processed before this step; also the position of the step's first sample.
            rank: the rank, from 0.
            micro_step: the micro-step within the step, from 0.
        """
        chunks = _chunks(self.global_batch_size, self._span, self.run, samples_seen % self.run if self.run else 0)
        number = micro_step * (self.world_size // self.unit) + rank // self.unit
        first, last = chunks[min(number, len(chunks) - 1)]
        end = last if number < len(chunks) else first  # without a chunk: repeat the last one with weight 0
        start = first + rank % self.unit * self.micro_batch_size
        indices = range(start, start + self.micro_batch_size)
        return [(samples_seen + min(i, last - 1), float(i < end)) for i in indices]

    @property
    def _span(self) -> int:
        return self.unit * self.micro_batch_size

    def advice(self) -> list[str]:
        """Return a list with one line that suggests better settings if over 10% of the slots are empty, else [].

        A slot is one place in a micro-batch of a rank. An empty slot is computed, but has weight 0 in the loss.
        """
        if self.waste <= 0.1:
            return []
        changes = []
        micro, world = self.better_micro_batch(), self.better_world_size()
        if micro != self.micro_batch_size:
            changes.append(f"train.micro_batch_size={micro} ({replace(self, micro_batch_size=micro).waste:.1%})")
        if world != self.world_size:
            waste = replace(self, world_size=world).waste
            changes.append(f"{counted(world, 'rank')} ({waste:.1%}), as many micro-steps as now")
        if self.run % self._span:
            run = -(-self.run // self._span) * self._span
            changes.append(f"data.bucket_run={run} in a new run ({replace(self, run=run).waste:.1%})")
        better = f"; better: {' or '.join(changes)}" if changes else ""
        return [f"{self.waste:.1%} of the computation is spent on empty slots (samples with weight 0){better}"]

    def without_spare_slots(self) -> "BatchPlan":
        """Return this plan with the smallest micro-batch size for which one micro-step per optimizer step is enough.

        Returns the plan unchanged if a step needs several micro-steps.
        """
        if self.accumulation > 1:
            return self
        sizes = range(-(-self.global_batch_size // self.world_size), self.micro_batch_size)
        plans = (replace(self, micro_batch_size=size) for size in sizes)
        return next((plan for plan in plans if plan.accumulation == 1), self)

    def better_micro_batch(self) -> int:
        """Return the largest micro-batch size, not above the current one, with which the fewest slots are empty.

        A slot is a place for a sample in a micro-batch of a rank. An empty slot is computed, but has weight 0 in the loss.
        """
        largest = min(self.micro_batch_size, -(-self.global_batch_size // self.world_size))
        plans = [replace(self, micro_batch_size=m) for m in range(1, largest + 1)]
        return min(plans or [self], key=lambda p: (round(p.waste, 6), -p.micro_batch_size)).micro_batch_size

    def better_world_size(self) -> int:
        """Return the smallest number of ranks with which a step needs no more micro-steps than with `world_size` ranks."""
        return -(-self._most_chunks // self.accumulation) * self.unit


def ranks_per_unit(config: Config) -> int:
    """Return how many consecutive ranks must process the same image size at the same time.

    These ranks exchange tokens or samples for sharded experts. Groups of `parallel.space_ep` and of `parallel.time_ep` ranks
    can overlap, so the result is the least common multiple of the two numbers; 1 without sharded experts.
    """
    return math.lcm(config.parallel.space_ep, config.parallel.time_ep)


def bucket_run_length(config: Config, training: bool = True) -> int:
    """Return how many consecutive samples have the same image size; 0 if all images have one size.

    All images of a micro-batch have the same size. Therefore the order of samples consists of groups of this many
    consecutive samples with one image size. At the end of an epoch, samples that do not fill a group are left out. In
    validation (`training` is False) a group has only as many samples as a micro-batch, so that few are left out.
    """
    if len(config.image.buckets) == 1:
        return 0
    return config.data.bucket_run if training else config.train.micro_batch_size


@lru_cache(maxsize=256)
def _chunks(global_batch_size: int, span: int, run: int, offset: int) -> list[tuple[int, int]]:
    """Divide the samples 0 .. global_batch_size - 1 of a step into chunks first .. end - 1; return a list of (first, end).

    All samples of a chunk have one image size, and a chunk has at most `span` samples. `run` is the number of consecutive
    samples with one image size (0: all samples have the same size). `offset` is the number of samples of the first such run
    that belong to earlier steps.
    """
    ends = [*range(run - offset, global_batch_size, run), global_batch_size] if run else [global_batch_size]
    pieces = zip([0, *ends[:-1]], ends, strict=True)
    return [(first, min(first + span, end)) for start, end in pieces for first in range(start, end, span)]
