"""Which sample positions each rank takes in each micro-step, so that a step sees exactly the global batch.

Progress is one integer, `samples_seen`: step s takes the positions [s * G, (s + 1) * G). They are dealt in order, a
micro-batch at a time, over ranks and then micro-steps; slots past G hold no sample. An empty slot repeats some sample
with weight 0, so that shapes are the same everywhere and no rank leaves a collective.
"""

from dataclasses import dataclass

from raphael_dist.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The division of `global_batch` samples over `world_size` ranks and `accumulation` micro-steps."""

    global_batch: int
    world_size: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.global_batch < self.world_size:
            raise UserError(
                f"train.global_batch = {self.global_batch} cannot serve {self.world_size} ranks: each needs at least one "
                f"sample per step; use at most {self.global_batch} ranks or train.global_batch >= {self.world_size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step."""
        return -(-self.global_batch // (self.world_size * self.micro_batch))

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
        first = (micro_step * self.world_size + rank) * self.micro_batch
        indices = range(first, first + self.micro_batch)
        return [(samples_seen + min(i, self.global_batch - 1), float(i < self.global_batch)) for i in indices]

    def better_micro_batch(self) -> int:
        """Return the micro-batch no larger than the given one that wastes least, the largest of equals."""
        plans = [
            BatchPlan(self.global_batch, self.world_size, m)
            for m in range(1, min(self.micro_batch, -(-self.global_batch // self.world_size)) + 1)
        ]
        return min(plans, key=lambda p: (round(p.waste, 6), -p.micro_batch)).micro_batch
