"""The state of a training run on one rank."""

from dataclasses import dataclass
from typing import IO

import torch

from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.source import DataSource
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.ranks import Ranks
from raphael_dist.sampling.sampling import Request
from raphael_dist.training.guard import Guard
from raphael_dist.training.stopping import StopRequest
from raphael_dist.training.telemetry import Telemetry
from raphael_dist.training.validation import Validator
from raphael_dist.training.watchdog import SLOW, Watchdog


@dataclass
class Run:
    """Everything a training run holds on this rank. `step` and `samples_seen` are its whole progress."""

    config: Config
    ranks: Ranks
    device: torch.device
    plan: BatchPlan
    data: DataSource
    builder: BatchBuilder
    validator: Validator | None
    engine: Engine
    ema: Ema | None
    schedule: NoiseSchedule
    store: CheckpointStore
    guard: Guard
    telemetry: Telemetry
    watchdog: Watchdog
    stop: StopRequest  # what this rank wants
    lock: IO[str] | None
    requests: list[Request]  # what is drawn while training
    samples_seen: int = 0
    step: int = 0
    since: int = 0  # the step that this configuration holds from, the end of the stage before (recipe.stages)
    until: int = 0  # the step that it holds to, the stage's last; 0: the run's
    stop_requested: bool = False  # what all ranks agreed on at a step's end
    first_step: int = 0  # where this process began, or returned to
    trained: bool = False  # a step since then changed the weights
    suspect: bool = False  # no sample of the last skipped step had a finite loss, so the weights are to blame
    save_due: bool = False  # a checkpoint is wanted, as soon as a step is good
    failure: UserError | None = None  # why this rank's data cannot go on

    @property
    def complete(self) -> bool:
        return self.step >= self.config.train.max_steps

    @property
    def over(self) -> bool:
        """Whether the stage is over, or left for an earlier one, or the run, which then is complete."""
        return not self.since <= self.step < (self.until or self.config.train.max_steps)

    def check_data(self) -> None:
        """Raise what keeps this rank's data from going on."""
        if self.failure is not None:
            raise self.failure

    def patience(self, micro_step: int) -> float:
        """Return how many times longer than usual a micro-step may take: the first of all compiles and allocates."""
        return SLOW if self.step == self.first_step and micro_step == 0 else 1.0
